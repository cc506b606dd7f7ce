"""What a user names as a model: a run, weights, or a model's name. Found first, built when its turn comes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from files.durable import nearest_beside, settled
from files.errors import ConfigError, is_out_of_memory, wanted_memory
from files.outputs import Kept
from models.config import LEAST_CROP, MOST, MetaFormerConfig
from models.export import count_classes
from models.factory import create_model, model_facts, set_class_names
from models.loading import known_section, trained_config, trained_foreign
from models.registry import is_model, is_path
from models.timm_facts import is_foreign
from models.weights import CONFIG, WEIGHTS, files_read, load_weights, misfits
from training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from training.config import TrainConfig, load_config
from training.data.transforms import ImageSpec
from training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which weights of a model, and how images come in, where the user says so.

    Attributes:
        checkpoint: Of a run: `best`, or `last`, its newest checkpoint. Default: best; with `ema` false last.
        ema: Of a checkpoint: the average of the weights, where the run kept one.
        pretrained: Of a model's name: the published weights.
        model: Name or YAML of the model of weights that do not say it themselves.
        image_size: Pixels, height and width. Default: the model's.
        crop_pct: Share of the resized image that the centre crop keeps. Default: the model's.
    """

    checkpoint: Literal["best", "last"] | None = None
    ema: bool = True
    pretrained: bool = False
    model: str | None = None
    image_size: int | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and not 1 <= self.image_size <= MOST:
            raise ConfigError(f"--image-size: must be from 1 to {MOST} pixels, got {self.image_size}")
        if self.crop_pct is not None and not LEAST_CROP <= self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct: must be in [{LEAST_CROP}, 1], got {self.crop_pct:g}")
        if self.checkpoint == "best" and not self.ema:
            raise ConfigError("--no-ema takes the raw weights of the newest checkpoint; leave out --checkpoint best")

    @property
    def images(self) -> dict[str, Any]:
        """What is said of the images, as arguments of `create_model`."""
        said = {"image_size": self.image_size, "crop_pct": self.crop_pct}
        return {key: value for key, value in said.items() if value is not None}


@dataclass(frozen=True)
class Subject:
    """A model that was found and not yet built.

    Attributes:
        text: What the user called it.
        source: What `create_model` takes first.
        arguments: Its further arguments.
        weights: What its weights are, in a word or two: "best", "raw weights of step 132", "published", ...
        checkpoint: A run's checkpoint, whose weights are those of the state named `state`.
        state: "ema" or "model".
        config: Of the run that it comes from.
        class_names: Of the checkpoint's classes; other weights bring their own.
    """

    text: str
    source: str | MetaFormerConfig
    arguments: Mapping[str, Any]
    weights: str
    checkpoint: Path | None = None
    state: str = "model"
    config: TrainConfig | None = None
    class_names: list[str] | None = field(default=None, repr=False)

    @property
    def published(self) -> bool:
        """Whether the weights are those that its authors published."""
        return bool(self.arguments.get("pretrained"))

    def build(self) -> Any:
        """The model with its weights, in evaluation: nothing is dropped.

        Raises:
            ConfigError: It cannot be built so, or its weights do not fit.
        """
        model = create_model(self.source, **self.arguments)
        if self.checkpoint is not None:
            state = _whole(load_checkpoint(self.checkpoint, world_size=None), self.state)
            if faults := misfits(model.state_dict(), state):
                more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
                raise ConfigError(f"{self.checkpoint}: weights do not fit the run's model: {faults[0]}{more}")
            model.load_state_dict(state)
            if self.class_names:
                set_class_names(model, self.class_names)
        model = model.eval()
        _check_size(model, self.text)
        return model


def image_spec(model: Any) -> ImageSpec:
    """What a model expects of its input."""
    return ImageSpec.of(model.pretrained_cfg)


