"""Accuracy and latency of a model without some of its residual blocks: what `validate.py --drop-blocks` measures.

Blocks are switched off one at a time, or greedily: in each round that block whose absence costs least. All candidates of a
round are measured in one pass over the data, so that images are read once per round.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from files.errors import ConfigError
from files.words import counted
from models.pruning import OPTION, blocks_of, chosen_blocks, empty_stage, named_blocks
from stochastic_depth.blocks import find_blocks
from stochastic_depth.compute import count_macs
from stochastic_depth.removal import ResidualBlock, removed
from training.evaluating.part import Part
from training.evaluating.validation import Bench, Check, Request, for_each_model
from training.evaluation import evaluate_each
from training.metrics import evaluation_metrics

FLOOR = 0.5
"""Without a number, greedy removal ends where top-1 is below this share of the whole model's."""

ROUNDS = 15
"""Of timing, of each size of batch."""

_FEWEST_ROUNDS = 3
_LEAST_SECONDS, _MOST_PASSES = 0.01, 10  # of one measurement, in which a short pass is repeated
_MOST_SECONDS = 20.0  # for the rounds of one size of batch, where `_FEWEST_ROUNDS` take less

Kind = Literal["one", "greedy", "list"]


@dataclass(frozen=True)
class Wanted:
    """Which blocks to remove.

    Attributes:
        kind: `one`: each alone. `greedy`: one after the other. `list`: those named.
        count: Of greedy removal: how many; None: until `FLOOR`.
        words: Names or numbers of blocks.
    """

    kind: Kind
    count: int | None = None
    words: tuple[str, ...] = ()


