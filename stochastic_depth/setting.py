"""Stochastic depth of a whole model: setting its rates, following a schedule, and reporting what really happened."""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from layers.drop_path import BREAK_EVEN, MODES, DropPath, Mode, check_drop_prob
from layers.rates import Profile, RateIs, check_request, drop_path_rates
from layers.schedule import DropPathSchedule
from stochastic_depth.blocks import Block, _input_size, find_blocks, stage_depths, unwrap
from stochastic_depth.compute import count_macs
from stochastic_depth.graft import GraftedDropPath, graft, grafted
from stochastic_depth.law import bounded
from stochastic_depth.places import (
    block_names,
    class_attention_blocks,
    find_owners,
    foreign_rate,
    is_foreign,
    misplaced,
    unknown_modules,
)
from stochastic_depth.probe import mark_applied
from stochastic_depth.proof import convert_to_skip

NO_SHORTCUT = "no shortcut"
"""Mode of a foreign block that has a place for stochastic depth but no shortcut, so that nothing is dropped."""


@dataclass
class StochasticDepth:
    """The drop-path rates of a model and their schedule; what `set_drop_path` returns.

    Attributes:
        blocks: Residual blocks in order.
        rates: Nominal rate of each block.
        schedule: Multiplier of all rates over optimizer steps.
        notes: On a foreign model: what was changed, and what cannot skip and why.
    """

    blocks: list[Block]
    rates: list[float]
    schedule: DropPathSchedule = field(default_factory=DropPathSchedule)
    notes: list[str] = field(default_factory=list)

    def set_step(self, step: int) -> float:
        """Applies the schedule's multiplier of an optimizer step; returns the largest rate over blocks."""
        multiplier = self.schedule(step)
        for block in self.blocks:
            for module in block.drop_paths.values():
                module.multiplier = multiplier
        return max(self.rates) * multiplier


def set_drop_path(
    model: nn.Module,
    rate: float | None,
    *,
    profile: Profile = "linear",
    rate_is: RateIs = "max",
    mode: Mode | None = None,
    schedule: DropPathSchedule | None = None,
    break_even: float | Mapping[str, float] | None = None,
    input_size: Sequence[int] | None = None,
) -> StochasticDepth:
    """Sets the drop-path rates of a live model; a second call replaces the first, and 0 turns stochastic depth off.

    A timm or torchvision model is changed in place at the first call: its drop-path modules (or the identities that stand
    for rate 0) are replaced, see `stochastic_depth.proof`. Its state-dict keys and evaluation stay as they are.

    Args:
        model: Ours, or one of timm or torchvision, also inside DDP or torch.compile, built at any rate.
        rate: In [0, 1], a number of Python, NumPy or torch; what it measures is `rate_is`. `None` with a list as profile.
        profile: How rates follow depth; see `drop_path_rates`.
        rate_is: `max`, `mean` or `expected_macs`.
        mode: `mask`, `skip` or `batch`; `None` leaves each module's own.
        schedule: Multiplier over optimizer steps, applied by `StochasticDepth.set_step`; default constant.
        break_even: Rate from which mode `skip` skips instead of masking, for every branch or by kind of branch; those
            not named keep the constant of their kind (`layers.drop_path.BREAK_EVEN`).
        input_size: (C, H, W) for counting compute and for trying out how a foreign model can skip; default the model's
            `pretrained_cfg["input_size"]`, else (3, 224, 224).

    Returns:
        The blocks, their rates and the schedule, set to step 0.

    Raises:
        ValueError: A setting is wrong or cannot be reached, the model has no block to set, or a module where stochastic
            depth is expected does something else. The model is as it was then.
    """
    rate, profile = check_request(rate, profile, rate_is)
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if schedule is not None and not callable(schedule):
        raise ValueError(f"schedule must be a DropPathSchedule, got {schedule!r}")
    with _restored_on_error(unwrap(model)):
        blocks = _prepare(model, input_size)
        macs, total = None, None
        if rate_is == "expected_macs":
            counted = count_macs(model, input_size)
            macs, total = [counted.block(b) for b in blocks], counted.total
        rates = drop_path_rates(rate, stage_depths(model, blocks), profile, rate_is, block_macs=macs, total_macs=total)
        if any((mode or m.mode) != "mask" and not m.tried for m in grafted(unwrap(model))):
            _try_out(convert_to_skip, unwrap(model), input_size)
        thresholds = _break_even_by_kind(blocks, break_even)
        for block, block_rate in zip(blocks, rates, strict=True):
            for module in block.drop_paths.values():
                if mode is not None:
                    module.mode = mode
                module.break_even = thresholds.get(module.kind, BREAK_EVEN.get(module.kind, 0.0))
                module.drop_prob = block_rate
                module.multiplier = 1.0
                module.reset_counts()
        result = StochasticDepth(blocks, rates, schedule or DropPathSchedule(), _foreign_notes(unwrap(model), blocks))
        result.set_step(0)
    return result