def find_subject(text: str, choice: Choice) -> Subject:
    """Finds what the user means; no more is read than is needed to say what it is.

    Args:
        text: A run folder; a folder or file of weights (a run's `best`, what timm saved, ...); a run's checkpoint; or a
            model's name, as `create_model` takes it.
        choice: What is said beside it.

    Raises:
        ConfigError: There is no such thing, or it is not whole, or `choice` asks for what it has not.
    """
    path = Path(text).expanduser()
    # a folder that is being replaced stands aside for a moment; os.path takes names of any length
    there = os.path.exists(path) or os.path.exists(path.with_name(f".old-{path.name}"))
    if is_path(text) or not there:
        return _named(text, path, choice)
    if choice.pretrained:
        raise ConfigError(f"{text}: is there with weights of its own; --pretrained is for a model's name")
    if RunFolder(path).holds_run():
        return _of_run(text, RunFolder(path), choice)
    if path.parent.name == "checkpoints" and RunFolder(path.parent.parent).holds_run():
        config = load_config(RunFolder(path.parent.parent).config)
        return _of_checkpoint(text, load_checkpoint(path, world_size=None), config, choice)
    if not choice.ema or choice.checkpoint is not None:
        option = "--no-ema" if not choice.ema else f"--checkpoint {choice.checkpoint}"
        raise ConfigError(f"{text}: is no run folder, so that {option} has no effect; leave it out")
    return _of_weights(text, path, choice)


def files_of(text: str, choice: Choice) -> list[Kept]:
    """Files that what the user means consists of, which nothing may be written over; there or not. Arguments as above."""
    path = Path(text).expanduser()
    kept: list[Kept] = [(file, "is a file of the model's weights") for file in files_read(path)]
    for folder in (path, *list(path.absolute().parents)[:2]):  # the run, its best or a checkpoint, a file in best
        if RunFolder(folder).holds_run():
            kept += [(file, f"is the run's own file, of {folder}") for file in RunFolder(folder).own_files()]
    for name in (text, choice.model):
        if name is not None and is_path(name):
            kept.append((name, "is the model's YAML"))
    return kept


def _named(text: str, path: Path, choice: Choice) -> Subject:
    if not is_path(text) and not is_foreign(text) and (len(path.parts) > 1 or text.startswith((".", "~"))):
        raise ConfigError(f"{text}: no such run, weights or model{nearest_beside(path)}")
    if choice.model is not None:
        raise ConfigError(f"--model says which model weights are of; {text!r} is no folder or file of weights")
    if not choice.ema or choice.checkpoint is not None:
        option = "--no-ema" if not choice.ema else f"--checkpoint {choice.checkpoint}"
        raise ConfigError(f"{text}: is no run folder, so that {option} has no effect; leave it out")
    arguments = dict(choice.images)
    model_facts(text, **arguments)  # is there such a model?
    if not choice.pretrained:
        logger.warning("warning: %s: no --pretrained: its weights are freshly initialised", text)
    elif is_foreign(text) and choice.image_size is None:
        _tell_test_size(text)
    weights = "published" if choice.pretrained else "freshly initialised"
    return Subject(text, text, {**arguments, "pretrained": choice.pretrained}, weights)


def _tell_test_size(name: str) -> None:
    """Says where timm's own figures of some weights were had with another size than that of their training."""
    library, _, rest = name.partition("/")
    cfg = timm.models.get_pretrained_cfg(rest) if library == "timm" else None
    if cfg is not None and cfg.test_input_size is not None:
        crop = f" --crop-pct {cfg.test_crop_pct:g}" if cfg.test_crop_pct is not None else ""
        logger.info("note: timm tests %s with --image-size %d%s", name, cfg.test_input_size[-1], crop)


def _of_run(text: str, run: RunFolder, choice: Choice) -> Subject:
    config = load_config(run.config)
    if choice.model is not None:
        raise ConfigError(f"{text}: is a run, which says its model; leave out --model")
    if choice.checkpoint == "last" or not choice.ema:
        checkpoint = latest_checkpoint(run.checkpoints, world_size=None, warn=_warn)
        if checkpoint is None:
            raise ConfigError(f"{text}: the run has no whole checkpoint yet")
        return _of_checkpoint(text, checkpoint, config, choice)
    if not settled(run.best).exists():
        raise ConfigError(f"{text}: the run has no 'best' yet, no epoch being done; --checkpoint last takes its newest")
    found = _of_weights(text, run.best, choice)
    what = "best, average of weights" if config.ema.enabled else "best"
    return Subject(text, found.source, found.arguments, what, config=config)


