"""The classes of images: what `predict.py` does. Images are read in batches and forgotten, so that any number will do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from tqdm import tqdm

from files.errors import ConfigError, Failure
from files.words import counted
from training.data.augment import AugmentSection
from training.data.dataset import Unreadable, ValDataset
from training.data.decoding import choose_decoder
from training.data.folder import JUNK_FOLDERS
from training.data.images import ImagePipeline, image_extensions, note_turns
from training.data.skipping import PartialBatch, lost_worker
from training.data.transforms import check_spec
from training.distributed import close_world, init_world
from training.evaluating.classes import names_for_people
from training.evaluating.reading import ModelInput, build_loader
from training.evaluating.subject import Choice, find_subject, image_spec
from training.evaluating.validation import Compute, Evaluated
from training.precision import evaluation_dtype
from training.processor import set_up_processor, speed_up

DEFAULT_BATCH = 64
DEFAULT_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class PredictRequest:
    """What `predict.py` is asked for.

    Attributes:
        model: What the user calls it, see `find_subject`.
        paths: Of images, see `find_images`.
        choice: Which weights.
        compute: Where.
        topk: Classes per image.
        flip: Average the probabilities of each image and its mirror image.
        batch_size: Images at a time.
        workers: Processes that read them.
    """

    model: str
    paths: Sequence[str]
    choice: Choice = field(default_factory=Choice)
    compute: Compute = field(default_factory=Compute)
    topk: int = 5
    flip: bool = False
    batch_size: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for option, value, least in (("--topk", self.topk, 1), ("--batch-size", self.batch_size, 1),
                                     ("--workers", self.workers, 0)):  # fmt: skip
            if value is not None and value < least:
                raise ConfigError(f"{option}: must be at least {least}, got {value}")


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the first first.

    Attributes:
        path: As the user gave it, or as it was found below a folder.
        classes: Names of classes, or their numbers where they have none.
        probabilities: Of them.
    """

    path: str
    classes: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class NoPrediction:
    """An image that could not be read, or for which the model gives no finite outputs."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is about to be predicted.

    Attributes:
        paths: All of them.
        class_names: Of the model, in the order of the logits.
        topk: Classes per image, not more than there are.
        notes: What the user should know.
    """

    paths: list[str]
    class_names: list[str]
    topk: int
    notes: list[str]


def find_images(given: Sequence[str], stdin: Iterable[str] = ()) -> list[str]:
    """Paths of the images that the user means, in the order given, those of a folder sorted.

    Args:
        given: Files, which are taken whatever their names; folders, of which the files at any depth are taken whose names
            end as an image's, without hidden ones; "-" for the lines of `stdin`, which are files.
        stdin: Lines.

    Raises:
        ConfigError: A path that is not there, a folder without images, nothing at all.
    """
    found: list[str] = []
    for word in given:
        if word == "-":
            lines = [line.rstrip("\r\n") for line in stdin]
            lines = [line for line in lines if line.strip()]
            if not lines:
                raise ConfigError("-: standard input has no paths; expected one per line")
            found += lines
        elif os.path.isdir(word):
            below = _images_below(word)
            if not below:
                raise ConfigError(
                    f"{word}: has no images (names that end in .jpg, .png, .webp and others Pillow reads)"
                )
            found += below
        elif os.path.exists(word):
            found.append(word)
        else:
            raise ConfigError(f"{word}: no such file or folder")
    if not found:
        raise ConfigError("which images? give files, folders, or - for paths on standard input")
    return found


def _images_below(folder: str) -> list[str]:
    problems: list[OSError] = []
    found = []
    for place, folders, files in os.walk(folder, onerror=problems.append):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in JUNK_FOLDERS)
        ends = image_extensions()
        found += [os.path.join(place, f) for f in sorted(files)
                  if not f.startswith(".") and os.path.splitext(f)[1].lower() in ends]  # fmt: skip
    if problems:
        raise ConfigError(f"{problems[0].filename}: cannot be listed: {problems[0].strerror}")
    return found


class Paths:
    """Images that are known by their paths alone: a source without labels."""

    location = os.curdir  # they are files, so that one may be damaged
    class_names: list[str] = []  # noqa: RUF012  (nobody knows them)

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.targets = [0] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> IO[bytes]:
        return open(self.paths[index], "rb")


