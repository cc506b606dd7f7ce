"""Models measured on data: what `validate.py` does. One evaluation is one model on one part of the data, as it is or
corrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from files.errors import Failure
from files.outputs import Kept
from models.counting import count_parameters
from training.data.build import class_names_of_data
from training.data.images import note_turns
from training.data.section import DataSection
from training.data.skipping import SkipList, lost_worker
from training.data.transforms import ImageSpec
from training.distributed import World, close_world, init_world, leave_words_to_main
from training.evaluating.classes import match_classes
from training.evaluating.corruptions import Corruption, with_effect
from training.evaluating.mc import DropRates, McDropPath, MonteCarlo, set_rates
from training.evaluating.part import Part, WantedData, build_part, find_data
from training.evaluating.per_sample import PerSample
from training.evaluating.reading import ModelInput, build_loader
from training.evaluating.subject import Choice, Subject, files_of, find_subject, image_spec
from training.evaluation import evaluate_each
from training.metrics import Predictions, evaluation_metrics
from training.precision import evaluation_dtype
from training.processor import set_up_processor, speed_up
from training.setup import on_main

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Result = TypeVar("Result")
Check = Callable[[Sequence[DataSection]], None]


@dataclass(frozen=True)
class Compute:
    """Where and how the model runs; None: as the model's run did (see `evaluation_dtype`), else the best
    device and float32."""

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
        mc: Beside each evaluation a second one, of MC drop-path.
    """

    models: Sequence[str]
    choice: Choice = field(default_factory=Choice)
    data: WantedData = field(default_factory=WantedData)
    compute: Compute = field(default_factory=Compute)
    flip: bool = False
    corruptions: Sequence[Corruption] = ()
    mc: MonteCarlo | None = None


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
        mc: The rates, where this is MC drop-path.
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
    mc: DropRates | None = None

    @property
    def samples(self) -> int:
        """Samples that were evaluated."""
        return int(self.metrics["samples"])

    @property
    def name(self) -> str:
        """What it is called beside others."""
        corrupted = f" ({self.corruption})" if self.corruption is not None else ""
        return self.subject.text + corrupted + (" (MC drop-path)" if self.mc is not None else "")

    @property
    def weights(self) -> str:
        """What its weights are, and what is done with them."""
        return self.subject.weights + (f", {self.mc.told}" if self.mc is not None else "")


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


def validate(request: Request, *, check: Check | None = None) -> Iterator[Evaluation]:
    """Evaluates each model in turn, alone or as one of the processes that torchrun started.

    Args:
        request: What to do.
        check: Called by the main process with the data of each model, before anything is evaluated: raises what else is
            wrong.

    Yields:
        One evaluation for each model and corruption, with `mc` two; on the main process only.

    Raises:
        ConfigError: Whatever was given that cannot work.
        ReadError: An image that cannot be read, where `data.on_error` is 'stop'.
    """
    return for_each_model(request, _evaluate_one, check=check)


def files_given(request: Request, sections: Sequence[DataSection]) -> list[Kept]:
    """Files that were given, which nothing may be written over; there or not.

    Args:
        request: What to do.
        sections: The data of each model.
    """
    kept = [file for text in request.models for file in files_of(text, request.choice)]
    if request.data.config is not None:
        kept.append((request.data.config, "is what --config names"))
    for section in sections:
        for key in ("train_file", "val_file", "test_file"):
            if (table := getattr(section, key)) is not None:
                kept.append((Path(table).expanduser(), f"is what data.{key} names"))
    return kept


def for_each_model(
    request: Request,
    measure: Callable[[Bench], Iterator[Result]],
    *,
    check: Check | None = None,
    look: Callable[[Any], object] | None = None,
) -> Iterator[Result]:
    """Measures each model in turn.

    All that was named is looked at before the first is measured: models are found, and where there are several each is
    built once, so that a mistake in the last of them does not cost the time of the first.

    Args:
        request: Which models, and on what.
        measure: What is done with each.
        check: See `validate`.
        look: Raises what makes a model unfit for it.

    Yields:
        What `measure` gives; on the main process only.

    Raises:
        ConfigError, ReadError: See `validate`.
    """
    leave_words_to_main()
    subjects = [find_subject(text, request.choice) for text in request.models]
    sections = [find_data(request.data, subject.config) for subject in subjects]
    device = request.compute.device or next((s.config.runtime.device for s in subjects if s.config), "auto")
    world = init_world(device)
    told: set[str] = set()
    try:
        if check is not None:
            on_main(world, partial(check, sections))
        if len(subjects) > 1:
            for subject, data in zip(subjects, sections, strict=True):
                _check(subject, data, request, look)
        for subject, data in zip(subjects, sections, strict=True):
            bench = Bench(subject, data, request, world)
            for result in measure(bench):
                if world.is_main:
                    yield result
            bench.warn_of_turns(told)
    except RuntimeError as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        raise Failure(lost.partition("\n")[0] + "\nout of memory or of open files? use fewer --workers") from error
    finally:
        close_world(world)


