"""Stochastic depth in residual blocks that are not ours, timm's and torchvision's: the one file that knows such blocks.

Their drop-path modules are found by class name, by attribute name where an identity (or nothing) stands for rate 0, and
replaced by `GraftedDropPath`. A block's own forward is left alone. To skip, the kept samples are selected in a hook in
front of the first module of a branch, and the grafted module at the branch's end scatters the result into zeros of the
full batch. Where a branch begins is found by watching one forward pass, and every conversion is then run against masking
with the same kept set, outputs and gradients, on a copy with randomised scales. What does not agree falls back to
skipping the whole block, and what does not agree then either is masked.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath, Mode

Role = Literal["mask", "branch", "block", "silent"]

CLASS_NAMES = ("DropPath", "StochasticDepth")
ATTRIBUTE = re.compile(r"drop_path|stochastic_depth")
# Containers of branches that run side by side inside one block (timm's parallel ViT).
PARALLEL = ("attns", "ffns")
# Modules tried as the beginning of a branch: children in the order of their calls, then deeper ones.
CANDIDATES = 12
TOLERANCE = 1e-4


class GraftedDropPath(DropPath):
    """A `DropPath` in a block whose forward we do not own. Called with a branch's output, as timm's is.

    Attributes:
        role: What it does where its mode skips. `mask`: nothing could be proven, multiply. `branch`: a hook in front of
            the branch selects the kept samples and this module scatters the result. `block`: hooks of the block do both.
            `silent`: another module of the block drops for this one.
    """

    def __init__(self, drop_prob: float = 0.0, mode: Mode = "mask") -> None:
        super().__init__(drop_prob, mode=mode)
        self.role: Role = "mask"
        self.reason = ""  # why it does not skip, or skips with its whole block
        self.tried = False  # whether `convert_to_skip` has looked at it
        self.applied = True  # whether a forward pass calls it at all: blocks without a shortcut do not
        self._draw: _Draw | None = None

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation."""
        return self._skips and self.role != "mask"

    def select(self, x: Tensor) -> Tensor | None:
        """Draws, remembers the draw for the branch's end, and returns the kept samples; `None`: take all."""
        self._draw = None
        if not (self.training and self.skips) or self.rate == 0.0:
            return None
        batch = x.shape[0]
        count_tensor, order = self.draw(batch, x.device)
        count = int(count_tensor)
        self._count(batch, count_tensor)
        scale = self._scale(x.dtype)
        if count == 0 and batch > 0 and not self._has_batch_norm:
            # The block's own code may not take an empty batch: one sample is computed and multiplied by 0, so that
            # every parameter gets its (zero) gradient.
            self._draw = _Draw(batch, order[:1], torch.zeros_like(scale))
        elif count == batch or (self._has_batch_norm and count < 2):
            self._draw = _Draw(batch, None, (order.argsort() < count) * scale)
        else:
            self._draw = _Draw(batch, order[:count], scale)
        return None if self._draw.kept is None else x.index_select(0, self._draw.kept)

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of kept samples (0-dim, CPU) and a random order of the samples, of which the first are kept."""
        return self._draw_count(batch), torch.rand(batch, device=device).argsort()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self._skips) or self.role == "mask" or self._draw is None:
            return super().forward(x)
        if self.role == "branch":
            draw, self._draw = self._draw, None
            return draw.scatter(x)
        return self._draw.scaled(x)  # inside a block that is skipped as a whole

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None}


@dataclass(frozen=True)
class _Draw:
    """One draw on its way from the beginning of a branch or block to its end."""

    batch: int
    kept: Tensor | None  # indices; None: all samples were computed and `scale` is (B,)
    scale: Tensor

    def scaled(self, out: Tensor) -> Tensor:
        """The branch's output, divided by keep_prob, for those samples that are computed."""
        scale = self.scale.to(out.dtype)
        return out * (scale.view(-1, *(1,) * (out.ndim - 1)) if self.kept is None else scale)

    def scatter(self, out: Tensor) -> Tensor:
        """The branch's scaled output for the kept samples, (B', ...) -> (B, ...) with zeros for the dropped."""
        out = self.scaled(out)
        return out if self.kept is None else out.new_zeros(self.batch, *out.shape[1:]).index_add(0, self.kept, out)


