"""The data to evaluate on: which section `data` holds, and the part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from files.errors import ConfigError
from files.strict_yaml import Document, annotation_at, known_keys, load_yaml, set_overrides, unknown_key, validate
from training.config import TrainConfig
from training.data.augment import AugmentSection
from training.data.build import build_datasets
from training.data.dataset import ValDataset
from training.data.decoding import choose_decoder
from training.data.folder import FolderSource, LeftOut, scan
from training.data.images import ImagePipeline
from training.data.section import DataSection
from training.data.source import Source
from training.data.transforms import ImageSpec, check_spec
from training.evaluating.corruptions import Corrupted, Corruption

Split = Literal["val", "test", "train"]

# What of a run's section holds for other data as well.
_LOADING = ("batch_size", "eval_batch_size", "workers")


@dataclass(frozen=True)
class WantedData:
    """Which data the user asks for.

    Attributes:
        config: A training config whose data these are.
        overrides: KEY=VALUE of its section `data`.
        images: Instead: a folder of CLASS/*.jpg, taken whole.
        split: Which part.
        batch_size: Of evaluation.
        workers: Loader processes.
    """

    config: Path | None = None
    overrides: Sequence[str] = ()
    images: Path | None = None
    split: Split = "val"
    batch_size: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None and (self.config is not None or self.split != "val"):
            other = "--config" if self.config is not None else f"--split {self.split}"
            raise ConfigError(
                f"--images takes a folder as a whole, so that {other} has no effect; leave one of them out"
            )
        for option, value, least in (("--batch-size", self.batch_size, 1), ("--workers", self.workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{option}: must be at least {least}, got {value}")


def find_data(wanted: WantedData, run: TrainConfig | None) -> DataSection:
    """The section `data`: of the config that the user names, else of the model's run, with what was said beside it.

    Args:
        wanted: What the user asks for.
        run: The config of the run that the model comes from.

    Raises:
        ConfigError: Nothing says which data, or a key is wrong.
    """
    if wanted.config is not None:
        document = load_yaml(wanted.config)
    elif run is not None:
        document = Document({"data": run.data.model_dump(exclude_none=True)})
    else:
        document = Document({"data": {}})
    if not isinstance(document.data.get("data"), dict):
        document.data["data"] = {}
    given = {word.partition("=")[0].strip() for word in wanted.overrides}
    if "data.dataset" in given or wanted.images is not None:  # keys of another kind of data mean nothing here
        kept = {key: value for key, value in document.data["data"].items() if key in _LOADING}
        document.data["data"] = kept
    if wanted.images is not None:
        document.set(("data", "dataset"), "folder", place="--images")
        document.set(("data", "root"), str(wanted.images), place="--images")
    elif wanted.config is None and run is None and "data.dataset" not in given:
        raise ConfigError(
            "nothing says which data: give --config FILE, --images FOLDER, or data.dataset=NAME with what it needs"
        )
    document.data["data"].pop("class_names", None)  # compared with the model's
    document.data["data"].pop("image_size", None)  # the model's, or --image-size
    set_overrides(document, wanted.overrides, annotation=_annotation, example="data.root=/path/to/images")
    for key, value in (("eval_batch_size", wanted.batch_size), ("workers", wanted.workers)):
        if value is not None:
            document.set(("data", key), value, place=f"--{key.removeprefix('eval_').replace('_', '-')}")
    document.data = {"model": {"name": "any"}, "data": document.data["data"]}
    return validate(TrainConfig, document).data


def _annotation(key: str) -> Any:
    known = [name for name in known_keys(TrainConfig) if name.startswith("data.")]
    if key == "data.image_size":
        raise ConfigError("this is what --image-size is for")
    if key == "data.class_names":
        raise ConfigError("the data's own names are compared with the model's; leave it out")
    if key not in known:
        if not key.startswith("data."):
            raise ConfigError("only keys of data may be given here, such as data.root=/path/to/images")
        raise ConfigError(unknown_key(key, known))
    return annotation_at(TrainConfig, key)


@dataclass(frozen=True)
class Part:
    """The samples to evaluate on.

    Attributes:
        dataset: By index, as validation in training sees them.
        class_names: In the order of the targets.
        name: "val", "test", "train" or, of `--images`, "all".
        left_out: See `Sources`.
    """

    dataset: ValDataset
    class_names: list[str]
    name: str
    left_out: str = ""

    @property
    def source(self) -> Source:
        """The samples as they lie there."""
        return self.dataset.source

    def corrupted(self, corruption: Corruption, spec: ImageSpec) -> Part:
        """The same samples, made worse."""
        dataset = ValDataset(self.source, Corrupted(self.dataset.pipeline, corruption, spec))
        return replace(self, dataset=dataset)


def build_part(wanted: WantedData, data: DataSection, spec: ImageSpec, *, seed: int = 0) -> Part:
    """The part to evaluate on, prepared as validation in training prepares it.

    Args:
        wanted: Which part.
        data: Of `find_data`.
        spec: The model's input.
        seed: Of the run, on which it may depend what is in its training part.

    Raises:
        ConfigError: See `build_datasets`; or the data have no such part.
    """
    check_spec(spec)
    augment = AugmentSection()
    if wanted.images is not None:
        source, left_out = _whole_folder(wanted.images)
        return Part(
            ValDataset(source, ImagePipeline(source, augment, spec, decoder=choose_decoder("auto"))),
            source.class_names,
            "all",
            left_out,
        )
    bundle = build_datasets(data, augment, spec, seed=seed)
    train = ValDataset(bundle.train.source, bundle.train.pipeline)
    chosen = {"val": bundle.val, "test": bundle.test, "train": train}[wanted.split]
    if chosen is None:
        raise ConfigError(f"--split test: dataset {data.dataset!r} has no test part here; it has train and val")
    if not len(chosen):
        raise ConfigError(f"--split {wanted.split}: that part of the data has no samples")
    return Part(chosen, list(bundle.class_names), wanted.split, bundle.left_out)


def _whole_folder(folder: Path) -> tuple[FolderSource, str]:
    """All images in FOLDER/CLASS, and what lies beside them."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--images: {str(folder)!r} is no folder")
    left_out = LeftOut()
    try:
        found = scan(folder, left_out)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.root:", "--images:", 1)) from None
    names = sorted(found)
    return FolderSource(folder, found, names), str(left_out)
