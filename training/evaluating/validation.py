"""Models measured on data: what `validate.py` does. One evaluation is one model on one part of the data, as it is or
corrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from files.errors import Failure
from models.counting import count_parameters
from training.data.build import class_names_of_data
from training.data.section import DataSection
from training.data.skipping import SkipList, lost_worker
from training.data.transforms import ImageSpec
from training.distributed import World, close_world, init_world
from training.evaluating.classes import match_classes
from training.evaluating.corruptions import Corruption, with_effect
from training.evaluating.part import Part, WantedData, build_part, find_data
from training.evaluating.per_sample import PerSample
from training.evaluating.reading import ModelInput, build_loader
from training.evaluating.subject import Choice, Subject, find_subject, image_spec
from training.evaluation import evaluate
from training.metrics import Predictions, evaluation_metrics
from training.setup import autocast_dtype, on_main
from training.threads import number_of_threads

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Compute:
    """Where and how the model runs; None: as the model's run did, else the best device and float32."""

    device: str | None = None
    precision: Precision | None = None


@dataclass(frozen=True)
class Request:
    """What `validate.py` is asked for.

    Attributes:
        models: What the user calls them, see `find_subject`.
        choice: Which weights of them.
        data: On which data.
        compute: Where.
        flip: Average the probabilities of each image and its mirror image.
        corruptions: Each one is an evaluation of its own; none: the images as they are.
    """

    models: Sequence[str]
    choice: Choice = field(default_factory=Choice)
    data: WantedData = field(default_factory=WantedData)
    compute: Compute = field(default_factory=Compute)
    flip: bool = False
    corruptions: Sequence[Corruption] = ()


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        subject: The model.
        data: Which data.
        part: The samples.
        spec: The model's input.
        parameters: Of the model.
        flip: See `Request`.
        corruption: See `Request`.
        precision: Of the forward pass.
        device: Where it ran.
        logit_names: A name for each logit that was compared.
        metrics: By column.
        predictions: Counts per class.
        per_sample: Prediction and probabilities of each sample.
        skipped: Images that could not be read.
        seconds: Of the whole pass, reading included.
        notes: What else is to be said.
    """

    subject: Subject
    data: DataSection
    part: Part
    spec: ImageSpec
    parameters: int
    flip: bool
    corruption: Corruption | None
    precision: str
    device: str
    logit_names: list[str]
    metrics: dict[str, float]
    predictions: Predictions
    per_sample: PerSample
    skipped: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Samples that were evaluated."""
        return int(self.metrics["samples"])

    @property
    def name(self) -> str:
        """What it is called beside others."""
        return self.subject.text + (f" ({self.corruption})" if self.corruption is not None else "")