def _prepare(model: nn.Module, input_size: Sequence[int] | None) -> list[Block]:
    """The blocks of a model, after replacing what is not ours; refuses places where nothing can be dropped.

    Raises:
        ValueError: There is no block to set, or one that is given something else than samples.
    """
    inner = unwrap(model)
    if is_foreign(inner):
        graft(inner)
        _try_out(mark_applied, inner, input_size)
    blocks = find_blocks(model)
    if not any(getattr(m, "applied", True) for block in blocks for m in block.drop_paths.values()):
        raise ValueError(
            f"{type(inner).__name__} has places for stochastic depth only in blocks without a shortcut "
            f"({blocks[0].name}{', ...' * (len(blocks) > 1)}), where nothing can be dropped"
        )
    for block in blocks:
        for key, module in block.drop_paths.items():
            if isinstance(module, GraftedDropPath) and module.applied and module.batch_dim is None:
                raise ValueError(
                    f"{block.name}.{key}: no dimension of what it is given grows with the number of images, so that "
                    "there are no samples to drop; put nn.Identity under another name there"
                )
    return blocks


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Puts back modules, hooks and settings of a model if anything goes wrong inside."""
    before = [(module, dict(vars(module)), {k: v.copy() for k, v in vars(module).items() if isinstance(v, dict)})
              for module in model.modules()]  # fmt: skip
    # rates and counts of drop-path modules are tensors that are changed in place
    tensors = [(v, v.clone()) for module, attributes, _ in before if isinstance(module, DropPath)
               for v in attributes.values() if isinstance(v, Tensor)]  # fmt: skip
    try:
        yield
    except BaseException:
        for module, attributes, dicts in before:
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in dicts.items():
                attributes[key].clear()
                attributes[key].update(content)
        for tensor, value in tensors:
            tensor.copy_(value)
        raise


def _try_out(probe: Callable[[nn.Module, Sequence[int]], object], model: nn.Module, size: Sequence[int] | None) -> None:
    size = size or _input_size(model) or (3, 224, 224)
    try:
        probe(model, size)
    except Exception as error:  # somebody's model may raise anything
        raise ValueError(
            f"{type(model).__name__}: a forward pass on images of {tuple(size)} failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give input_size=(C, H, W)"
        ) from error


def _foreign_notes(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """What became of the drop-path modules of a foreign model, a line per kind."""
    notes: dict[str, int] = {}
    for block in blocks:
        for module in block.drop_paths.values():
            if isinstance(module, GraftedDropPath) and module.role != "silent":
                if not module.applied:
                    what = "without effect: its block has no shortcut"
                elif module.mode == "mask" or not module.tried:
                    what = f"mode {module.mode}"
                elif module.role == "mask":
                    what = f"masks, since {module.reason}"
                elif not module.skips:
                    what = "masks, below the break-even rate of such a branch"
                else:
                    what = f"skips per {module.role}" + (f", since {module.reason}" if module.reason else "")
                notes[what] = notes.get(what, 0) + 1
    lines = [f"{count} drop-path modules: {what}" for what, count in notes.items()]
    modules = (m for block in blocks for m in block.drop_paths.values())
    norms = sum(isinstance(m, GraftedDropPath) and m.mode == "skip" and m.skips and m.has_batch_norm for m in modules)
    if norms:
        lines.append(
            f"{norms} branches hold a batch norm, which sees the kept samples only; a single kept sample is masked there"
        )
    if untouched := class_attention_blocks(model):
        lines.append(f"{untouched} class-attention blocks: left alone, as their authors do")
    parts = [m.parts for block in blocks for m in block.drop_paths.values()
             if isinstance(m, GraftedDropPath) and m.applied and m.parts > 1]  # fmt: skip
    if parts:
        lines.append(
            f"{len(parts)} drop-path modules: draw for each of {max(parts)} parts of an image, as their blocks do"
        )
    return lines


def break_even_of(blocks: Sequence[Block]) -> dict[str, float]:
    """The break-even rate in force for each kind of branch in a model."""
    return {m.kind: m.break_even for block in blocks for m in block.drop_paths.values()}


def _break_even_by_kind(blocks: Sequence[Block], given: float | Mapping[str, float] | None) -> dict[str, float]:
    kinds = sorted(break_even_of(blocks))
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(kinds, check_drop_prob(given, "break_even"))
    unknown = [kind for kind in given if kind not in kinds]
    if unknown:
        raise ValueError(f"break_even: no branch of kind {unknown[0]!r}; this model has {', '.join(kinds)}")
    return {kind: check_drop_prob(rate, f"break_even of {kind}") for kind, rate in given.items()}


@dataclass(frozen=True)
class BlockReport:
    """One line of the report."""

    name: str
    nominal_rate: float
    mode: str
    realised_rate: float | None  # None before the first training step
    compute_share: float | None  # of the model's forward pass; None where it could not be counted
    saved_share: (
        float | None
    )  # of the model's forward pass: not computed since the rates were set; before, in expectation


@dataclass(frozen=True)
class DropPathReport:
    """What stochastic depth does in a model; `str()` of it is a table.

    Attributes:
        blocks: One entry per residual block, in order.
        expected_depth: Blocks that a sample passes in expectation.
        compute_saved: Share of the forward pass that was not computed since the rates were set, or, before the first
            training step, will not be in expectation at the nominal rates; `None` if unknown.
        warnings: What looks wrong.
        notes: What is worth knowing.
    """

    blocks: list[BlockReport]
    expected_depth: float
    compute_saved: float | None
    warnings: list[str]
    notes: list[str]

    def to_csv(self) -> str:
        """Columns block, name, nominal_rate, mode, realised_rate, compute_share, saved_share."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["block", "name", "nominal_rate", "mode", "realised_rate", "compute_share", "saved_share"])
        for i, b in enumerate(self.blocks):
            numbers = ["" if v is None else f"{v:.6g}" for v in (b.realised_rate, b.compute_share, b.saved_share)]
            writer.writerow([i, b.name, f"{b.nominal_rate:.6g}", b.mode, *numbers])
        return out.getvalue()

    def __str__(self) -> str:
        width = max(len("block"), *(len(b.name) for b in self.blocks))
        lines = [f"{'block':<{width}}  nominal  realised  compute  mode"]
        for b in self.blocks:
            realised = "-" if b.realised_rate is None else f"{b.realised_rate:.4f}"
            share = "-" if b.compute_share is None else f"{b.compute_share:.1%}"
            lines.append(f"{b.name:<{width}}  {b.nominal_rate:>7.4f}  {realised:>8}  {share:>7}  {b.mode}")
        saved = "not counted" if self.compute_saved is None else f"{self.compute_saved:.1%}"
        lines.append(
            f"expected depth {self.expected_depth:.2f} of {len(self.blocks)} blocks; training compute saved {saved}"
        )
        lines += [f"warning: {w}" for w in self.warnings] + [f"note: {n}" for n in self.notes]
        return "\n".join(lines)


