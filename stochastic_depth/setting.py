"""Stochastic depth of a whole model: setting its rates, following a schedule, and reporting what really happened."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layers.drop_path import BREAK_EVEN, MODES, DropPath, Mode
from layers.rates import Profile, RateIs, check_choice, check_drop_prob, check_request, drop_path_rates, nearest
from layers.schedule import DropPathSchedule
from stochastic_depth.blocks import (
    Block,
    NoBlocksError,
    check_input_size,
    find_blocks,
    model_input_size,
    stage_depths,
    unwrap,
)
from stochastic_depth.compute import count_macs
from stochastic_depth.graft import GraftedDropPath, apply_again, graft, grafted, is_applied
from stochastic_depth.places import functions, is_foreign
from stochastic_depth.probe import mark_applied
from stochastic_depth.proof import convert_to_skip
from stochastic_depth.report import foreign_notes


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
        return max(self.rates, default=0.0) * multiplier


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
        ValueError: A setting is wrong or cannot be reached, the model has no block to set (`NoBlocksError`), or a module
            where stochastic depth is expected does something else, or a foreign model is on the meta device, where modes
            `skip` and `batch` cannot be tried out. The model is as it was then.
    """
    rate, profile = check_request(rate, profile, rate_is)
    if mode is not None:
        check_choice(mode, MODES, "mode")
    check_input_size(input_size)
    if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
        raise ValueError(f"schedule must be a DropPathSchedule, got {schedule!r}")
    with torch.inference_mode(False), _restored_on_error(unwrap(model)):  # trials need gradients
        blocks = _prepare(model, input_size)
        macs, total = None, None
        if rate_is == "expected_macs":
            counted = count_macs(model, input_size)
            macs, total = [counted.block(b) for b in blocks], counted.total
        rates = drop_path_rates(rate, stage_depths(model, blocks), profile, rate_is, block_macs=macs, total_macs=total)
        if any((mode or m.mode) != "mask" and not m.tried for m in grafted(unwrap(model))):
            _refuse_without_numbers(unwrap(model))
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
        result = StochasticDepth(blocks, rates, schedule or DropPathSchedule(), foreign_notes(unwrap(model), blocks))
        result.set_step(0)
    return result


def _prepare(model: nn.Module, input_size: Sequence[int] | None) -> list[Block]:
    """The blocks of a model, after replacing what is not ours; refuses places where nothing can be dropped.

    Raises:
        NoBlocksError: There is no block to set.
        ValueError: There is one that is given something else than samples.
    """
    inner = unwrap(model)
    apply_again(inner)
    if is_foreign(inner) or functions(inner):  # which are refused
        graft(inner)
        _try_out(mark_applied, inner, input_size)
    blocks = find_blocks(model)
    if not any(is_applied(m) for block in blocks for m in block.drop_paths.values()):
        raise NoBlocksError(
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


def _refuse_without_numbers(model: nn.Module) -> None:
    """
    Raises:
        ValueError: The model is on the meta device, so that no trial of it would tell anything.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if on_meta := next((name for name, tensor in tensors if tensor.is_meta), None):
        raise ValueError(
            f"{type(model).__name__}: {on_meta} is on the meta device, where blocks cannot be tried out for mode 'skip' or "
            "'batch'; give it numbers first (model.to_empty(device=...), then its weights), or set mode='mask'"
        )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Puts back modules, hooks and settings of a model if anything goes wrong inside."""
    before = [(module, dict(vars(module)), {k: v.copy() for k, v in vars(module).items() if isinstance(v, dict)})
              for module in model.modules()]  # fmt: skip
    # what drop-path modules hold beside: rates, which are tensors that are changed in place, counts, and hooks
    tensors = [(v, v.clone()) for module, attributes, _ in before if isinstance(module, DropPath)
               for v in attributes.values() if isinstance(v, Tensor)]  # fmt: skip
    counts = [(module, (module.samples_seen, module.samples_dropped, module.samples_computed))
              for module, *_ in before if isinstance(module, DropPath)]  # fmt: skip
    hooks = [(module.hooks, module.hooks.state()) for module in grafted(model)]
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
        for module, numbers in counts:
            module.set_counts(*numbers)
        for of_module, state in hooks:
            of_module.restore(state)
        raise


def _try_out(probe: Callable[[nn.Module, Sequence[int]], object], model: nn.Module, size: Sequence[int] | None) -> None:
    size = size or model_input_size(model) or (3, 224, 224)
    try:
        probe(model, size)
    except Exception as error:  # somebody's model may raise anything
        raise ValueError(
            f"{type(model).__name__}: a forward pass on images of {tuple(size)} failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give input_size=(C, H, W)"
        ) from error


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
        hint = nearest(unknown[0], kinds)
        raise ValueError(f"break_even: no branch of kind {unknown[0]!r}; this model has {', '.join(kinds)}{hint}")
    return {kind: check_drop_prob(rate, f"break_even of {kind}") for kind, rate in given.items()}
