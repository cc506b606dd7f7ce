"""Stochastic depth in residual blocks that are not ours, timm's and torchvision's: the one file that knows such blocks.

Their drop-path modules are found by class name and by attribute name, also where an identity (or nothing) stands for
rate 0. What such a module does (its rate, scaling, one draw per sample or per batch) is found by running a copy of it, and
it is replaced by a `GraftedDropPath` that does the same; one that does something else is refused by name. Blocks that have
no place for one, or a wrong one, get it behind the last module of each branch (`BRANCH_ENDS`). A block's own forward is
left alone. To skip, the kept samples are selected in a hook in front of the first module of a branch, and the grafted
module at the branch's end scatters the result into zeros of the full batch. Where a branch begins is found by watching a
forward pass in training mode, and every conversion is then run against masking with the same kept set, outputs and
gradients, in float32 on a copy with randomised scales. What does not agree falls back to skipping the whole block, and
what does not agree then is masked. Nothing is installed that has not agreed exactly as it is installed.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.graft import Entry, GraftedDropPath, Parts, Role, grafted, hook_block, hook_branch
from stochastic_depth.law import full_precision, undisturbed
from stochastic_depth.places import Owner, find_owners
from stochastic_depth.probe import Call, SlotCall, clone, in_float32, structure, watch_calls

TOLERANCE = 1e-4  # of float32, in which conversions are tried


@dataclass
class Conversion:
    """How one owner's drop-path modules skip, and why not more."""

    owner: str
    roles: dict[str, Role] = field(default_factory=dict)
    reason: str = ""


def convert_to_skip(model: nn.Module, input_size: Sequence[int]) -> list[Conversion]:
    """Finds out, by execution, how the grafted modules of a model can skip, and installs the hooks.

    Owners of one structure are tried once. Random states, training flags and weights are left as they were.

    Args:
        model: After `graft`.
        input_size: (C, H, W) of a probe batch.

    Returns:
        What was found, one entry per owner.
    """
    owners = [o for o in find_owners(model) if all(isinstance(s, GraftedDropPath) for s in o.slots.values())]
    with undisturbed(model), full_precision(next(model.parameters()).device):
        calls = watch_calls(model, [owner for owner in owners if not owner.beside], input_size)
        found: dict[Any, dict[str, Any]] = {}
        conversions = []
        for owner in owners:
            conversion = Conversion(owner.beside or owner.name)
            if owner.beside:
                _install(owner, {"reason": "it stands beside its block, not in it"}, conversion)
            elif owner.name not in calls:
                _install(owner, {"reason": "not called in a forward pass"}, conversion)
            elif dims := {slot.batch_dim for slot in owner.slots.values() if isinstance(slot, GraftedDropPath)} - {0}:
                _install(owner, {"reason": f"samples lie in dimension {dims.pop()} there, behind tokens"}, conversion)
            else:
                call = calls[owner.name]
                key = (*structure(owner.module), *call.shapes)
                if key not in found:
                    found[key] = _try(owner, call)
                    found[key]["takes_nothing"] = _taking_nothing(owner, call, found[key])
                _install(owner, found[key], conversion)
            conversions.append(conversion)
    return conversions


class _FixedDraw(GraftedDropPath):
    """For trials: keeps samples 0 and 2 of every three."""

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        kept = [i for i in reversed(range(batch)) if i % 3 != 1]
        return torch.tensor(len(kept)), torch.tensor(kept + list(range(1, batch, 3)), device=device)

    def _draw_mask(self, x: Tensor) -> Tensor:
        return (torch.arange(len(x), device=x.device) % 3 != 1) | (self.drop_prob == 0.0)


class _NothingKept(_FixedDraw):
    """For trials: keeps none, and hands on an empty batch."""

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        self.takes_nothing = True
        return torch.tensor(0), torch.arange(batch, device=device)

    def _draw_mask(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.drop_prob == 0.0, device=x.device)


