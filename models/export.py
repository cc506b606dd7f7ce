"""Models for use elsewhere: folders of weights, timm folders, ONNX, torch.export, and an inference form with scales folded
into weights.

Every export is written beside its place, read back, run, compared with the model, and only then moved to its name.
"""

import contextlib
import glob
import importlib.util
import io
import json
import os
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor

from files.durable import make_folder, publish, sync_folder, tidy
from files.errors import ConfigError, Failure
from files.strict_yaml import dump_yaml
from models.config import MetaFormerConfig, idle_keys, load_model_config
from models.factory import class_names_of, saved_config
from models.fold import fold_scales, load_folded
from models.layouts import timm_head, to_timm
from models.loading import in_our_layout
from models.metaformer import MetaFormer
from models.registry import is_model, model_config
from models.timm_models import build_foreign, load_foreign
from models.weights import WEIGHTS, load_weights, save_weights

Format = Literal["zoo", "timm", "onnx", "torch", "folded"]
FORMATS: tuple[Format, ...] = get_args(Format)
Runner = Callable[[Tensor], Tensor]
OPSET = 20  # of ONNX: the first with GELU

TOLERANCE: dict[Format, float] = {"zoo": 1e-5, "timm": 1e-5, "onnx": 1e-4, "torch": 1e-5, "folded": 1e-5}
"""Largest difference of logits allowed, relative to the largest logit, in float32."""

_SUFFIX: dict[Format, str] = {"zoo": "", "timm": "", "onnx": ".onnx", "torch": ".pt2", "folded": ""}
_BATCHES = (1, 3)  # that an export is checked with
MODEL = "model.yaml"
"""The model of a folder of format zoo."""


class ExportError(Failure):
    """A model that could not be exported, or an export that does not compute what the model does."""


def count_classes(state: dict[str, Tensor], classifier: str) -> int:
    """Classes of weights, in any layout that loads; 0: they hold no classifier."""
    key = f"{classifier}.weight"
    weight = state.get(key, in_our_layout(state).get(key))
    return weight.shape[0] if weight is not None and weight.ndim else 0


@dataclass(frozen=True)
class Exported:
    """What `export_model` wrote.

    Attributes:
        path: The file or folder.
        about: What is in it, in words.
        error: Largest difference of logits from the model's, relative to the largest logit.
        run: The export, read back: images (B, C, H, W) -> logits.
    """

    path: Path
    about: str
    error: float
    run: Runner