class SelectKept:
    """Forward pre-hook of the first module of a branch."""

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        selected = self.drop_path.select(args[0])
        return None if selected is None else (selected, *args[1:])


class BlockSkip:
    """Forward pre-hook and hook of a block whose input and output have one shape: skips all its branches together."""

    def __init__(self, drop_paths: Sequence[GraftedDropPath]) -> None:
        self.drop_paths = list(drop_paths)  # the first draws for all
        self.inputs: list[Tensor] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the full batch aside and hands on the kept samples."""
        self.inputs.clear()
        if not args or not isinstance(args[0], Tensor):
            return None
        first, *others = self.drop_paths
        selected = first.select(args[0])
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


# ---- finding --------------------------------------------------------------------------------------------------------


@dataclass
class Owner:
    """A module that holds drop-path modules."""

    name: str
    module: nn.Module
    slots: dict[str, nn.Module | None]  # attribute -> what stands there


def find_owners(model: nn.Module) -> list[Owner]:
    """Modules with a drop-path module, or a place for one, in order of registration."""
    owners = []
    for name, module in model.named_modules():
        slots: dict[str, nn.Module | None] = {}
        for key, child in module.named_children():
            named = isinstance(child, nn.Identity) and ATTRIBUTE.search(key)
            if isinstance(child, DropPath) or type(child).__name__ in CLASS_NAMES or named:
                slots[key] = child
        for key, value in vars(module).items():
            if value is None and ATTRIBUTE.fullmatch(key):  # timm's ResNet at rate 0
                slots[key] = None
        if slots:
            # without the part that torch.compile puts into the name: names tell blocks and stages apart
            owners.append(Owner(".".join(p for p in name.split(".") if p != "_orig_mod"), module, slots))
    return owners


def block_names(owners: Sequence[Owner]) -> list[str]:
    """For each owner the name of the residual block it belongs to: owners of one block share a drop-path rate.

    A block is named by its last index, that of parallel branches left out; owners of different classes that sit in one
    indexed container (timm's DaViT) are one block.
    """
    names = []
    for owner in owners:
        parts = owner.name.split(".")
        for i, part in enumerate(parts):
            if part in PARALLEL:
                parts = parts[:i]
                break
        while len(parts) > 1 and not parts[-1].isdigit():
            parts.pop()
        names.append(".".join(parts) if parts[-1].isdigit() else owner.name)
    classes: dict[str, list[str]] = {}
    for name, owner in zip(names, owners, strict=True):
        classes.setdefault(name.rpartition(".")[0], []).append(type(owner.module).__name__)
    merged = []
    for name in names:
        parent = name.rpartition(".")[0]
        kinds = classes[parent]
        one = parent.rpartition(".")[2].isdigit() and len(kinds) > 1 and len(set(kinds)) == len(kinds)
        merged.append(parent if one else name)
    return merged


def is_foreign(model: nn.Module) -> bool:
    """Whether a model has places for stochastic depth that are not ours."""
    return any(not isinstance(child, DropPath) for owner in find_owners(model) for child in owner.slots.values())


def foreign_rate(module: nn.Module | None) -> float:
    """The rate of timm's or torchvision's module; 0 for an identity or nothing."""
    return float(getattr(module, "drop_prob", getattr(module, "p", 0.0)) or 0.0)


def graft(model: nn.Module) -> None:
    """Puts a `GraftedDropPath` into every place for one. State-dict keys and evaluation stay as they are."""
    for owner in find_owners(model):
        for key, child in owner.slots.items():
            if not isinstance(child, DropPath):
                grafted = GraftedDropPath(foreign_rate(child))
                owner.module.__dict__.pop(key, None)
                grafted.train(owner.module.training)
                setattr(owner.module, key, grafted)


# ---- converting to skip ---------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    """How one owner's drop-path modules skip, and why not more."""

    owner: str
    roles: dict[str, Role] = field(default_factory=dict)
    reason: str = ""


def mark_applied(model: nn.Module, input_size: Sequence[int]) -> None:
    """Finds out by one forward pass which grafted modules are called at all."""
    called: set[int] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in grafted(model)]
    try:
        _probe(model, input_size)
    finally:
        for handle in handles:
            handle.remove()
    for module in grafted(model):
        module.applied = id(module) in called


