"""What stochastic depth does in a model: rates asked for and realised, compute saved, and what looks wrong."""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from layers.drop_path import DropPath
from stochastic_depth.blocks import Block, NoBlocksError, check_input_size, find_blocks, unwrap
from stochastic_depth.compute import Macs, count_macs
from stochastic_depth.graft import GraftedDropPath, is_applied, role_of
from stochastic_depth.law import bounded
from stochastic_depth.places import (
    block_names,
    class_attention_blocks,
    find_owners,
    foreign_rate,
    functions,
    is_foreign,
    misplaced,
    unknown_modules,
)

NO_SHORTCUT = "no shortcut"
"""Mode of a foreign block that has a place for stochastic depth but no shortcut, so that nothing is dropped."""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def foreign_notes(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
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
    lines = [f"{_counted(count, 'drop-path module')}: {what}" for what, count in notes.items()]
    modules = (m for block in blocks for m in block.drop_paths.values())
    norms = sum(isinstance(m, GraftedDropPath) and m.mode == "skip" and m.skips and m.has_batch_norm for m in modules)
    if norms:
        lines.append(
            f"{norms} {'branch holds' if norms == 1 else 'branches hold'} a batch norm, which sees the kept samples "
            "only; a single kept sample is masked there"
        )
    if untouched := class_attention_blocks(model):
        lines.append(f"{_counted(untouched, 'class-attention block')}: left alone, as their authors do")
    parts = [m.parts for block in blocks for m in block.drop_paths.values()
             if isinstance(m, GraftedDropPath) and m.applied and m.parts > 1]  # fmt: skip
    if parts:
        lines.append(
            f"{len(parts)} drop-path modules: draw for each of {max(parts)} parts of an image, as their blocks do"
        )
    return lines


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
        width = max(map(len, ["block", *(b.name for b in self.blocks)]))
        lines = [f"{'block':<{width}}  nominal  realised  compute  mode"]
        for b in self.blocks:
            realised = "-" if b.realised_rate is None else f"{b.realised_rate:.4f}"
            share = "-" if b.compute_share is None else f"{b.compute_share:.1%}"
            lines.append(f"{b.name:<{width}}  {b.nominal_rate:>7.4f}  {realised:>8}  {share:>7}  {b.mode}")
        saved = "not counted" if self.compute_saved is None else f"{self.compute_saved:.1%}"
        lines.append(
            f"expected depth {self.expected_depth:.2f} of {_counted(len(self.blocks), 'block')}; "
            f"training compute saved {saved}"
        )
        lines += [f"warning: {w}" for w in self.warnings] + [f"note: {n}" for n in self.notes]
        return "\n".join(lines)


def drop_path_report(
    model: nn.Module, *, input_size: Sequence[int] | None = None, macs: Macs | None = None
) -> DropPathReport:
    """Reports nominal and realised rates per block, and what looks wrong.

    Args:
        model: As for `set_drop_path`.
        input_size: (C, H, W) for counting compute; where neither it nor the model tells, shares are left out.
        macs: Of `count_macs`, where they are known: they change with the model and its input only.

    Returns:
        The report; of a model in which nothing can be dropped, one without blocks that says so.

    Raises:
        ValueError: What was given is no model, or input_size no size.
    """
    inner = unwrap(model)
    check_input_size(input_size)
    problems, notes = [], []
    foreign = is_foreign(inner)
    if foreign:
        blocks, problems = _foreign_blocks(inner)
        notes.append("its own drop-path modules, which are not counted and not skipped; set_drop_path replaces them")
    else:
        try:
            blocks = find_blocks(model)
        except NoBlocksError as error:
            return DropPathReport([], 0.0, 0.0, _refused(functions(inner)), [str(error)])
        problems = _refused(functions(inner))
    try:
        macs = macs or count_macs(model, input_size)
    except ValueError as error:
        macs = None
        notes.append(f"compute not counted: {error}")
    rows = []
    all_modules = {id(m): m for block in blocks for m in block.drop_paths.values()}
    trained = any(m.samples_seen for m in all_modules.values())
    for block in blocks:
        modules = [m for m in block.drop_paths.values() if is_applied(m)]
        drawing = [m for m in modules if role_of(m) != "silent"]
        seen = sum(m.samples_seen for m in drawing)
        realised = sum(m.samples_dropped for m in drawing) / seen if seen else None
        share = saved = None
        if macs is not None and macs.total:
            share = macs.block(block) / macs.total
            left_out = {m: _share_left_out(m, modules, trained) for m in modules}
            for module in modules:  # a branch inside others' is not run where they are not
                others = (all_modules.get(number) for number in macs.around.get(id(module), ()))
                outer = [_share_left_out(other, [], trained) for other in others if other is not None]
                left_out[module] = 1.0 - (1.0 - left_out[module]) * math.prod(1.0 - part for part in outer)
            saved = sum(left_out[m] * macs.branch(m) for m in modules) / macs.total
        nominal = max((m.drop_prob for m in modules), default=0.0)
        rows.append(BlockReport(block.name, nominal, _describe_mode(modules), realised, share, saved))
    problems += _suspicions(inner, blocks, rows)
    # of another's modules it is a fault; ours have the rates that somebody asked for, in a list or by a profile's name
    (problems if foreign else notes).extend(_falls(rows))
    notes += _sharing(blocks, rows, problems) + foreign_notes(inner, blocks)
    expected_depth = math.fsum(1.0 - r.nominal_rate for r in rows)
    saved_total = None if macs is None else math.fsum(r.saved_share or 0.0 for r in rows)
    return DropPathReport(rows, expected_depth, saved_total, problems, notes)


def _share_left_out(module: DropPath, block: Sequence[DropPath], trained: bool) -> float:
    """Share of its samples that a branch was not run on; in expectation, unless the model was `trained` on some."""
    if role_of(module) == "silent":  # another one of the block draws for it
        module = next((m for m in block if role_of(m) == "block"), module)
    if module.samples_seen:
        return 1.0 - module.samples_computed / module.samples_seen
    return module.drop_prob if module.skips and not trained else 0.0


def _refused(unknown: Mapping[str, str]) -> list[str]:
    """What is said of modules and functions that stand in places for stochastic depth: by name, what it is."""
    return [
        f"{name}: {kind} is not known to drop whole samples; set_drop_path refuses it" for name, kind in unknown.items()
    ]


def _foreign_blocks(model: nn.Module) -> tuple[list[Block], list[str]]:
    """What a model's own drop-path modules say, as blocks of modules of ours that are not in the model."""
    owners, unknown = find_owners(model), unknown_modules(model)
    problems = _refused(unknown)
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
            if module.drop_prob == 0 or not is_applied(module) or role_of(module) == "silent":
                continue
            if model.training and module in set(model.modules()) and not module.training:
                problems.append(f"{name}: in eval mode while the model trains, so its rate is not applied")
            elif counted and not module.samples_seen:
                problems.append(f"{name}: has rate {module.drop_prob:g} but was never applied")
    return problems


def _falls(rows: Sequence[BlockReport]) -> list[str]:
    """Where rates fall with depth, in a line at most."""
    used = [r for r in rows if r.mode != NO_SHORTCUT]
    falls = [b.name for a, b in itertools.pairwise(used) if b.nominal_rate < a.nominal_rate - 1e-9]
    return [f"rates fall with depth at {falls[0]}{f' and {len(falls) - 1} more' * (len(falls) > 1)}"] if falls else []


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
        role = role_of(module)
        kinds.append("skip block" if module.skips and role in ("block", "silent") else
                     module.mode if module.skips else "mask")  # fmt: skip
    return (kinds[0] if len(set(kinds)) == 1 else "/".join(kinds)) if kinds else NO_SHORTCUT