def export_model(model: MetaFormer | Any, fmt: Format, output: Path, *, force: bool = False) -> Exported:
    """Writes a model, after reading the export back and comparing its logits at batch 1 and 3.

    Args:
        model: Is left as it was; exported in float32 from the CPU.
        fmt: `zoo`: a folder for `create_model("FOLDER/model.yaml", checkpoint="FOLDER")` (of a foreign model: its name
            instead) and all that takes weights. `timm`: a folder for
            `timm.create_model("local-dir:FOLDER", pretrained=True)`. `onnx` and `torch`: a file (.onnx, .pt2) with a
            dynamic batch. `folded`: a folder for `load_folded`.
        output: File or folder.
        force: Replace what is there, if it is an export of the same kind.

    Raises:
        ConfigError: The model cannot be had in that format, with the reason, or the output is there already.
        ExportError: The export failed or differs, or the model's logits are not finite; what was there before is
            untouched.
    """
    check_output(fmt, output, force=force)
    output = Path(os.path.realpath(output))
    if not isinstance(model, MetaFormer):
        _refuse_foreign(model, fmt)
    elif fmt in ("zoo", "timm", "folded") and not model.head.global_pool:
        raise ConfigError(f"an unpooled model cannot be had as {fmt}: what is written beside the weights cannot say so")
    model = deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        pairs = [(x, model(x)) for x in map(example_images(model), _BATCHES)]
    if not all(logits.isfinite().all() for _, logits in pairs):
        keys = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
        where = f"its weights are not, first {keys[0]}" if keys else "its weights are, so they are too large"
        raise ExportError(f"{output}: not written: the model's own logits are not finite; {where}")
    _check_room(model, output)
    temp = output.with_name(f".tmp-{output.name}")
    try:
        make_folder(output.parent)
        tidy(output.parent, glob.escape(output.name))
        temp.mkdir()
        draft = temp / output.name
        about, run = _WRITERS[fmt](model, draft)
        with torch.no_grad():
            error = max(relative_error(logits, run(images)) for images, logits in pairs)
        if not error <= TOLERANCE[fmt]:
            raise ExportError(
                f"{output}: not written: the export's logits differ from the model's by {error:.1e} of the largest, "
                f"allowed is {TOLERANCE[fmt]:.0e}"
            )
        for file in [draft] if draft.is_file() else draft.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if draft.is_dir():
            publish(draft, output)
        else:
            os.replace(draft, output)
            sync_folder(output.parent)
    except OSError as error:
        raise ExportError(f"{output}: not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Exported(output, about, error, run)


def check_output(fmt: Format, output: Path, *, force: bool) -> None:
    """Refuses an output that must not be written, before anything is built.

    Raises:
        ConfigError: It is there already, has another format's ending, or cannot be written; or the format's packages are
            missing.
    """
    suffix = _SUFFIX[fmt]
    if suffix and output.suffix != suffix:
        raise ConfigError(f"--output {output}: format {fmt} is a file ending in {suffix}")
    if not suffix and output.suffix in (".onnx", ".pt2", ".pt", ".pth", ".safetensors"):
        raise ConfigError(f"--output {output}: format {fmt} is a folder, not a {output.suffix} file")
    if output.exists() and not force:
        raise ConfigError(f"--output {output} exists already; name another, or replace it with --force")
    if output.exists() and output.is_dir() == bool(suffix):
        raise ConfigError(f"--output {output} is a {'folder' if suffix else 'file'}; --force does not replace it")
    if not suffix and output.is_dir():
        own = {"config.json", WEIGHTS} | ({MODEL} if fmt == "zoo" else set())
        foreign = sorted({entry.name for entry in output.iterdir()} - own)
        if foreign:
            raise ConfigError(f"--output {output} holds other files ({', '.join(foreign[:3])}); name another")
    if fmt == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"format onnx needs {', '.join(missing)}: pip install -e '.[export]'")
    _check_place(Path(os.path.realpath(output)), told=output)


def _check_place(output: Path, *, told: Path) -> None:
    """Finds out whether something can be written beside an output, and leaves nothing behind."""
    if os.path.islink(output):
        raise ConfigError(f"--output {told}: cannot be written: a link that leads in a circle")
    missing = [folder for folder in output.parents if not os.path.lexists(folder)]
    temp = output.with_name(f".tmp-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(temp):  # which a kill may have left
            temp.mkdir()
            temp.rmdir()
    except OSError as error:
        reason = "not all of its folders are folders" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"--output {told}: cannot be written: {reason}") from None
    finally:
        for folder in missing:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_room(model: torch.nn.Module, output: Path) -> None:
    """Finds out before an export is computed whether its weights alone are more than the disk has room for.

    Raises:
        ExportError: They are.
    """
    there = next(folder for folder in output.parents if folder.exists())
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if size > (free := shutil.disk_usage(there).free):
        raise ExportError(f"{output}: not written: no room: needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")


def _refuse_foreign(model: Any, fmt: Format) -> None:
    """Refuses what a model of timm or torchvision cannot be had in."""
    name = model.zoo_config["name"]
    if fmt == "folded":
        raise ConfigError(f"model {name}: format folded is for models of the zoo; use --format onnx or torch")
    if fmt in ("zoo", "timm") and (gone := getattr(model, "removed_blocks", ())):
        raise ConfigError(
            f"model {name}: format {fmt} has it built with all its blocks, also the {len(gone)} removed ones; use --format "
            "onnx or torch, which hold what is computed"
        )
    if fmt == "timm" and not name.startswith("timm/"):
        raise ConfigError(f"model {name}: format timm is for models that timm has; use --format onnx or torch")