def drop_path_report(model: nn.Module, *, input_size: Sequence[int] | None = None) -> DropPathReport:
    """Reports nominal and realised rates per block, and what looks wrong.

    Args:
        model: As for `set_drop_path`.
        input_size: (C, H, W) for counting compute; where neither it nor the model tells, shares are left out.

    Raises:
        ValueError: The model has no block with a DropPath.
    """
    inner = unwrap(model)
    problems, notes = [], []
    if is_foreign(inner):
        blocks, problems = _foreign_blocks(inner)
        notes.append("its own drop-path modules, which are not counted and not skipped; set_drop_path replaces them")
    else:
        blocks = find_blocks(model)
    try:
        macs = count_macs(model, input_size)
    except ValueError as error:
        macs = None
        notes.append(f"compute not counted: {error}")
    rows = []
    for block in blocks:
        modules = [m for m in block.drop_paths.values() if getattr(m, "applied", True)]
        drawing = [m for m in modules if getattr(m, "role", "") != "silent"]
        seen = sum(m.samples_seen for m in drawing)
        realised = sum(m.samples_dropped for m in drawing) / seen if seen else None
        share = saved = None
        if macs is not None and macs.total:
            share = macs.block(block) / macs.total
            saved = sum(_share_left_out(m, modules) * macs.branch(m) for m in modules) / macs.total
        nominal = max((m.drop_prob for m in modules), default=0.0)
        rows.append(BlockReport(block.name, nominal, _describe_mode(modules), realised, share, saved))
    problems += _suspicions(inner, blocks, rows)
    notes += _sharing(blocks, rows, problems) + _foreign_notes(inner, blocks)
    expected_depth = math.fsum(1.0 - r.nominal_rate for r in rows)
    saved_total = None if macs is None else math.fsum(r.saved_share or 0.0 for r in rows)
    return DropPathReport(rows, expected_depth, saved_total, problems, notes)