class Predictor:
    """A model ready to predict.

    Args:
        request: What to do.
        stdin: For the path "-".

    Attributes:
        plan: What it will do.
        turns: Where it notes damaged EXIF data.

    Raises:
        ConfigError: Whatever was given that cannot work; nothing was predicted then.
    """

    def __init__(self, request: PredictRequest, stdin: Iterable[str] = ()) -> None:
        paths = find_images(request.paths, stdin)
        subject = find_subject(request.model, request.choice)
        runtime = subject.config.runtime if subject.config is not None else None
        world = init_world(request.compute.device or (runtime.device if runtime else "auto"))
        if world.size > 1:
            close_world(world)
            raise ConfigError(f"predict.py runs as one process, not as {world.size}; give each its part of the images")
        self.device = world.device
        set_up_processor(runtime)
        self.precision = evaluation_dtype(request.compute.precision, runtime, self.device)
        model = subject.build()
        speed_up(model, runtime, self.device)
        self.spec = image_spec(model)
        check_spec(self.spec)
        self.to_input = ModelInput(self.spec, self.device)
        if not model.num_classes:
            raise ConfigError(f"{request.model}: has no classifier, so that it predicts no class")
        self.request = request
        self.model = Evaluated(model.to(self.device), flip=request.flip).eval()
        notes = []
        names = names_for_people(model, published=subject.published)
        if names is None:
            notes.append("the weights do not name their classes: numbers stand for them")
            names = [str(i) for i in range(model.num_classes)]
        topk = min(request.topk, len(names))
        if topk < request.topk:
            notes.append(f"--topk {request.topk}: the model has {counted(topk, 'class')}, so that {topk} are given")
        self.plan = Plan(paths, names, topk, notes)
        self._source = Paths(paths)
        self._pipeline = ImagePipeline(self._source, AugmentSection(), self.spec, decoder=choose_decoder("auto"))
        self.turns = note_turns(self._pipeline)

    @torch.no_grad()
    def predictions(self) -> Iterator[Prediction | NoPrediction]:
        """Of each path in order.

        Raises:
            Failure: A process that reads images has died.
        """
        try:
            for indices, images, unreadable in self._batches():
                rows: dict[int, Prediction | NoPrediction] = {
                    i: NoPrediction(self.plan.paths[i], reason) for i, reason in unreadable.items()
                }
                if images is not None:
                    images = self.to_input(images)
                    with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                        logits = self.model(images)
                    best = logits.float().softmax(dim=1).topk(self.plan.topk, dim=1)
                    for i, classes, values in zip(indices, best.indices.tolist(), best.values.tolist(), strict=True):
                        if math.isnan(values[0]):
                            rows[i] = NoPrediction(self.plan.paths[i], "the model's outputs are not finite numbers")
                            continue
                        names = [self.plan.class_names[c] for c in classes]
                        rows[i] = Prediction(self.plan.paths[i], names, values)
                yield from (rows[i] for i in sorted(rows))
        except RuntimeError as error:
            lost = lost_worker(error)
            if lost is None:
                raise
            raise Failure(lost.partition("\n")[0] + "\nout of memory or of open files? use fewer --workers") from error

    def _batches(self) -> Iterator[tuple[list[int], Any, dict[int, str]]]:
        """Of each batch: which paths were read, their images, and why others were not."""
        source = self._source
        dataset = ValDataset(source, self._pipeline)
        size = max(1, min(self.request.batch_size or DEFAULT_BATCH, len(source)))
        batches = math.ceil(len(source) / size)
        workers = DEFAULT_WORKERS if self.request.workers is None else self.request.workers
        workers = min(workers, batches - 1)  # starting a process takes as long as reading a batch
        loader = build_loader(dataset, range(len(source)), batch_size=size, workers=workers, device=self.device)
        bar = tqdm(loader, desc="predicting", unit="batch", leave=False, disable=None if batches > 1 else True)
        for number, batch in enumerate(bar):
            expected = range(number * size, min((number + 1) * size, len(source)))
            if not isinstance(batch, PartialBatch):
                yield list(expected), batch[0], {}
                continue
            read = [] if batch.batch is None else batch.batch[2].tolist()
            missing = [i for i in expected if i not in set(read)]  # in order, as their reasons are
            reasons = {i: _reason(fault) for i, fault in zip(missing, batch.unreadable, strict=True)}
            yield read, None if batch.batch is None else batch.batch[0], reasons


def _reason(fault: Unreadable) -> str:
    """Why, without Python's number of the error."""
    reason = fault.reason.partition("] ")[2] if "[Errno" in fault.reason else fault.reason
    return reason.strip().rstrip(":")