def parse_wanted(text: str) -> Wanted:
    """`one`, `greedy`, `greedy:N`, or what `named_blocks` takes.

    Raises:
        ConfigError: It is none of these.
    """
    word, colon, count = text.partition(":")
    if word == "greedy":
        if colon and not (count.isascii() and count.isdigit() and int(count)):
            raise ConfigError(f"{OPTION} {text}: behind the colon stands how many blocks, at least 1, got {count!r}")
        return Wanted("greedy", int(count) if colon else None)
    if word == "one":
        if colon:
            raise ConfigError(f"{OPTION} {text}: 'one' removes each block alone and takes no number")
        return Wanted("one")
    return Wanted("list", words=tuple(named_blocks(text)))


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass.

    Attributes:
        milliseconds: The median over rounds.
        ratio: To the whole model's in the same round, the median.
    """

    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """The model without some blocks.

    Attributes:
        removed: Their names, in the order of removal.
        metrics: By column, on the part that is reported.
        selection: On the part that the choice was made on; None where nothing was chosen.
        compute: Multiply-accumulates as a share of the whole model's; None where they cannot be counted.
        parameters: Those left.
        latency: By size of batch.
        obstacle: Why no smaller model can be written; empty where one can.
    """

    removed: tuple[str, ...]
    metrics: dict[str, float]
    selection: dict[str, float] | None
    compute: float | None
    parameters: int
    latency: dict[int, Latency]
    obstacle: str = ""


@dataclass(frozen=True)
class BlockStudy:
    """What came out.

    Attributes:
        text: What the user called the model.
        weights: What its weights are.
        wanted: Which blocks were removed.
        blocks: All residual blocks of the model.
        dataset: Of the data.
        split: The part that is reported.
        selected_on: The part that the choice was made on; empty where nothing was chosen.
        could_test: The choice was made on what is reported, though the data have a test part.
        samples: That were measured.
        device: Where it ran.
        precision: Of the forward pass.
        rows: The whole model first.
        notes: What else is to be said.
    """

    text: str
    weights: str
    wanted: Wanted
    blocks: list[ResidualBlock]
    dataset: str
    split: str
    selected_on: str
    could_test: bool
    samples: int
    device: str
    precision: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def optimistic(self) -> bool:
        """Whether the choice was made on what is reported."""
        return self.selected_on == self.split


def study_blocks(
    request: Request, wanted: Wanted, *, check: Check | None = None, rounds: int = ROUNDS
) -> Iterator[BlockStudy]:
    """Removes blocks of each model in turn; arguments and errors as of `validate`.

    Args:
        request: Which models, and on what; greedy removal chooses on `val` where it asks for `test`.
        wanted: Which blocks.
        check: See `validate`.
        rounds: Of timing.
    """
    if request.corruptions or request.mc is not None:
        other = "--corrupt" if request.corruptions else "--mc"
        raise ConfigError(f"{OPTION} measures the images and the model as they are, so that {other} has no effect")

    def look(model: Any) -> None:
        _check_wanted(wanted, blocks_of(model))

    return for_each_model(request, partial(_study, wanted=wanted, rounds=rounds), check=check, look=look)


def _check_wanted(wanted: Wanted, blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """The blocks named, none where it is the study that chooses."""
    most = _most(blocks)
    if wanted.count is not None and wanted.count > most:
        raise ConfigError(
            f"{OPTION} greedy:{wanted.count}: of the model's {counted(len(blocks), 'block')} {most} can be removed"
        )
    return chosen_blocks(wanted.words, blocks) if wanted.kind == "list" else []


def _most(blocks: Sequence[ResidualBlock]) -> int:
    """How many blocks can be removed together: one is left at least."""
    return min(sum(block.removable for block in blocks), len(blocks) - 1)


Set = tuple[ResidualBlock, ...]


def _study(bench: Bench, *, wanted: Wanted, rounds: int) -> Iterator[BlockStudy]:
    request, part = bench.request, bench.part
    blocks = blocks_of(bench.model)
    named = _check_wanted(wanted, blocks)
    sets: list[Set] = [()]
    chosen: dict[Set, dict[str, float]] = {}
    known: dict[Set, dict[str, float]] = {}
    selection = part
    if wanted.kind == "one":
        sets += [(block,) for block in blocks if block.removable]
    elif wanted.kind == "list":
        sets.append(tuple(named))
    else:
        if request.data.split == "test":
            selection = bench.part_of(replace(request.data, split="val"))
        chosen = _choose(bench, blocks, selection, wanted.count)
        sets = list(chosen)
        known = chosen if selection is part else {}
    missing = [each for each in sets if each not in known]
    if missing:
        known = known | dict(zip(missing, _measure(bench, missing, part, "removed blocks"), strict=True))
    latency = _time(bench, sets, rounds) if bench.world.is_main else [{} for _ in sets]
    compute, weights = _shares(bench.model, blocks), {block.name: _parameters(bench.model, block) for block in blocks}
    rows = []
    for each, times in zip(sets, latency, strict=True):
        names = tuple(block.name for block in each)
        share = None if compute is None else 1.0 - sum(compute[name] for name in names)
        left = bench.parameters - sum(weights[name] for name in names)
        metrics = {key: value for key, value in known[each].items() if key != "samples"}
        selected = {k: v for k, v in chosen[each].items() if k != "samples"} if each in chosen else None
        rows.append(Row(names, metrics, selected, share, left, times, empty_stage(bench.model, names)))
    world = bench.world
    yield BlockStudy(
        text=bench.subject.text,
        weights=bench.subject.weights,
        wanted=wanted,
        blocks=blocks,
        dataset=bench.data.dataset,
        split=part.name,
        selected_on=selection.name if chosen else "",
        could_test=bool(chosen) and part.name == "val" and _has_test(bench),
        samples=int(known[()]["samples"]),
        device=f"{world.device}" + (f" x {world.size}" if world.size > 1 else ""),
        precision=str(bench.precision).removeprefix("torch."),
        rows=rows,
        notes=(bench.note,) if bench.note else (),
    )


def _has_test(bench: Bench) -> bool:
    try:
        bench.part_of(replace(bench.request.data, split="test"))
    except ConfigError:
        return False
    return True


def _choose(
    bench: Bench, blocks: Sequence[ResidualBlock], part: Part, count: int | None
) -> dict[Set, dict[str, float]]:
    """The sets of greedy removal with their metrics, each one block larger; the whole model first.

    In each round the block goes without which top-1 is highest, among equal ones the loss lowest.
    """
    most = _most(blocks) if count is None else count
    gone: Set = ()
    found: dict[Set, dict[str, float]] = {}
    for number in range(1, most + 1):
        tried: list[Set] = [(*gone, block) for block in blocks if block.removable and block not in gone]
        asked = tried if found else [(), *tried]
        values = dict(zip(asked, _measure(bench, asked, part, f"block {number} of {most}"), strict=True))
        if not found:
            found[()] = values[()]
        gone = max(tried, key=lambda each: (values[each]["top1"], -values[each]["nll"]))
        found[gone] = values[gone]
        if count is None and found[gone]["top1"] < FLOOR * found[()]["top1"]:
            break
    return found


def _measure(bench: Bench, sets: Sequence[Set], part: Part, desc: str) -> list[dict[str, float]]:
    """Metrics of the model without each set of blocks, in one pass."""
    bench.evaluated.eval()

    def without(each: Set, images: Tensor) -> Tensor:
        with removed(each):
            return bench.evaluated(images)

    gathered = [evaluation_metrics() for _ in sets]
    for _, predictions in gathered:
        predictions.with_confusion = False
    found = evaluate_each(
        [partial(without, each) for each in sets],
        bench.batches(part, desc=desc),
        [metrics for metrics, _ in gathered],
        world=bench.world,
        autocast=bench.autocast(),
    )
    counts = [int(predictions.samples.sum()) for _, predictions in gathered]
    return [{**values, "samples": count} for values, count in zip(found, counts, strict=True)]


def _time(bench: Bench, sets: Sequence[Set], rounds: int) -> list[dict[int, Latency]]:
    """Latency of the model without each set of blocks: at batch 1 and at that of evaluation, in turns."""
    found: list[dict[int, Latency]] = [{} for _ in sets]
    shape, device = bench.spec.input_size, bench.world.device
    generator = torch.Generator().manual_seed(0)
    for batch in dict.fromkeys((1, bench.batch_size)):
        images = bench.to_input(torch.randn(batch, *shape, generator=generator))
        seconds: list[list[float]] = [[] for _ in sets]
        with torch.inference_mode(), bench.autocast():
            for each in sets:  # the first pass of any form is a slow one
                _seconds(bench.model, each, images, device)
            once = _seconds(bench.model, (), images, device)
            passes = max(1, min(_MOST_PASSES, round(_LEAST_SECONDS / once)))
            began = time.perf_counter()
            for number in range(rounds):
                for each, times in zip(sets, seconds, strict=True):
                    times.append(_seconds(bench.model, each, images, device, passes))
                if number + 1 >= _FEWEST_ROUNDS and time.perf_counter() - began > _MOST_SECONDS:
                    break
        for times, latency in zip(seconds, found, strict=True):
            # of paired rounds: what slows the machine down for a while slows both
            ratio = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
            latency[batch] = Latency(1000 * statistics.median(times), ratio)
    return found


def _seconds(model: Any, without: Set, images: Tensor, device: torch.device, passes: int = 1) -> float:
    """Of a forward pass, on average over some."""
    with removed(without):
        wait = torch.cuda.synchronize if device.type == "cuda" else contextlib.nullcontext
        wait()
        start = time.perf_counter()
        for _ in range(passes):
            model(images)
        wait()
        return (time.perf_counter() - start) / passes


def _shares(model: Any, blocks: Sequence[ResidualBlock]) -> dict[str, float] | None:
    """Each block's share of the model's compute; None where it cannot be counted."""
    try:
        macs = count_macs(model)
    except ValueError:
        return None
    shares = {block.name: macs.block(block) / macs.total for block in find_blocks(model)}
    return {block.name: shares[block.name] for block in blocks}


def _parameters(model: Any, block: ResidualBlock) -> int:
    return sum(p.numel() for p in model.get_submodule(block.name).parameters())
