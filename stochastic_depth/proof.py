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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers.branches import batch_norms, samples_to_compute, takes_batch_statistics
from layers.drop_path import DropPath, Mode, _Draw, wants_known_batch
from stochastic_depth.law import bounded, drop_law, full_precision, undisturbed
from stochastic_depth.places import Owner, branch_ends, find_owners, is_identity, misplaced, unknown_modules

Role = Literal["mask", "branch", "block", "silent"]

# Modules tried as the beginning of a branch: children in the order of their calls, then deeper ones.
CANDIDATES = 12

TOLERANCE = 1e-4  # of float32, in which conversions are tried

# Images in a probe: two numbers, since only what grows with them is a dimension of samples (a model may have 3 tokens).
PROBE_BATCHES = (3, 2)


class GraftedDropPath(DropPath):
    """A `DropPath` in a block whose forward we do not own. Called with a branch's output, as timm's is.

    Attributes:
        role: What it does where its mode skips. `mask`: nothing could be proven, multiply. `branch`: a hook in front of
            the branch selects the kept samples and this module scatters the result. `block`: hooks of the block do both.
            `silent`: another module of the block drops for this one.
        batch_dim: Dimension of its input that holds the samples: 1 for tokens first, (L, B, C). There it masks.
        parts: Rows of that dimension for each sample; more than 1 where the block works on parts of samples.
        begins: Where its branches begin, if it has role `branch`.
        takes_nothing: Whether the code between begin and end takes an empty batch. Where it does not, one sample is
            computed and multiplied by 0 when none is kept, so that every parameter gets its (zero) gradient.
        has_batch_norm: Whether a batch norm sees the kept samples only.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True, mode: Mode = "mask") -> None:
        super().__init__(drop_prob, scale_by_keep, mode)
        self.role: Role = "mask"
        self.batch_dim: int | None = 0  # None: no dimension holds samples
        self.parts = 1
        self.reason = ""  # why it does not skip, or skips with its whole block
        self.tried = False  # whether `convert_to_skip` has looked at it
        self.applied = True  # whether a forward pass calls it at all: blocks without a shortcut do not
        self.begins: tuple[_Entry, ...] = ()
        self.takes_nothing = False
        self.has_batch_norm = False
        self._draw: _Draw | None = None
        self._batch = 0  # of the block around it, where its branch begins with windows of samples

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation."""
        return self._skips and self.role != "mask"

    def select(self, x: Tensor, parts: "Parts", groups: int = 1) -> Tensor | None:
        """Draws, remembers the draw for the branch's end, and returns the samples to compute; `None`: all.

        Args:
            x: First argument of the branch or block, (B * groups, ...).
            parts: What runs until its end.
            groups: Rows of x, one behind the other, that are one sample.
        """
        self._draw = None
        if not (self.training and self._skips_here()) or self.role == "mask" or not x.shape[0]:
            return None
        batch = x.shape[0] // groups
        count_tensor, order = self.draw(batch, x.device)
        scale = self._scale(x.dtype)
        if torch.compiler.is_compiling():
            if parts.masked_compiled:
                self._count(batch, count_tensor)
                self._draw = _Draw(batch, None, (order.argsort() < count_tensor) * scale)
                return None
            least = 0 if self.takes_nothing else 1
            computed_tensor = count_tensor.clamp(min=least)
            self._count(batch, count_tensor, computed_tensor)
            computed, nothing = int(computed_tensor.item()), False
            torch._check(computed >= least)
            torch._check(computed <= batch)
        else:
            count = int(count_tensor)
            norms = parts.norms()
            if norms:
                self._warn_of_batch_norm()
            computed = samples_to_compute(count, batch, norms)
            nothing = computed == 0
            if nothing and not self.takes_nothing:
                computed = 1
            self._count(batch, count_tensor, computed)
        if not torch.compiler.is_compiling() and computed == batch:
            mask = None if self.rate == 0.0 else (order.argsort() < count_tensor) * scale
            self._draw = _Draw(batch, None, mask, nothing)
            return None
        kept = order.narrow(0, 0, computed)
        self._draw = _Draw(batch, kept, (torch.arange(computed, device=x.device) < count_tensor) * scale, nothing)
        if groups == 1:
            return x.index_select(0, kept)
        grouped = x.reshape(batch, groups, *x.shape[1:]).index_select(0, kept)  # (B', groups, ...)
        return grouped.reshape(computed * groups, *x.shape[1:])

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of kept samples (0-dim, CPU) and a random order of the samples, of which the first are kept."""
        return self._draw_count(batch), torch.rand(batch, device=device).argsort()

    def forward_training(self, x: Tensor) -> Tensor:
        """Multiplies or scatters a branch's output by the draw that was made in front of it, if one was."""
        if self.batch_dim:
            return super().forward_training(x.movedim(self.batch_dim, 0)).movedim(0, self.batch_dim)
        if self.role == "mask" or self._draw is None:
            return super().forward_training(x)
        if self.role == "branch":
            draw, self._draw = self._draw, None
            return draw.scatter(x)
        return self._draw.scaled(x)  # inside a block that is skipped as a whole

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None}


