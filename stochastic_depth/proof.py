"""How others' residual blocks skip, tried out and proven: `verify_skip`, and a plan for each structure of block.

Places for stochastic depth are found by `stochastic_depth.places`, modules put there by `stochastic_depth.graft`, and a
block's own forward is left alone. To skip, the kept samples are selected in a hook in front of the first module of a branch,
and the grafted module at the branch's end scatters the result into zeros of the full batch. Where a branch begins is found by
watching a forward pass in training mode, and every plan is then run against masking with the same kept set, outputs and
gradients, in float32 on a copy with randomised scales. What does not agree falls back to skipping the whole block, and
what does not agree then is masked. Nothing is installed that has not agreed exactly as it is installed.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layers.branches import takes_batch_statistics
from layers.drop_path import DropPath
from stochastic_depth.blocks import unwrap
from stochastic_depth.graft import Entry, GraftedDropPath, beside_samples, hook_block, hook_branch
from stochastic_depth.law import full_precision, undisturbed
from stochastic_depth.places import Owner, find_owners
from stochastic_depth.probe import Call, SlotCall, clone, in_float32, watch_calls
from stochastic_depth.standing import Standing
from stochastic_depth.structure import outline, structure

TOLERANCE = 1e-4  # of float32, in which conversions are tried


@dataclass(frozen=True)
class Plan:
    """How the drop-path modules of one structure of block skip, and why not more.

    Attributes:
        entries: By slot, where its branches begin; slots that are not named mask.
        kinds: By slot, what its branches compute (`layers.drop_path.BREAK_EVEN`).
        block: The block is skipped as a whole.
        takes_nothing: Slots whose code takes an empty batch, and gives every parameter its zero gradient then.
        reason: Why not all branches skip one by one.
    """

    entries: Mapping[str, Sequence[Entry]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    block: bool = False
    takes_nothing: frozenset[str] = frozenset()
    reason: str = ""


def verify_skip(model: nn.Module, images: "Tensor | Call", *, seed: int = 0) -> float:
    """Largest deviation between a model that skips and the same model that masks the same samples.

    Output, and the gradients of a fixed random projection of it with regard to images and parameters; each deviation
    relative to the largest value of its tensor. Batch norms and dropout should be in evaluation: statistics and draws of
    a smaller batch are others. A layer scale of 1e-6 would hide any error, see `randomise_scales`.

    Args:
        model: Ours or a foreign one after `set_drop_path`, in training; a copy of it runs, so it is left as it is.
        images: (B, C, H, W); or a call of a block.
        seed: Of the draws.

    Returns:
        The deviation, about 1e-6 in float32 where skipping is right; infinite where one form gives a tensor no gradient
        or not as many outputs, NaN where the other numbers cannot be compared.

    Raises:
        ValueError: There is nothing to verify: no drop-path module drops in mode `skip` or `batch`, or there are no
            images.
        TypeError: The model returns no tensor, nor a list, tuple, dict or dataclass with one in it.
    """
    if nothing := _nothing_to_verify(unwrap(model)):
        raise ValueError(f"verify_skip: nothing to verify in {type(model).__name__}: {nothing}")
    call = images if isinstance(images, Call) else Call((images,), {})
    with torch.inference_mode(False):  # a copy of which gradients can be taken
        model = copy.deepcopy(model)
    results = []
    for masks in (True, False):
        for module in model.modules():
            if isinstance(module, DropPath):
                module.masks_all = masks
        with undisturbed(model, seed):
            results.append(_run(model, call))
    expected, got = results
    if [v is None for v in got] != [v is None for v in expected]:
        return math.inf
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None]
    if any(a.shape != b.shape for a, b in pairs):
        return math.nan
    pairs = [(_numbers(a), _numbers(b)) for a, b in pairs if b.numel()]
    # a gradient that is 0 but for rounding (of a key's bias, say) is compared with what rounding amounts to
    noise = 0.01 * max(float(b.abs().max()) for _, b in pairs)
    found = [(float((a - b).abs().max()), float(b.abs().max()) + noise) for a, b in pairs]
    return float(torch.tensor([off / size if off else 0.0 for off, size in found]).max())  # of NaN: NaN


def _nothing_to_verify(model: nn.Module) -> str:
    """Why skipping and masking cannot differ in a model, and what to do; an empty text where they can."""
    modules = [m for m in model.modules() if isinstance(m, DropPath)]
    if not modules:
        return 'it holds no DropPath; call set_drop_path(model, rate, mode="skip") first'
    if not any(m.training for m in modules):
        return "its drop-path modules are in evaluation, where nothing is dropped; call model.train() first"
    if all(m.mode == "mask" for m in modules):
        return "its drop-path modules are in mode 'mask'; call set_drop_path(model, rate, mode=\"skip\") first"
    if not any(m.training and m.mode != "mask" and m.rate > 0.0 for m in modules):
        return (
            "the rate of its drop-path modules is 0 where they are in training and mode 'skip' or 'batch'; set a rate"
        )
    return ""


def convert_to_skip(model: nn.Module, input_size: Sequence[int]) -> dict[str, Plan]:
    """Finds out, by execution, how the grafted modules of a model can skip, and installs the hooks.

    Owners of one structure are tried once. Those that an earlier call has looked at keep what they have: a trial of a block
    with hooks would prove nothing. Random states, training flags and weights are left as they were.

    Args:
        model: After `graft`.
        input_size: (C, H, W) of a probe batch.

    Returns:
        What was found, by owner that was tried.
    """
    owners = [o for o in find_owners(model) if all(isinstance(s, GraftedDropPath) for s in o.slots.values())]
    owners = [o for o in owners if not any(isinstance(s, GraftedDropPath) and s.tried for s in o.slots.values())]
    with undisturbed(model), full_precision(next(model.parameters()).device):
        calls = watch_calls(model, [owner for owner in owners if not owner.beside], input_size)
        found: dict[Any, Plan] = {}
        similar: dict[Any, Plan] = {}
        plans = {}
        for owner in owners:
            if owner.beside:
                plan = Plan(reason="it stands beside its block, not in it")
            elif owner.name not in calls:
                plan = Plan(reason="not called in a forward pass")
            elif dims := {slot.batch_dim for slot in owner.slots.values() if isinstance(slot, GraftedDropPath)} - {0}:
                plan = Plan(reason=f"samples lie in dimension {dims.pop()} there, behind tokens")
            elif norms := _norms_not_called(owner.module, calls[owner.name]):
                plan = Plan(
                    reason=f"{norms[0]}, a batch norm, is not called as a module: what uses its numbers runs on all samples"
                )
            else:
                call = calls[owner.name]
                key = (*structure(owner.module), call.key)
                if key not in found:
                    like = (outline(owner.module), call.order)
                    plan = _confirmed(owner, call, similar[like]) if like in similar else None
                    found[key] = plan or _taking_nothing(owner, call, _try(owner, call))
                    similar.setdefault(like, found[key])
                plan = found[key]
            _install(owner, plan, calls.get(owner.name))
            plans[owner.beside or owner.name] = plan
    return plans


def _norms_not_called(block: nn.Module, call: Call) -> list[str]:
    """Batch norms of a block that its forward pass does not call, as where it calls `F.batch_norm` on their numbers.

    A trial does not see that, since such code goes by the norm's own flag, nor do the hooks that spare its statistics.
    """
    norms = (name for name, module in block.named_modules() if takes_batch_statistics(module))
    return [name for name in norms if name and name not in call.called]


def _two_of_three(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """In place of `DropPath.choose`: keeps samples 0 and 2 of every three."""
    kept = [i for i in reversed(range(batch)) if i % 3 != 1]
    return torch.tensor(len(kept)), torch.tensor(kept + list(range(1, batch, 3)), device=device)


def _none(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """In place of `DropPath.choose`: keeps no sample."""
    return torch.tensor(0), torch.arange(batch, device=device)


def _confirmed(owner: Owner, call: Call, plan: Plan) -> Plan | None:
    """The plan of an owner that is likely to compute alike, as of Swin's windows those that are shifted, if it agrees here.

    Fewer trials than a search; only of a plan that skips all branches one by one.
    """
    if plan.reason or set(plan.entries) != set(owner.slots) or _disagreement(owner, call, plan.entries):
        return None
    all_take_nothing = plan.takes_nothing == frozenset(owner.slots)
    if all_take_nothing and not _disagreement(owner, call, plan.entries, nothing=True):
        return plan
    return _taking_nothing(owner, call, plan)


def _try(owner: Owner, call: Call) -> Plan:
    """How an owner of this structure can skip: the first module of each branch, or the block, or a reason."""
    if call.times > 1:
        return Plan(reason="called more than once in a forward pass")
    unused = [slot for slot in owner.slots if slot not in call.slots]
    if unused:
        return Plan(reason=f"{', '.join(unused)} is not applied: the block has no shortcut")
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
        return Plan(entries, kinds)
    failure = _disagreement(owner, call, None)
    if not failure:
        return Plan(block=True, reason="its branches cannot be skipped one by one")
    agreed: dict[str, list[Entry]] = {}  # as many branches as agree together
    for slot, found in entries.items():
        if not _disagreement(owner, call, {**agreed, slot: found}):
            agreed[slot] = found
    often = [f"{slot} is called {len(calls)} times" for slot, calls in call.slots.items() if len(calls) > 1]
    why = "; ".join([*often, f"neither branches nor block agree with masking: {failure}"])
    return Plan(agreed, kinds, reason=why if len(agreed) < len(owner.slots) else "")


def _taking_nothing(owner: Owner, call: Call, plan: Plan) -> Plan:
    """The plan with the slots whose branch, or block, takes an empty batch."""
    if plan.block:
        takes = () if _disagreement(owner, call, None, nothing=True) else owner.slots
    else:
        takes = [
            slot for slot in plan.entries if not _disagreement(owner, call, {slot: plan.entries[slot]}, nothing=True)
        ]
    return replace(plan, takes_nothing=frozenset(takes))


def _has_matrices(owner: Owner, first: Entry, slot_call: SlotCall) -> bool:
    """Whether a branch that begins at `first` holds a matrix; one that holds none is as cheap as pooling."""
    parts = [entry.part for entry in slot_call.entries]
    return any(_has_matrix(owner.module, part) for part in parts[parts.index(first.part) :])


def _has_matrix(module: nn.Module, part: str) -> bool:
    return any(p.ndim > 1 and min(p.shape[:2]) > 1 for p in module.get_submodule(part).parameters())


def _disagreement(
    owner: Owner, call: Call, entries: Mapping[str, Sequence[Entry]] | None, *, nothing: bool = False
) -> str:
    """Verifies a copy in float32 with a fixed kept set; returns what differs from masking, or an empty string.

    `entries` gives the first module of the branches to skip, while the others are masked; `None` skips the block. With
    `nothing` no sample is kept of those to be skipped, and they are handed an empty batch.
    """
    trial = in_float32(copy.deepcopy(owner.module)).train()
    own = [slot for slot in map(trial.get_submodule, owner.slots) if isinstance(slot, GraftedDropPath)]
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
    called: set[str] = set()
    for slot, module in zip(owner.slots, own, strict=True):
        skipped = entries is None or slot in entries
        module.choose = _none if nothing and skipped else _two_of_three  # instead of the method
        module.register_forward_pre_hook(lambda *_, slot=slot: called.add(slot))
        module.mode, module.role, module.drop_prob, module.break_even = "skip", "mask", 0.5, 0.0
        module.multiplier = 1.0  # a schedule may be at 0, where nothing would be dropped and all agree
        module.takes_nothing = nothing and skipped
    known = beside_samples(call.args, call.kwargs)
    if entries is None:
        hook_block(trial, own, known)  # as installed: drop-path modules of a block inside this one draw for themselves
    else:
        for slot, found in entries.items():
            module = trial.get_submodule(slot)
            assert isinstance(module, GraftedDropPath)
            hook_branch(trial, found, module, known)
    try:
        deviation = verify_skip(trial, call)
    except Exception as error:  # somebody's code may raise anything
        return f"{type(error).__name__} when given the kept samples only"
    if called != set(owner.slots):  # code that somebody put over a block's own may run the block that it was made for
        return "a copy of it does not run its own modules"
    if math.isinf(deviation):
        return "another gradient is missing"
    return "" if deviation <= TOLERANCE else "outputs or gradients differ"


def _run(module: nn.Module, call: Call) -> list[Tensor | None]:
    """All tensors of the output, and the gradients of a fixed random projection of them, of inputs and parameters."""
    with torch.inference_mode(False), torch.enable_grad():
        args, kwargs = clone(call.args, grad=True), clone(call.kwargs, grad=True)
        outs = _tensors(module(*args, **kwargs))
        if not outs:
            raise TypeError(f"verify_skip: {type(module).__name__} returns no tensor")
        if not any(out.numel() for out in outs):
            raise ValueError(f"verify_skip: {type(module).__name__} returns no number; give some images")
        generator = torch.Generator().manual_seed(1)
        projected = [
            (out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outs if out.requires_grad
        ]
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        inputs += [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(torch.stack(projected).sum(), inputs, allow_unused=True) if projected else ()
    return [*(out.detach() for out in outs), *gradients]


def _numbers(tensor: Tensor) -> Tensor:
    """Truth values and whole numbers as floats, of which there are differences."""
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


def _tensors(value: object) -> list[Tensor]:
    """The tensors in what a module returned: alone, or in containers and dataclasses, in one another too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list)):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, f.name) for f in fields(value)]
    else:
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _install(owner: Owner, plan: Plan, call: Call | None) -> None:
    known = beside_samples(call.args, call.kwargs) if call else []
    slots = {key: s for key, s in owner.slots.items() if isinstance(s, GraftedDropPath)}
    as_tried = Standing(owner.module, [], inside=[name for name, _ in owner.module.named_modules() if name])
    for key, slot in slots.items():
        slot.tried, slot.reason, slot.as_tried = True, plan.reason, as_tried
        slot.takes_nothing = key in plan.takes_nothing
    if plan.block:
        hook_block(owner.module, list(slots.values()), known)
        return
    for key, slot in slots.items():
        if key in plan.entries:
            hook_branch(owner.module, plan.entries[key], slot, known)
            slot.kind, slot.reason = plan.kinds[key], ""


def randomise_scales(model: nn.Module) -> None:
    """Draws biases, norm weights and layer scales from [0.5, 1.5]: at 1e-6, 0 or 1 they would hide any error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.uniform_(0.5, 1.5)