def _try(owner: Owner, call: Call) -> dict[str, Any]:
    """How an owner of this structure can skip: the first module of each branch, or the block, or a reason."""
    if call.times > 1:
        return {"reason": "called more than once in a forward pass"}
    unused = [slot for slot in owner.slots if slot not in call.slots]
    if unused:
        return {"reason": f"{', '.join(unused)} is not applied: the block has no shortcut"}
    entries: dict[str, list[Entry]] = {}
    kinds: dict[str, str] = {}
    whole = True
    for slot in owner.slots:
        found: list[Entry] = []
        for slot_call in call.slots[slot]:
            for i, entry in enumerate(slot_call.entries):
                if not _disagreement(owner, call, {slot: [entry]}):
                    found.append(entry)
                    # what was called before may belong to the branch: a norm behind the attention would agree as well
                    whole = whole and not any(_has_matrix(owner.module, e.part) for e in slot_call.entries[:i])
                    break
            else:
                alone = [replace(e, alone=True) for e in slot_call.entries if _has_matrix(owner.module, e.part)]
                if alone and not _disagreement(owner, call, {slot: alone[:1]}):
                    found.append(alone[0])
                    whole = whole and all(e.part.startswith(f"{alone[0].part}.") for e in alone[1:])
        if len(found) == len(call.slots[slot]):
            entries[slot] = found
            begins = zip(found, call.slots[slot], strict=True)
            kinds[slot] = (
                "" if any(_has_matrices(owner, first, slot_call) for first, slot_call in begins) else "pooling"
            )
    complete = len(entries) == len(owner.slots)
    if whole and complete and not _disagreement(owner, call, entries):
        return {"entries": entries, "kinds": kinds}
    failure = _disagreement(owner, call, None)
    if not failure:
        return {"block": True, "reason": "its branches cannot be skipped one by one"}
    agreed: dict[str, list[Entry]] = {}  # as many branches as agree together
    for slot, found in entries.items():
        if not _disagreement(owner, call, {**agreed, slot: found}):
            agreed[slot] = found
    often = [f"{slot} is called {len(calls)} times" for slot, calls in call.slots.items() if len(calls) > 1]
    why = "; ".join([*often, f"neither branches nor block agree with masking: {failure}"])
    return {"entries": agreed, "kinds": kinds, "reason": why if len(agreed) < len(owner.slots) else ""}


def _taking_nothing(owner: Owner, call: Call, found: dict[str, Any]) -> set[str]:
    """The slots whose branch, or block, takes an empty batch and gives every parameter its zero gradient then."""
    if found.get("block"):
        return set() if _disagreement(owner, call, None, draw=_NothingKept) else set(owner.slots)
    entries: dict[str, list[Entry]] = found.get("entries", {})
    return {slot for slot in entries if not _disagreement(owner, call, {slot: entries[slot]}, draw=_NothingKept)}


def _has_matrices(owner: Owner, first: Entry, slot_call: SlotCall) -> bool:
    """Whether a branch that begins at `first` holds a matrix; one that holds none is as cheap as pooling."""
    parts = [entry.part for entry in slot_call.entries]
    return any(_has_matrix(owner.module, part) for part in parts[parts.index(first.part) :])


def _has_matrix(module: nn.Module, part: str) -> bool:
    return any(p.ndim > 1 and min(p.shape[:2]) > 1 for p in module.get_submodule(part).parameters())