def example_images(model: Any) -> Callable[[int], Tensor]:
    """Batch -> normalised noise of the model's input size, the same each time."""
    shape = model.pretrained_cfg["input_size"]
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Largest difference, relative to the largest value expected; NaN where either holds one."""
    if expected.shape != actual.shape:
        return float("nan")
    difference = (actual - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _write_zoo(model: MetaFormer | Any, draft: Path) -> tuple[str, Runner]:
    save_weights(draft, model.state_dict(), saved_config(model))
    state, _ = load_weights(draft)
    if not isinstance(model, MetaFormer):
        about = dict(saved_config(model)["model"])
        again = build_foreign(name := about.pop("name"), about, pretrained=False)
        load_foreign(again, state, str(draft), replace_classifier=False)
        # its name alone builds it for the classes, channels and size that its library has it with
        words = "".join(f"{key}={value!r}, " for key, value in about.items() if key not in _DATA_KEYS)
        return f'for create_model("{name}", {words}checkpoint="FOLDER"), train.py and validate.py', again.eval()
    config = model.config.model_dump(exclude_none=True)
    for key in idle_keys(model.config):  # a model's YAML may not hold them
        *section, last = key.split(".")
        (config["head"] if section else config).pop(last, None)
    (draft / MODEL).write_text(dump_yaml(config), encoding="utf-8")
    again = MetaFormer(load_model_config(draft / MODEL))
    again.load_state_dict(state)
    return 'for create_model("FOLDER/model.yaml", checkpoint="FOLDER"), train.py and validate.py', again.eval()


def _write_folded(model: MetaFormer, draft: Path) -> tuple[str, Runner]:
    folded = fold_scales(model)
    about = {"format": "folded", "model": model.config.model_dump()}
    if (names := class_names_of(model)) is not None:
        about["class_names"] = names
    save_weights(draft, folded.state_dict(), about)
    return "folder for models.export.load_folded", load_folded(draft)


def _write_timm(model: MetaFormer | Any, draft: Path) -> tuple[str, Runner]:
    if not isinstance(model, MetaFormer):
        save_weights(draft, model.state_dict(), saved_config(model))
        again = timm.create_model(f"local-dir:{draft}", pretrained=True).eval()
        return f'{model.zoo_config["name"]}, for timm.create_model("local-dir:FOLDER", pretrained=True)', again
    config = model.config
    twin = _timm_twin(model)
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k in _DATA_KEYS}
    twin.pretrained_cfg = {k: v for k, v in twin.pretrained_cfg.items() if k not in ("tag", "license")} | cfg
    names = class_names_of(model)
    timm.models.save_for_hf(
        twin,
        str(draft),
        model_config=None if names is None else {"label_names": names},
        model_args={"in_chans": config.in_chans},
        safe_serialization=True,
    )
    again = timm.create_model(f"local-dir:{draft}", pretrained=True).eval()
    return f'timm {config.name}, for timm.create_model("local-dir:FOLDER", pretrained=True)', again


_DATA_KEYS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "pool_size")


def _timm_twin(model: MetaFormer) -> Any:
    """timm's model of the same name with our weights.

    Raises:
        ConfigError: timm has none, or it is another network.
    """
    config, name = model.config, model.config.name
    instead = "use --format torch or onnx, or models.register_with_timm() where this code is installed"
    if not timm.is_model(name):
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}; {instead}")
    arguments: dict[str, Any] = {"num_classes": config.num_classes, "in_chans": config.in_chans}
    if getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False):
        arguments["img_size"] = config.height_width
    twin = timm.create_model(name, **arguments).eval()
    try:
        twin.load_state_dict(to_timm(model.state_dict(), config))
    except RuntimeError as error:
        first = _changed(config) or textwrap.shorten(str(error).splitlines()[1].strip(), 150)
        raise ConfigError(f"timm's {name} is another network than this one: {first}\n{instead}") from None
    with torch.no_grad():
        images = example_images(model)(_BATCHES[-1])
        error = relative_error(model(images), twin(images))
    if error <= TOLERANCE["timm"]:
        return twin
    if changed := _changed(config):
        raise ConfigError(f"timm's {name} is another network than this one: {changed}\n{instead}")
    why = f"timm's {name} computes other logits from these weights (by {error:.1e} of the largest)"
    keys = timm_head(config)
    if not keys:
        raise ConfigError(f"{why}\n{instead}")
    settings = " ".join(f"head.{key}={value}" for key, value in keys.items())
    raise ConfigError(
        f"{why}, because its head is not the original's\nexport with timm's head, {settings} (evaluate the model with it "
        f"before relying on it),\nor {instead}"
    )


def _changed(config: MetaFormerConfig) -> str:
    """The first key in which a config is another network than the zoo's of that name, or ""."""
    if not is_model(config.name):
        return ""
    zoo = model_config(config.name)
    for key in ("depths", "dims", "token_mixer", "norm", "act", "mlp_ratio", "mlp_bias", "pool_size", "head_dim"):
        if getattr(config, key) != getattr(zoo, key):
            return f"{key} is {getattr(config, key)}, timm's {getattr(zoo, key)}"
    return ""