def _probe(model: nn.Module, input_size: Sequence[int]) -> None:
    """One forward pass of three random images in eval mode; random states and training flags stay as they were."""
    parameter = next(model.parameters())
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(parameter)):
            model(torch.randn(3, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, flag in training:
            module.training = flag


def _cuda(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.device.type == "cuda" else []


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
    with torch.random.fork_rng(devices=_cuda(next(model.parameters()))):
        torch.manual_seed(0)
        calls = _watch(model, owners, input_size)
        found: dict[Any, dict[str, Any]] = {}
        conversions = []
        for owner in owners:
            conversion = Conversion(owner.name)
            if owner.name not in calls:
                _install(owner, {"reason": "not called in a forward pass"}, conversion)
            else:
                call = calls[owner.name]
                key = (*_structure(owner.module), *call.shapes)
                if key not in found:
                    found[key] = _try(owner, call)
                _install(owner, found[key], conversion)
            conversions.append(conversion)
    return conversions


@dataclass
class _Call:
    """One call of an owner in the probe: its arguments, and the modules it called before each slot."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    candidates: dict[str, list[str]] = field(default_factory=dict)
    times: int = 1

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes and types of the arguments, as part of a key."""
        values = (*self.args, *self.kwargs.values())
        return tuple(tuple(v.shape) if isinstance(v, Tensor) else repr(type(v)) for v in values)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What two modules have in common when they compute alike: classes and shapes of all parts."""
    parts = [(name, type(m).__qualname__, m.extra_repr()) for name, m in module.named_modules()
             if not isinstance(m, DropPath)]  # fmt: skip
    return tuple(parts), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _watch(model: nn.Module, owners: list[Owner], input_size: Sequence[int]) -> dict[str, _Call]:
    """Runs one forward pass on three random images and notes how owners and their parts are called."""
    calls: dict[str, _Call] = {}
    handles = []

    def note_owner(owner: Owner) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if owner.name in calls:
                calls[owner.name].times += 1
            else:
                calls[owner.name] = _Call(_clone(args), _clone(kwargs), {"": []})

        return hook

    def note_part(owner: Owner, part: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.get(owner.name)
            if call is None or call.times > 1:
                return
            if part in owner.slots:
                call.candidates[part] = call.candidates.pop("")
                call.candidates[""] = []
            elif args and isinstance(args[0], Tensor):
                call.candidates[""].append(part)

        return hook

    for owner in owners:
        handles.append(owner.module.register_forward_pre_hook(note_owner(owner), with_kwargs=True))
        for part, module in owner.module.named_modules():
            if part:
                handles.append(module.register_forward_pre_hook(note_part(owner, part)))
    try:
        _probe(model, input_size)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _FixedDraw(GraftedDropPath):
    """For trials: keeps samples 0 and 2 of three."""

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        assert batch == 3
        return torch.tensor(2), torch.tensor([2, 0, 1], device=device)

    def _draw_mask(self, x: Tensor) -> Tensor:
        return torch.tensor([True, self.drop_prob == 0.0, True], device=x.device)


def _try(owner: Owner, call: _Call) -> dict[str, Any]:
    """How an owner of this structure can skip: the first module of each branch, or the block, or a reason."""
    if call.times > 1:
        return {"reason": "called more than once in a forward pass"}
    unused = [slot for slot in owner.slots if slot not in call.candidates]
    if unused:
        return {"reason": f"{', '.join(unused)} is not applied: the block has no shortcut"}
    entries: dict[str, str] = {}
    whole = True
    for slot in owner.slots:
        parts = sorted(call.candidates[slot], key=lambda part: part.count("."))  # stable: in the order of their calls
        for i, entry in enumerate(parts[:CANDIDATES]):
            if not _disagreement(owner, call, {slot: entry}):
                entries[slot] = entry
                # what was called before may belong to the branch: a norm behind the attention would agree as well
                whole = whole and not any(_has_matrix(owner.module, part) for part in parts[:i])
                break
    if whole and len(entries) == len(owner.slots):
        return {"entries": entries}
    failure = _disagreement(owner, call, None)
    if not failure:
        return {"block": True, "reason": "its branches cannot be skipped one by one"}
    if len(entries) == len(owner.slots):
        return {"entries": entries}
    return {"entries": entries, "reason": f"neither branches nor block agree with masking: {failure}"}


def _has_matrix(module: nn.Module, part: str) -> bool:
    return any(p.ndim > 1 and min(p.shape[:2]) > 1 for p in module.get_submodule(part).parameters())


def _disagreement(owner: Owner, call: _Call, entries: dict[str, str] | None) -> str:
    """Runs a copy, skipping and masking with the same kept set; returns what differs, or an empty string.

    `entries` gives the first module of the branches to skip; `None` skips the block.
    """
    trial = copy.deepcopy(owner.module).train()
    for module in trial.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()  # statistics and random streams of other batches are not what is compared
    with torch.no_grad():
        for parameter in trial.parameters():
            if (
                parameter.ndim <= 1
                or parameter.numel() == parameter.shape[-1]
                or max(parameter.shape) == parameter.numel()
            ):
                parameter.uniform_(0.5, 1.5)  # a layer scale of 1e-6 would hide any error
    tested = list(owner.slots) if entries is None else list(entries)
    for slot in owner.slots:
        module = trial.get_submodule(slot)
        assert isinstance(module, GraftedDropPath)
        module.__class__ = _FixedDraw
        module.mode, module.role = ("skip", "mask") if slot in tested else ("mask", "mask")
        module.drop_prob = 0.5 if slot in tested else 0.0
    try:
        expected = _run(trial, call)
    except Exception as error:  # somebody's code may raise anything
        return f"masking failed with {type(error).__name__}"
    if entries is None:
        _hook_block(trial, list(grafted(trial)))
    else:
        for slot, entry in entries.items():
            module = trial.get_submodule(slot)
            assert isinstance(module, GraftedDropPath)
            _hook_branch(trial, entry, module)
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
        out = module(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError("the block does not return one tensor")
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        inputs += [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [out.detach(), *(None if g is None else g for g in gradients)]


def _install(owner: Owner, found: dict[str, Any], conversion: Conversion) -> None:
    slots = {key: s for key, s in owner.slots.items() if isinstance(s, GraftedDropPath)}
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in owner.module.modules())
    conversion.reason = found.get("reason", "")
    for slot in slots.values():
        slot._has_batch_norm, slot.tried, slot.reason = norms, True, conversion.reason
    if found.get("block"):
        _hook_block(owner.module, list(slots.values()))
    else:
        entries = found.get("entries", {})
        for key, slot in slots.items():
            if key in entries:
                _hook_branch(owner.module, entries[key], slot)
    conversion.roles = {key: slot.role for key, slot in slots.items()}


def _hook_branch(owner: nn.Module, entry: str, drop_path: GraftedDropPath) -> None:
    drop_path.role = "branch"
    owner.get_submodule(entry).register_forward_pre_hook(SelectKept(drop_path))


def _hook_block(owner: nn.Module, drop_paths: Sequence[GraftedDropPath]) -> None:
    for i, module in enumerate(drop_paths):
        module.role = "block" if i == 0 else "silent"
    skip = BlockSkip(drop_paths)
    owner.register_forward_pre_hook(skip.before)
    owner.register_forward_hook(skip.after)


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