class Evaluated(nn.Module):
    """A model as it is evaluated: the logits of some classes, and perhaps of both directions of an image.

    Args:
        model: The model.
        columns: The logits that stand for the data's classes, in their order; None: all, as they are.
        flip: Give the logarithm of the mean of the probabilities of each image and its mirror image.
    """

    def __init__(self, model: nn.Module, *, columns: Sequence[int] | None = None, flip: bool = False) -> None:
        super().__init__()
        self.model, self.flip = model, flip
        self.columns = None if columns is None else torch.tensor(columns)

    def forward(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        if not self.flip:
            return logits
        both = torch.stack([logits, self._logits(images.flip(-1))]).float().log_softmax(dim=-1)  # (2, B, K)
        return both.exp().mean(dim=0).log()

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits if self.columns is None else logits[:, self.columns.to(logits.device)]


def validate(request: Request, *, check: Any = None) -> Iterator[Evaluation]:
    """Evaluates each model in turn, alone or as one of the processes that torchrun started.

    All that was named is looked at before the first evaluation: models are found, and where there are several each is
    built once, so that a mistake in the last of them does not cost the time of the first.

    Args:
        request: What to do.
        check: Called by the main process before anything is evaluated: raises what else is wrong.

    Yields:
        One evaluation for each model and corruption; on the main process only.

    Raises:
        ConfigError: Whatever was given that cannot work.
        ReadError: An image that cannot be read, where `data.on_error` is 'stop'.
    """
    subjects = [find_subject(text, request.choice) for text in request.models]
    sections = [find_data(request.data, subject.config) for subject in subjects]
    device = request.compute.device or next((s.config.runtime.device for s in subjects if s.config), "auto")
    world = init_world(device)
    try:
        if not world.is_main:
            logging.disable(logging.INFO)
            logging.getLogger("models").setLevel(logging.ERROR)
        if check is not None:
            on_main(world, check)
        if len(subjects) > 1:
            for subject, data in zip(subjects, sections, strict=True):
                _check(subject, data, request)
        for subject, data in zip(subjects, sections, strict=True):
            for evaluation in _evaluate_one(subject, data, request, world):
                if world.is_main:
                    yield evaluation
    except RuntimeError as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        raise Failure(lost.partition("\n")[0] + "\nout of memory or of open files? use fewer --workers") from error
    finally:
        close_world(world)


def _check(subject: Subject, data: DataSection, request: Request) -> None:
    """Builds a model and forgets it: what is wrong with it is known then."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # said when its turn comes
    try:
        model = subject.build()
        if request.data.images is None:
            match_classes(model, class_names_of_data(data), published=subject.published, text=subject.text)
    finally:
        logging.disable(level)


def _evaluate_one(subject: Subject, data: DataSection, request: Request, world: World) -> Iterator[Evaluation]:
    """The evaluations of one model."""
    runtime = subject.config.runtime if subject.config is not None else None
    torch.set_num_threads(number_of_threads(runtime.threads if runtime else "auto", processes=world.local_size))
    wanted = request.compute.precision or (runtime.precision if runtime else "float32")
    precision = autocast_dtype(wanted, world.device, key="--precision")
    model = subject.build()
    parameters = sum(count_parameters(model))
    spec = image_spec(model)
    whole = part = build_part(request.data, data, spec, seed=subject.config.seed if subject.config else 0)
    columns, note = match_classes(model, part.class_names, published=subject.published, text=subject.text)
    to_input = ModelInput(spec, world.device)
    if world.device.type == "cuda":
        model.to(world.device, memory_format=torch.channels_last)
    else:
        model.to(world.device)
    shard = range(world.rank, len(part.source), world.size)
    batch_size = data.eval_batch_size or data.batch_size
    evaluated = Evaluated(model, columns=columns, flip=request.flip)
    logits = model.num_classes if columns is None else len(columns)
    names = part.class_names + [f"unnamed {i}" for i in range(len(part.class_names), logits)]
    corruptions, idle = with_effect(request.corruptions, spec.input_size[0])
    if idle:
        logger.warning("note: %s", idle)
    for corruption in corruptions or [None]:
        if corruption is not None:
            part = whole.corrupted(corruption, spec)
        loader = build_loader(part.dataset, shard, batch_size=batch_size, workers=data.workers, device=world.device)
        skips = SkipList(data)
        metrics, predictions = evaluation_metrics()
        per_sample = PerSample(len(part.source))

        def batches(loader: Any = loader, skips: SkipList = skips) -> Iterator[tuple[Tensor, ...]]:
            bar = tqdm(loader, desc=subject.text, unit="batch", leave=False, disable=None if world.is_main else True)
            for images, targets, indices in skips.read(bar):
                yield to_input(images), targets.to(world.device, non_blocking=True), indices

        autocast = torch.autocast(world.device.type, dtype=precision, enabled=precision != torch.float32)
        start = time.perf_counter()
        watched = per_sample.watch(batches())
        values = evaluate(evaluated, watched, [*metrics, per_sample], world=world, autocast=autocast)
        yield Evaluation(
            subject=subject,
            data=data,
            part=part,
            spec=spec,
            parameters=parameters,
            flip=request.flip,
            corruption=corruption,
            precision=str(precision).removeprefix("torch."),
            device=f"{world.device}" + (f" x {world.size}" if world.size > 1 else ""),
            logit_names=names,
            metrics=values,
            predictions=predictions,
            per_sample=per_sample,
            skipped=len(part.source) - int(values["samples"]),
            seconds=time.perf_counter() - start,
            notes=tuple(line for line in (note, f"left out: {part.left_out}" if part.left_out else "") if line),
        )