def _write_onnx(model: MetaFormer | Any, draft: Path) -> tuple[str, Runner]:
    import onnx  # here, because the packages of the export extra may be missing

    program = torch.onnx.export(
        model,
        (example_images(model)(2),),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["preprocessing"] = _preprocessing(model)
    if (names := class_names_of(model)) is not None:
        program.model.metadata_props["class_names"] = json.dumps(names)
    program.save(draft)
    onnx.checker.check_model(draft)
    opset = next(entry.version for entry in onnx.load(draft).opset_import if not entry.domain)
    return f"ONNX opset {opset}, {_shapes(model)}, checked with onnxruntime", _onnx_runner(draft)


def _onnx_runner(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as torch's, see training/threads.py
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _write_torch(model: MetaFormer | Any, draft: Path) -> tuple[str, Runner]:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (example_images(model)(2),), dynamic_shapes=({0: batch},))
    extra = {"preprocessing.json": _preprocessing(model)}
    if (names := class_names_of(model)) is not None:
        extra["class_names.json"] = json.dumps(names)
    content = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
    torch.export.save(program, content, extra_files=extra)
    draft.write_bytes(content.getbuffer())
    again = torch.export.load(draft).module()
    return f"torch.export {torch.__version__}, {_shapes(model)}", again


def _shapes(model: MetaFormer | Any) -> str:
    images = example_images(model)(1)
    with torch.no_grad():
        outputs = model(images)
    what = "logits" if model.num_classes else "features"
    before, after = (", ".join(map(str, tensor.shape[1:])) for tensor in (images, outputs))
    return f"images (batch, {before}) -> {what} (batch, {after})"


def _preprocessing(model: MetaFormer | Any) -> str:
    """What the images need before they go in, as JSON."""
    return json.dumps({key: model.pretrained_cfg[key] for key in _DATA_KEYS if key != "pool_size"})


_WRITERS: dict[Format, Callable[[Any, Path], tuple[str, Runner]]] = {
    "zoo": _write_zoo,
    "timm": _write_timm,
    "onnx": _write_onnx,
    "torch": _write_torch,
    "folded": _write_folded,
}


def compare_speed(model: MetaFormer | Any, run: Runner, *, batch: int = 8, rounds: int = 15) -> tuple[float, float]:
    """Images per second of the model and of its export, in turns, by the median round."""
    images = example_images(model)(batch)
    model = deepcopy(model).eval()
    seconds: list[tuple[float, float]] = []
    with torch.inference_mode():
        for _ in range(rounds + 2):  # the first two warm up
            start = time.perf_counter()
            model(images)
            middle = time.perf_counter()
            run(images)
            seconds.append((middle - start, time.perf_counter() - middle))
    before, after = zip(*seconds[2:], strict=True)
    return batch / statistics.median(before), batch / statistics.median(after)