class NoteBatch:
    """Forward pre-hook of a block in which a branch begins with windows of samples: says how many samples there are."""

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.drop_path._batch = args[0].shape[0]


class Parts:
    """Modules of a block that run on the kept samples only. Known by name: a batch norm may be replaced by a synchronised
    one at any time."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        modules = {name: block.get_submodule(name) for name in names}
        self.block = block
        self.norm_names = [name for name, module in modules.items() if takes_batch_statistics(module)]
        self.masked_compiled = any(map(wants_known_batch, modules.values()))

    def norms(self) -> list[nn.Module]:
        """Batch norms that take statistics of what they see."""
        return batch_norms(self.block.get_submodule(name) for name in self.norm_names)


class KeepStatistics:
    """Hooks of a batch norm inside a branch: with no sample kept it takes no statistics, whatever it is given.

    Not a flag set from the beginning of the branch to its end, which an exception would leave behind.
    """

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path
        self.held = False

    def before(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Puts the batch norm into evaluation for this one call."""
        if torch.compiler.is_compiling():
            return
        draw = self.drop_path._draw
        self.held = module.training and draw is not None and draw.nothing
        if self.held:
            module.training = False

    def after(self, module: nn.Module, _args: tuple[Any, ...], _out: object) -> None:
        """Puts it back."""
        if not torch.compiler.is_compiling() and self.held:
            self.held = False
            module.training = True


class SelectKept:
    """Forward pre-hook of the first module of a branch, whose first argument holds samples or windows of samples."""

    def __init__(self, drop_path: GraftedDropPath, parts: Parts, *, windows: bool = False) -> None:
        self.drop_path = drop_path
        self.parts = parts
        self.windows = windows

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        groups = args[0].shape[0] // self.drop_path._batch if self.windows else 1
        selected = self.drop_path.select(args[0], self.parts, groups)
        return None if selected is None else (selected, *args[1:])


class SkipModule:
    """Hooks of one module, where the code around it wants the full batch: computes it for the kept samples only."""

    def __init__(self, drop_path: GraftedDropPath, parts: Parts, *, windows: bool = False) -> None:
        self.select = SelectKept(drop_path, parts, windows=windows)
        self.kept: Tensor | None = None
        self.groups = 1  # rows of a sample

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hands on the kept samples, and leaves a mask of the full batch for the branch's end."""
        selected = self.select(module, args)
        drop_path = self.select.drop_path
        self.kept = None if selected is None or drop_path._draw is None else drop_path._draw.kept
        if drop_path._draw is not None:
            self.groups = args[0].shape[0] // drop_path._draw.batch
            drop_path._draw = drop_path._draw.as_mask()
        return selected

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The kept samples' results in their places, zeros in the others."""
        kept, self.kept = self.kept, None
        draw = self.select.drop_path._draw
        if kept is None or draw is None:
            return None
        groups = self.groups
        full = out.new_zeros(draw.batch, groups, *out.shape[1:])
        full = full.index_add(0, kept, out.reshape(kept.shape[0], groups, *out.shape[1:]))
        return full.reshape(draw.batch * groups, *out.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}


class ApplyAfter:
    """Forward hook of a branch's last module, in a block that has no place of its own for stochastic depth."""

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        return self.drop_path(out)