def _share_left_out(module: DropPath, block: Sequence[DropPath]) -> float:
    """Share of its samples that a branch was not run on; before the first training step, in expectation."""
    if getattr(module, "role", "") == "silent":  # another one of the block draws for it
        module = next(m for m in block if getattr(m, "role", "") == "block")
    if module.samples_seen:
        return 1.0 - module.samples_computed / module.samples_seen
    return module.drop_prob if module.skips else 0.0


def _foreign_blocks(model: nn.Module) -> tuple[list[Block], list[str]]:
    """What a model's own drop-path modules say, as blocks of modules of ours that are not in the model."""
    owners, unknown = find_owners(model), unknown_modules(model)
    problems = [
        f"{name}: {kind} is not known to drop whole samples; set_drop_path refuses it" for name, kind in unknown.items()
    ]
    blocks: dict[str, Block] = {}
    for owner, name in zip(owners, block_names(owners), strict=True):
        block = blocks.setdefault(name, Block(name, {}))
        if misplaced(owner):
            kind = type(owner.module).__name__
            problems.append(f"{owner.name}: {kind} drops its input, not its branch; set_drop_path mends that")
        for key, child in owner.slots.items():
            if f"{owner.name}.{key}".lstrip(".") in unknown:
                continue
            rate = foreign_rate(child)
            if not 0.0 <= rate <= 1.0:
                problems.append(f"{owner.name}.{key}: rate {rate} is outside [0, 1]")
            block.drop_paths[f"{owner.name}.{key}"] = DropPath(bounded(rate))
    return list(blocks.values()), problems


def _suspicions(model: nn.Module, blocks: Sequence[Block], rows: Sequence[BlockReport]) -> list[str]:
    """What looks wrong in the modules that are there."""
    problems = []
    counted = any(r.realised_rate is not None for r in rows)
    for block in blocks:
        for key, module in block.drop_paths.items():
            name = f"{block.name}.{key}"
            if not 0.0 <= float(module._rate) <= 1.0:
                problems.append(f"{name}: rate {float(module._rate):g} is outside [0, 1]")
            if module.drop_prob == 0 or not getattr(module, "applied", True) or getattr(module, "role", "") == "silent":
                continue
            if model.training and module in set(model.modules()) and not module.training:
                problems.append(f"{name}: in eval mode while the model trains, so its rate is not applied")
            elif counted and not module.samples_seen:
                problems.append(f"{name}: has rate {module.drop_prob:g} but was never applied")
    used = [r for r in rows if r.mode != NO_SHORTCUT]
    falls = [b.name for a, b in itertools.pairwise(used) if b.nominal_rate < a.nominal_rate - 1e-9]
    if falls:
        problems.append(f"rates fall with depth at {falls[0]}{f' and {len(falls) - 1} more' * (len(falls) > 1)}")
    return problems


def _sharing(blocks: Sequence[Block], rows: Sequence[BlockReport], problems: list[str]) -> list[str]:
    """Notes on modules used in several places; where they should differ, a problem is added."""
    users: dict[int, list[str]] = {}
    for block in blocks:
        for module in {id(m) for m in block.drop_paths.values()}:
            users.setdefault(module, []).append(block.name)
    shared = [names for names in users.values() if len(names) > 1]
    if shared and len({r.nominal_rate for r in rows}) > 1:
        problems.append(f"one DropPath serves {', '.join(shared[0][:3])}: these blocks cannot have rates of their own")
    elif shared:
        return [f"one DropPath serves {len(shared[0])} blocks"]
    return []


def _describe_mode(modules: Sequence[DropPath]) -> str:
    """The mode of a block's branches; `skip/mask` where one of them masks, `block` where they are skipped together."""
    kinds = []
    for module in modules:
        role = getattr(module, "role", "")
        kinds.append("skip block" if module.skips and role in ("block", "silent") else
                     module.mode if module.skips else "mask")  # fmt: skip
    return (kinds[0] if len(set(kinds)) == 1 else "/".join(kinds)) if kinds else NO_SHORTCUT
