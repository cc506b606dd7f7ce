"""Watches a model run on random images, and leaves it as it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.graft import Entry, grafted
from stochastic_depth.law import undisturbed
from stochastic_depth.places import Owner
from stochastic_depth.structure import described

# Modules tried as the beginning of a branch: children in the order of their calls, then deeper ones.
CANDIDATES = 12

# Images in a probe: two numbers, since only what grows with them is a dimension of samples (a model may have 3 tokens).
PROBE_BATCHES = (3, 2)


def mark_applied(model: nn.Module, input_size: Sequence[int]) -> None:
    """Finds out by forward passes which grafted modules are called at all, and which dimension of theirs holds samples."""
    shapes: dict[int, list[dict[int, list[torch.Size]]]] = {}

    def look(training: bool) -> set[int]:
        seen = [_given_shapes(model, input_size, images, training) for images in PROBE_BATCHES]
        for key in seen[0].keys() & seen[1].keys():
            shapes.setdefault(key, seen)
        return set(shapes)

    _look_in_training_first(look, {id(m) for m in grafted(model)})
    for module in grafted(model):
        module.applied = id(module) in shapes
        if module.applied:
            by_batch = [seen[id(module)] for seen in shapes[id(module)]]
            module.batch_dim, module.parts = _sample_dimension(*by_batch)


def _look_in_training_first(look: Callable[[bool], set[int]], wanted: set[int]) -> None:
    """Calls `look(training=True)`, since drop path may be called only then, and `look(False)` for what that did not find.

    Raises:
        Exception: What the model raised, if it runs in neither mode.
    """
    found: set[int] | None = None
    for training in (True, False):
        try:
            found = look(training)
        except Exception:  # a detector, say, wants targets in training; the other mode may do
            if not training and found is None:
                raise
        if found is not None and found >= wanted:
            break


def _given_shapes(
    model: nn.Module, input_size: Sequence[int], images: int, training: bool
) -> dict[int, list[torch.Size]]:
    """By id of a grafted module, the shapes that it is given in one forward pass."""
    shapes: dict[int, list[torch.Size]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes.setdefault(id(module), []).extend(a.shape for a in args[:1] if isinstance(a, Tensor))

    handles = [module.register_forward_pre_hook(note) for module in grafted(model)]
    try:
        _probe(model, input_size, images=images, training=training)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _sample_dimension(more: Sequence[torch.Size], fewer: Sequence[torch.Size]) -> tuple[int | None, int]:
    """The dimension that grows with the number of images in all calls (`None`: there is none), and its rows per image."""
    a, b = PROBE_BATCHES
    found = [
        [(dim, x // a) for dim, (x, y) in enumerate(zip(large, small, strict=True)) if x * b == y * a]
        for large, small in zip(more, fewer, strict=False)
        if len(large) == len(small)
    ]
    dims = {grows[0][0] if grows else None for grows in found}
    dim = dims.pop() if len(dims) == 1 else None
    return dim, 1 if dim is None else max(grows[0][1] for grows in found)


def _probe(model: nn.Module, input_size: Sequence[int], *, images: int = PROBE_BATCHES[0], training: bool) -> None:
    """One forward pass of random images that leaves no trace; in training mode norms, dropout and drop path do not train."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    with undisturbed(model), torch.no_grad():
        for module in model.modules():  # not model.train(), which people override
            still = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, DropPath)
            module.training = training and not isinstance(module, still)
        model(torch.randn(images, *input_size, device=parameter.device, dtype=parameter.dtype))