def _of_checkpoint(text: str, checkpoint: Checkpoint, config: TrainConfig, choice: Choice) -> Subject:
    if not choice.ema and not config.ema.enabled:
        raise ConfigError(f"{text}: the run keeps no average (ema.enabled is false); leave out --no-ema")
    state = "ema" if config.ema.enabled and choice.ema else "model"
    _whole(checkpoint, state)
    section = config.model
    arguments = {**section.overrides, "num_classes": section.num_classes, **choice.images}
    what = "average of weights" if state == "ema" else "raw weights" if config.ema.enabled else "weights"
    told = f"{what} of step {checkpoint.step}"
    names = config.data.class_names
    return Subject(text, section.name, arguments, told, checkpoint.path, state, config, names)


def _whole(checkpoint: Checkpoint, state: str) -> dict[str, torch.Tensor]:
    """The weights of that name in a checkpoint."""
    found = checkpoint.shared.get(state)
    if not isinstance(found, dict):
        raise ConfigError(f"{checkpoint.path}: does not hold {state!r} in one piece, so it cannot be evaluated")
    return found


def _of_weights(text: str, path: Path, choice: Choice) -> Subject:
    state, saved = load_weights(path)
    saved = saved or {}
    origin = f"{path / CONFIG if path.is_dir() else path}"
    if saved.get("format") == "folded":
        raise ConfigError(f"{text}: is an export (folded); give the weights it was made from")
    if choice.model is not None:
        classifier = model_facts(choice.model).pretrained_cfg.get("classifier")
        known = {} if classifier is None else {"num_classes": count_classes(state, _first(classifier))}
        source: str | MetaFormerConfig = choice.model
        arguments: dict[str, Any] = {k: v for k, v in known.items() if v}
    elif (found := trained_foreign(saved) or _saved_by_timm(saved)) is not None:
        source, arguments = found
    elif (config := trained_config(saved, origin)) is not None:
        source, arguments = config, {}
    else:
        raise ConfigError(f"{text}: these weights do not say which model they are of; give --model NAME|YAML")
    home = (path.parent if path.name == WEIGHTS else path).absolute()
    run = RunFolder(home.parent)
    trained = load_config(run.config) if home == run.best and run.holds_run() else None
    return Subject(text, source, {**arguments, "checkpoint": path, **choice.images}, "weights", config=trained)


def _saved_by_timm(saved: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The model of a folder that timm saved, where it is none of the zoo: its name and further arguments."""
    name = saved.get("architecture")
    if isinstance(saved.get("model"), dict) or not isinstance(name, str) or not timm.is_model(name):
        return None
    if is_model(name) or timm.models.model_entrypoint(name).__module__ == "models.timm_registry":
        return None  # ours
    facts = known_section(saved, "pretrained_cfg")
    arguments = {key: facts[key] for key in ("crop_pct", "interpolation", "mean", "std") if facts.get(key) is not None}
    if isinstance(size := facts.get("input_size"), list) and len(size) == 3:
        arguments |= {"in_chans": size[0], "image_size": size[1:]}
    if isinstance(saved.get("num_classes"), int):
        arguments["num_classes"] = saved["num_classes"]
    return f"timm/{name}", {**arguments, **known_section(saved, "model_args")}


def _first(names: Any) -> str:
    return names if isinstance(names, str) else names[0]


def _check_size(model: Any, text: str) -> None:
    """Finds out now whether a model takes images of its size: what it cannot divide, most say when it is too late."""
    shape = model.pretrained_cfg["input_size"]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception as error:  # somebody's model may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_out_of_memory(error):
            said = f"out of memory: {wanted_memory(error)}"
        size = " x ".join(map(str, shape[1:]))
        raise ConfigError(f"--image-size: {text} takes no images of {size} pixels: {said}") from None


def _warn(message: str) -> None:
    logger.warning("warning: %s", message)