class BlockSkip:
    """Forward pre-hook and hook of a block whose input and output have one shape: skips all its branches together."""

    def __init__(self, drop_paths: Sequence[GraftedDropPath], parts: Parts) -> None:
        self.drop_paths = list(drop_paths)  # the first draws for all
        self.parts = parts
        self.inputs: list[Tensor] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the full batch aside and hands on the kept samples."""
        self.inputs.clear()
        if not args or not isinstance(args[0], Tensor):
            return None
        first, *others = self.drop_paths
        selected = first.select(args[0], self.parts)
        for other in others:
            other._draw = first._draw
        if selected is None:
            return None
        self.inputs.append(args[0])
        return (selected, *args[1:])

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        """The full batch with the kept samples' results in their places."""
        draw = self.drop_paths[0]._draw
        for module in self.drop_paths:
            module._draw = None
        if draw is None or draw.kept is None or not self.inputs:
            return None
        x = self.inputs.pop()
        if not isinstance(out, Tensor) or out.shape != (len(draw.kept), *x.shape[1:]):
            raise ValueError("a block can be skipped only where its input and output have one shape")
        return x.to(out.dtype).index_copy(0, draw.kept, out)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": []}


def graft(model: nn.Module) -> None:
    """Puts a `GraftedDropPath` into every place for one. State-dict keys and evaluation stay as they are.

    Raises:
        ValueError: A module in such a place does something else than dropping whole samples.
    """
    if unknown := unknown_modules(model):
        names = [f"{name} ({kind})" for name, kind in unknown.items()]
        raise ValueError(
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}: named like stochastic depth, but "
            "not known to drop whole samples at a rate that can be set; put layers.drop_path.DropPath or nn.Identity there"
        )
    for owner in find_owners(model):
        if misplaced(owner):
            owner.module.drop_path = None  # type: ignore[assignment]
        for key, child in owner.slots.items():
            if isinstance(child, DropPath):
                continue
            if child is None or is_identity(child):
                grafted = GraftedDropPath()
            else:
                law = drop_law(child)
                assert law is not None
                grafted = GraftedDropPath(bounded(law.rate(child)), law.scale_by_keep, law.mode)
            parent, _, attribute = key.rpartition(".")
            holder = owner.module.get_submodule(parent)
            holder.__dict__.pop(attribute, None)
            grafted.train(child.training if child is not None else owner.module.training)
            setattr(holder, attribute, grafted)
            if end := key.removeprefix("drop_path_") if branch_ends(owner.module) else "":
                owner.module.get_submodule(end).register_forward_hook(ApplyAfter(grafted))


@dataclass
class Conversion:
    """How one owner's drop-path modules skip, and why not more."""

    owner: str
    roles: dict[str, Role] = field(default_factory=dict)
    reason: str = ""


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
        calls = _watch(model, [owner for owner in owners if not owner.beside], input_size)
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
                key = (*_structure(owner.module), *call.shapes)
                if key not in found:
                    found[key] = _try(owner, call)
                    found[key]["takes_nothing"] = _taking_nothing(owner, call, found[key])
                _install(owner, found[key], conversion)
            conversions.append(conversion)
    return conversions


@dataclass(frozen=True)
class _Entry:
    """Where a branch begins.

    Attributes:
        part: The first module of it.
        windows: Whether that is given windows of samples.
        alone: Whether only this one module is skipped, since the code behind it wants the full batch.
        parts: The modules that run from there to the branch's end, by name.
    """

    part: str
    windows: bool = False
    alone: bool = False
    parts: tuple[str, ...] = ()


@dataclass
class _Call:
    """One call of an owner in the probe: its arguments, and how it called its slots.

    Attributes:
        slots: By slot, its calls; a slot that serves two branches is called twice.
        parts: Other parts called since the last slot was, and the rows they were given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: dict[str, list["_SlotCall"]] = field(default_factory=dict)
    parts: list[tuple[str, int]] = field(default_factory=list)
    times: int = 1

    @property
    def rows(self) -> int:
        """Rows of the first argument; 0 where it is no tensor."""
        return len(self.args[0]) if self.args and isinstance(self.args[0], Tensor) else 0

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes and types of the arguments, as part of a key."""
        values = (*self.args, *self.kwargs.values())
        return tuple(tuple(v.shape) if isinstance(v, Tensor) else repr(type(v)) for v in values)