@dataclass
class Call:
    """One call of an owner in the probe: its arguments, and how it called its slots.

    Attributes:
        slots: By slot, its calls; a slot that serves two branches is called twice.
        parts: Other parts called since the last slot was, and the rows they were given.
        called: All parts that were called.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: dict[str, list["SlotCall"]] = field(default_factory=dict)
    parts: list[tuple[str, int]] = field(default_factory=list)
    times: int = 1
    called: set[str] = field(default_factory=set)

    @property
    def rows(self) -> int:
        """Rows of the first argument; 0 where it is no tensor."""
        return len(self.args[0]) if self.args and isinstance(self.args[0], Tensor) else 0

    @property
    def order(self) -> Any:
        """What was called, in which order, and how often."""
        slots = tuple((slot, tuple((c.rows, *c.entries) for c in calls)) for slot, calls in self.slots.items())
        return slots, self.times > 1

    @property
    def key(self) -> Any:
        """Shapes and values of the arguments, and the order of calls."""
        return described(self.args), described(self.kwargs), self.order


@dataclass(frozen=True)
class SlotCall:
    """One call of a slot: the rows it was given, and the parts at which its branch may begin, in the order to try."""

    rows: int
    entries: list[Entry]


def _slot_call(rows: int, call: Call) -> SlotCall:
    entries = []
    names = [name for name, _ in call.parts]
    for part, given in sorted(call.parts, key=lambda part: part[0].count(".")):  # outer ones first; the sort is stable
        parts = tuple(names[names.index(part) :])
        if given == rows:
            entries.append(Entry(part, parts=parts))
        elif rows and rows == call.rows and given % rows == 0:
            entries.append(Entry(part, windows=True, parts=parts))
    return SlotCall(rows, entries[:CANDIDATES])


def watch_calls(model: nn.Module, owners: list[Owner], input_size: Sequence[int]) -> dict[str, Call]:
    """Runs forward passes on random images and notes how owners and their parts are called: in training, if they are."""
    calls: dict[str, Call] = {}
    numbers = {owner.name: i for i, owner in enumerate(owners)}

    def look(training: bool) -> set[int]:
        for name, call in _watch_once(model, owners, input_size, training).items():
            calls.setdefault(name, call)
        return {numbers[name] for name in calls}

    _look_in_training_first(look, set(numbers.values()))
    return calls


def _watch_once(model: nn.Module, owners: list[Owner], input_size: Sequence[int], training: bool) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    handles = []

    def note_owner(owner: Owner) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if owner.name in calls:
                calls[owner.name].times += 1
            else:
                calls[owner.name] = Call(_for_trials(args), _for_trials(kwargs))

        return hook

    def note_part(owner: Owner, part: str) -> Callable[..., None]:
        holds_slots = any(slot.startswith(f"{part}.") for slot in owner.slots)

        def hook(_m: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.get(owner.name)
            if call is not None:
                call.called.add(part)
            if call is None or call.times > 1 or not args or not isinstance(args[0], Tensor) or not args[0].ndim:
                return
            if part in owner.slots:
                call.slots.setdefault(part, []).append(_slot_call(len(args[0]), call))
                call.parts.clear()
            elif not holds_slots:
                call.parts.append((part, len(args[0])))

        return hook

    for owner in owners:
        handles.append(owner.module.register_forward_pre_hook(note_owner(owner), with_kwargs=True))
        for part, module in owner.module.named_modules():
            if part:
                handles.append(module.register_forward_pre_hook(note_part(owner, part)))
    try:
        _probe(model, input_size, training=training)
    finally:
        for handle in handles:
            handle.remove()
    return calls


HALF = (torch.float16, torch.bfloat16)


def in_float32(module: nn.Module) -> nn.Module:
    """All half-precision tensors of a module as float32, in which skipping and masking differ by rounding alone."""
    module._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
    for part in module.modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and value.dtype in HALF:  # a mask or table that is no buffer
                vars(part)[key] = value.float()
    return module


def _for_trials(value: Any) -> Any:
    """Arguments copied, half precision as float32, and with random numbers where half precision overflowed."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        if not copied.is_floating_point():
            return copied
        copied = copied.float() if copied.dtype in HALF else copied
        return torch.where(copied.isfinite(), copied, torch.randn_like(copied))
    if isinstance(value, dict):
        return {k: _for_trials(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_for_trials(v) for v in value)
    return value


def clone(value: Any, grad: bool = False) -> Any:
    """Tensors in tuples, lists and dicts copied; floating ones asked for gradients if `grad`."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.requires_grad_() if grad and copied.is_floating_point() else copied
    if isinstance(value, dict):
        return {k: clone(v, grad) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(clone(v, grad) for v in value)
    return value