def _disagreement(
    owner: Owner, call: Call, entries: dict[str, list[Entry]] | None, draw: type[_FixedDraw] = _FixedDraw
) -> str:
    """Runs a copy in float32, skipping and masking with the same kept set; returns what differs, or an empty string.

    `entries` gives the first module of the branches to skip, while the others are masked; `None` skips the block. `draw`
    says which samples those to be skipped keep.
    """
    trial = in_float32(copy.deepcopy(owner.module)).train()
    own = [trial.get_submodule(slot) for slot in owner.slots]
    for module in trial.modules():
        still = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, DropPath)
        if isinstance(module, still) and module not in own:
            module.eval()  # statistics and random streams of other batches are not what is compared
    with torch.no_grad():
        for parameter in trial.parameters():
            if (
                parameter.ndim <= 1
                or parameter.numel() == parameter.shape[-1]
                or max(parameter.shape) == parameter.numel()
            ):
                parameter.uniform_(0.5, 1.5)  # a layer scale of 1e-6 would hide any error
    for slot, module in zip(owner.slots, own, strict=True):
        assert isinstance(module, GraftedDropPath)
        skipped = entries is None or slot in entries
        module.__class__ = draw if skipped else _FixedDraw
        module.mode, module.role = "skip" if skipped else "mask", "mask"
        module.drop_prob = 0.5
    try:
        expected = _run(trial, call)
    except Exception as error:  # somebody's code may raise anything
        return f"masking failed with {type(error).__name__}"
    if entries is None:
        hook_block(trial, list(grafted(trial)))
    else:
        for slot, found in entries.items():
            module = trial.get_submodule(slot)
            assert isinstance(module, GraftedDropPath)
            hook_branch(trial, found, module)
    try:
        result = _run(trial, call)
    except Exception as error:
        return f"{type(error).__name__} when given the kept samples only"
    # a gradient that is 0 but for rounding (of a key's bias, say) is compared with what rounding amounts to
    noise = 0.01 * max(float(b.abs().max()) for b in expected if b is not None)
    for a, b in zip(result, expected, strict=True):
        if (a is None) != (b is None):
            return "another gradient is missing"
        if a is None or b is None:
            continue
        limit = TOLERANCE * (float(b.abs().max()) + noise)
        if a.shape != b.shape or not bool(((a - b).abs() <= limit).all()):
            return "outputs or gradients differ"
    return ""


def _run(module: nn.Module, call: Call) -> list[Tensor | None]:
    """Output, and the gradients of a fixed random projection of it, of inputs and parameters."""
    args, kwargs = clone(call.args, grad=True), clone(call.kwargs, grad=True)
    with torch.enable_grad():
        returned = module(*args, **kwargs)
        outs = [out for out in (returned if isinstance(returned, (tuple, list)) else [returned]) if _has_gradient(out)]
        if not outs:
            raise TypeError("the block returns no tensor")
        generator = torch.Generator().manual_seed(1)
        projected = [(out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outs]
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        inputs += [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(torch.stack(projected).sum(), inputs, allow_unused=True)
    return [*(out.detach() for out in outs), *gradients]


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _install(owner: Owner, found: dict[str, Any], conversion: Conversion) -> None:
    slots = {key: s for key, s in owner.slots.items() if isinstance(s, GraftedDropPath)}
    conversion.reason = found.get("reason", "")
    for key, slot in slots.items():
        slot.tried, slot.reason = True, conversion.reason
        slot.takes_nothing = key in found.get("takes_nothing", ())
    if found.get("block"):
        hook_block(owner.module, list(slots.values()))
    else:
        entries = found.get("entries", {})
        for key, slot in slots.items():
            if key in entries:
                hook_branch(owner.module, entries[key], slot)
                slot.kind, slot.reason = found["kinds"][key], ""
    conversion.roles = {key: slot.role for key, slot in slots.items()}


class MaskingDraw(GraftedDropPath):
    """Applies the draw of a skipped branch or block as a mask: the same samples, everything computed."""

    def select(self, x: Tensor, parts: Parts, groups: int = 1) -> None:
        super().select(x, parts, groups)
        if self._draw is not None:
            self._draw = self._draw.as_mask()


def masking_twin(model: nn.Module) -> nn.Module:
    """A copy of a foreign model that draws as it does and masks where it skips."""
    twin = copy.deepcopy(model)
    for module in grafted(twin):
        module.__class__ = MaskingDraw
    return twin


def randomise_scales(model: nn.Module) -> None:
    """Draws biases, norm weights and layer scales from [0.5, 1.5]: at 1e-6, 0 or 1 they would hide any error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.uniform_(0.5, 1.5)


def skip_deviation(model: nn.Module, images: Tensor) -> float:
    """Largest relative deviation of outputs and gradients between skipping and masking the same samples."""
    results = []
    for other in (model, masking_twin(model)):
        other.zero_grad()
        torch.manual_seed(1)
        out = other(images)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in other.parameters())])
    noise = 0.01 * max(float(b.abs().max()) for b in results[1] if b is not None)
    worst = 0.0
    for a, b in zip(*results, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and b is not None:
            worst = max(worst, float((a - b).abs().max()) / (float(b.abs().max()) + noise))
    return float(f"{worst:.2g}")