@dataclass(frozen=True)
class _SlotCall:
    """One call of a slot: the rows it was given, and the parts at which its branch may begin, in the order to try."""

    rows: int
    entries: list[_Entry]


def _slot_call(rows: int, call: _Call) -> _SlotCall:
    entries = []
    names = [name for name, _ in call.parts]
    for part, given in sorted(call.parts, key=lambda part: part[0].count(".")):  # outer ones first; the sort is stable
        parts = tuple(names[names.index(part) :])
        if given == rows:
            entries.append(_Entry(part, parts=parts))
        elif rows and rows == call.rows and given % rows == 0:
            entries.append(_Entry(part, windows=True, parts=parts))
    return _SlotCall(rows, entries[:CANDIDATES])


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What two modules have in common when they compute alike: classes and shapes of all parts."""
    parts = [(name, type(m).__qualname__, m.extra_repr()) for name, m in module.named_modules()
             if not isinstance(m, DropPath)]  # fmt: skip
    return tuple(parts), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _watch(model: nn.Module, owners: list[Owner], input_size: Sequence[int]) -> dict[str, _Call]:
    """Runs forward passes on random images and notes how owners and their parts are called: in training, if they are."""
    calls: dict[str, _Call] = {}
    numbers = {owner.name: i for i, owner in enumerate(owners)}

    def look(training: bool) -> set[int]:
        for name, call in _watch_once(model, owners, input_size, training).items():
            calls.setdefault(name, call)
        return {numbers[name] for name in calls}

    _look_in_training_first(look, set(numbers.values()))
    return calls


def _watch_once(model: nn.Module, owners: list[Owner], input_size: Sequence[int], training: bool) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    handles = []

    def note_owner(owner: Owner) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if owner.name in calls:
                calls[owner.name].times += 1
            else:
                calls[owner.name] = _Call(_for_trials(args), _for_trials(kwargs))

        return hook

    def note_part(owner: Owner, part: str) -> Callable[..., None]:
        holds_slots = any(slot.startswith(f"{part}.") for slot in owner.slots)

        def hook(_m: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.get(owner.name)
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


def _try(owner: Owner, call: _Call) -> dict[str, Any]:
    """How an owner of this structure can skip: the first module of each branch, or the block, or a reason."""
    if call.times > 1:
        return {"reason": "called more than once in a forward pass"}
    unused = [slot for slot in owner.slots if slot not in call.slots]
    if unused:
        return {"reason": f"{', '.join(unused)} is not applied: the block has no shortcut"}
    entries: dict[str, list[_Entry]] = {}
    kinds: dict[str, str] = {}
    whole = True
    for slot in owner.slots:
        found: list[_Entry] = []
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
    agreed: dict[str, list[_Entry]] = {}  # as many branches as agree together
    for slot, found in entries.items():
        if not _disagreement(owner, call, {**agreed, slot: found}):
            agreed[slot] = found
    often = [f"{slot} is called {len(calls)} times" for slot, calls in call.slots.items() if len(calls) > 1]
    why = "; ".join([*often, f"neither branches nor block agree with masking: {failure}"])
    return {"entries": agreed, "kinds": kinds, "reason": why if len(agreed) < len(owner.slots) else ""}


def _taking_nothing(owner: Owner, call: _Call, found: dict[str, Any]) -> set[str]:
    """The slots whose branch, or block, takes an empty batch and gives every parameter its zero gradient then."""
    if found.get("block"):
        return set() if _disagreement(owner, call, None, draw=_NothingKept) else set(owner.slots)
    entries: dict[str, list[_Entry]] = found.get("entries", {})
    return {slot for slot in entries if not _disagreement(owner, call, {slot: entries[slot]}, draw=_NothingKept)}


def _has_matrices(owner: Owner, first: _Entry, slot_call: _SlotCall) -> bool:
    """Whether a branch that begins at `first` holds a matrix; one that holds none is as cheap as pooling."""
    parts = [entry.part for entry in slot_call.entries]
    return any(_has_matrix(owner.module, part) for part in parts[parts.index(first.part) :])


def _has_matrix(module: nn.Module, part: str) -> bool:
    return any(p.ndim > 1 and min(p.shape[:2]) > 1 for p in module.get_submodule(part).parameters())


def _disagreement(
    owner: Owner, call: _Call, entries: dict[str, list[_Entry]] | None, draw: type[_FixedDraw] = _FixedDraw
) -> str:
    """Runs a copy in float32, skipping and masking with the same kept set; returns what differs, or an empty string.

    `entries` gives the first module of the branches to skip, while the others are masked; `None` skips the block. `draw`
    says which samples those to be skipped keep.
    """
    trial = _in_float32(copy.deepcopy(owner.module)).train()
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
        _hook_block(trial, list(grafted(trial)))
    else:
        for slot, found in entries.items():
            module = trial.get_submodule(slot)
            assert isinstance(module, GraftedDropPath)
            _hook_branch(trial, found, module)
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


def _run(module: nn.Module, call: _Call) -> list[Tensor | None]:
    """Output, and the gradients of a fixed random projection of it, of inputs and parameters."""
    args, kwargs = _clone(call.args, grad=True), _clone(call.kwargs, grad=True)
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


HALF = (torch.float16, torch.bfloat16)


def _in_float32(module: nn.Module) -> nn.Module:
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


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _install(owner: Owner, found: dict[str, Any], conversion: Conversion) -> None:
    slots = {key: s for key, s in owner.slots.items() if isinstance(s, GraftedDropPath)}
    conversion.reason = found.get("reason", "")
    for key, slot in slots.items():
        slot.tried, slot.reason = True, conversion.reason
        slot.takes_nothing = key in found.get("takes_nothing", ())
    if found.get("block"):
        _hook_block(owner.module, list(slots.values()))
    else:
        entries = found.get("entries", {})
        for key, slot in slots.items():
            if key in entries:
                _hook_branch(owner.module, entries[key], slot)
                slot.kind, slot.reason = found["kinds"][key], ""
    conversion.roles = {key: slot.role for key, slot in slots.items()}


def _hook_branch(owner: nn.Module, entries: Sequence[_Entry], drop_path: GraftedDropPath) -> None:
    drop_path.role, drop_path.begins = "branch", tuple(entries)
    if any(entry.windows for entry in entries):
        owner.register_forward_pre_hook(NoteBatch(drop_path))
    for entry in entries:
        first = owner.get_submodule(entry.part)
        if entry.alone:
            parts = Parts(owner, [p for p in entry.parts if f"{p}.".startswith(f"{entry.part}.")])
            skip = SkipModule(drop_path, parts, windows=entry.windows)
            first.register_forward_pre_hook(skip.before)
            first.register_forward_hook(skip.after)
        else:
            parts = Parts(owner, entry.parts)
            first.register_forward_pre_hook(SelectKept(drop_path, parts, windows=entry.windows))
        drop_path.has_batch_norm |= bool(parts.norm_names)
    _keep_statistics(owner, {part for entry in entries for part in entry.parts}, drop_path)


def _hook_block(owner: nn.Module, drop_paths: Sequence[GraftedDropPath]) -> None:
    names = [name for name, _ in owner.named_modules() if name]
    skip = BlockSkip(drop_paths, parts := Parts(owner, names))
    for i, module in enumerate(drop_paths):
        module.role = "block" if i == 0 else "silent"
        module.has_batch_norm = bool(parts.norm_names)
    owner.register_forward_pre_hook(skip.before)
    owner.register_forward_hook(skip.after)
    _keep_statistics(owner, names, drop_paths[0])


def _keep_statistics(owner: nn.Module, names: Collection[str], drop_path: GraftedDropPath) -> None:
    """Hooks behind those that draw: a batch norm may be the first module of a branch, or its last."""
    for name, module in owner.named_modules():
        if name in names and takes_batch_statistics(module):
            keep = KeepStatistics(drop_path)
            module.register_forward_pre_hook(keep.before)
            module.register_forward_hook(keep.after, always_call=True)


def _clone(value: Any, grad: bool = False) -> Any:
    """Tensors in tuples, lists and dicts copied; floating ones asked for gradients if `grad`."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.requires_grad_() if grad and copied.is_floating_point() else copied
    if isinstance(value, dict):
        return {k: _clone(v, grad) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_clone(v, grad) for v in value)
    return value


def grafted(model: nn.Module) -> Iterator[GraftedDropPath]:
    """The grafted modules of a model."""
    return (m for m in model.modules() if isinstance(m, GraftedDropPath))