def _check(subject: Subject, data: DataSection, request: Request, look: Callable[[Any], object] | None = None) -> None:
    """Builds a model and forgets it: what is wrong with it is known then."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # said when its turn comes
    try:
        model = subject.build()
        if request.data.images is None:
            match_classes(model, class_names_of_data(data), published=subject.published, text=subject.text)
        if request.mc is not None:
            set_rates(model, subject.config, request.mc)
        if look is not None:
            look(model)
    finally:
        logging.disable(level)


class Bench:
    """A model with its weights and its data, ready to be measured.

    Args:
        subject: The model.
        data: Which data.
        request: How.
        world: The processes that share the images.

    Attributes:
        model: In evaluation, on its device.
        spec: Its input.
        parameters: Of the model.
        part: The samples.
        columns: The logits that stand for the data's classes, see `match_classes`.
        precision: Of the forward pass.
        rates: Of MC drop-path, where it is asked for.

    Raises:
        ConfigError: Whatever does not fit.
    """

    def __init__(self, subject: Subject, data: DataSection, request: Request, world: World) -> None:
        self.subject, self.data, self.request, self.world = subject, data, request, world
        self.runtime = runtime = subject.config.runtime if subject.config is not None else None
        set_up_processor(runtime, processes=world.local_size)
        self.precision = evaluation_dtype(request.compute.precision, runtime, world.device)
        self.model = subject.build()
        speed_up(self.model, runtime, world.device)
        self.parameters = sum(count_parameters(self.model))
        self.spec = image_spec(self.model)
        self.part = self.part_of(request.data)
        self.turns = note_turns(self.part.dataset.pipeline)
        self.columns, self.note = match_classes(
            self.model, self.part.class_names, published=subject.published, text=subject.text
        )
        self.rates = None if request.mc is None else set_rates(self.model, subject.config, request.mc)
        if world.device.type == "cuda":
            self.model.to(world.device, memory_format=torch.channels_last)
        else:
            self.model.to(world.device)
        self.to_input = ModelInput(self.spec, world.device)
        self.evaluated = Evaluated(self.model, columns=self.columns, flip=request.flip)

    def warn_of_turns(self, told: set[str]) -> None:
        """Warns of damaged EXIF data that were met, which several models on the same data do once. All processes call it.

        Args:
            told: The data of which it was said.
        """
        if self.turns is None or (where := f"{self.turns.source.location} {self.part.name}") in told:
            return
        noted = self.world.sum(self.turns.noted)
        if self.world.is_main:
            self.turns.warn(noted)
        told.add(where)

    def part_of(self, wanted: WantedData) -> Part:
        """A part of the data, prepared for this model."""
        seed = self.subject.config.seed if self.subject.config else 0
        return build_part(wanted, self.data, self.spec, seed=seed)

    @property
    def batch_size(self) -> int:
        """Images at a time, per process."""
        return self.data.eval_batch_size or self.data.batch_size

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        kind, dtype = self.world.device.type, self.precision
        return torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)

    def batches(self, part: Part, *, desc: str = "") -> Iterator[tuple[Tensor, Tensor, Any]]:
        """This process's batches: the model's input, targets, indices."""
        world, data = self.world, self.data
        shard = range(world.rank, len(part.source), world.size)
        loader = build_loader(
            part.dataset, shard, batch_size=self.batch_size, workers=data.workers, device=world.device
        )
        hidden = None if world.is_main else True
        bar = tqdm(loader, desc=desc or self.subject.text, unit="batch", leave=False, disable=hidden)
        for images, targets, indices in SkipList(data).read(bar):
            yield self.to_input(images), targets.to(world.device, non_blocking=True), indices


def _evaluate_one(bench: Bench) -> Iterator[Evaluation]:
    """The evaluations of one model."""
    request, whole, world = bench.request, bench.part, bench.world
    logits = bench.model.num_classes if bench.columns is None else len(bench.columns)
    names = whole.class_names + [f"unnamed {i}" for i in range(len(whole.class_names), logits)]
    corruptions, idle = with_effect(request.corruptions, bench.spec.input_size[0])
    if idle:
        logger.warning("note: %s", idle)
    for corruption in corruptions or [None]:
        part = whole if corruption is None else whole.corrupted(corruption, bench.spec)
        forms: list[nn.Module] = [bench.evaluated]
        batches: Any = bench.batches(part)
        if request.mc is not None:
            forms.append(mc := McDropPath(bench.evaluated, request.mc))
            batches = mc.watch(batches)
        gathered = [(*evaluation_metrics(), PerSample(len(part.source))) for _ in forms]
        for _, _, per_sample in gathered:
            batches = per_sample.watch(batches)
        start = time.perf_counter()
        found = evaluate_each(
            [form.eval() for form in forms],
            batches,
            [[*metrics, per_sample] for metrics, _, per_sample in gathered],
            world=world,
            autocast=bench.autocast(),
        )
        seconds = time.perf_counter() - start
        for form, values, (_, predictions, per_sample) in zip(forms, found, gathered, strict=True):
            yield Evaluation(
                subject=bench.subject,
                data=bench.data,
                part=part,
                spec=bench.spec,
                parameters=bench.parameters,
                flip=request.flip,
                corruption=corruption,
                precision=str(bench.precision).removeprefix("torch."),
                device=f"{world.device}" + (f" x {world.size}" if world.size > 1 else ""),
                logit_names=names,
                metrics=values,
                predictions=predictions,
                per_sample=per_sample,
                skipped=len(part.source) - int(values["samples"]),
                seconds=seconds,
                notes=tuple(
                    line for line in (bench.note, f"left out: {part.left_out}" if part.left_out else "") if line
                ),
                mc=None if form is bench.evaluated else bench.rates,
            )
