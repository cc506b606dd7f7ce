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
# Modules tried as the beginning of a branch, in the order of their calls.
CANDIDATES = 8
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
        self._draw: _Draw | None = None

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation."""
        return self._skips and self.role in ("branch", "block")

    def select(self, x: Tensor) -> Tensor | None:
        """Draws, remembers the draw for the branch's end, and returns the kept samples; `None`: take all."""
        self._draw = None
        if not (self.training and self.skips):
            return None
        batch = x.shape[0]
        count_tensor, order = self.draw(batch, x.device)
        count = int(count_tensor)
        self._count(batch, count_tensor)
        scale = self._scale(x.dtype)
        few = 2 if self._has_batch_norm else 1
        if count == batch or count < few:
            # Too few for the block's own code, which may not take an empty batch: mask the same draw. With nothing
            # kept one sample is computed and multiplied by 0, so that every parameter gets its (zero) gradient.
            if count == 0 and not self._has_batch_norm and batch > 0:
                self._draw = _Draw(batch, order[:1], torch.zeros_like(scale))
                return x.index_select(0, order[:1])
            if count < batch:
                self._draw = _Draw(batch, None, (order.argsort() < count) * scale)
            elif self.rate > 0.0:
                self._draw = _Draw(batch, None, scale.expand(batch).to(x.device))
            else:
                self._draw = _Draw(batch, None, torch.ones(batch, dtype=x.dtype, device=x.device))
            return None
        kept = order[:count]
        self._draw = _Draw(batch, kept, scale)
        return x.index_select(0, kept)

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of kept samples (0-dim, CPU) and a random order of the samples, of which the first are kept."""
        return self._draw_count(batch), torch.rand(batch, device=device).argsort()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._skips:
            if self.role == "silent" or (self.role == "block" and self._draw is None):
                return x
            if self.role == "block":
                return x
            if self.role == "branch" and self._draw is not None:
                draw, self._draw = self._draw, None
                return draw.scatter(x)
        return super().forward(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None}


@dataclass(frozen=True)
class _Draw:
    """One draw on its way from the beginning of a branch or block to its end."""

    batch: int
    kept: Tensor | None  # indices; None: all samples were computed and `scale` is (B,)
    scale: Tensor

    def scatter(self, out: Tensor) -> Tensor:
        """The branch's output for the kept samples (B', ...) -> (B, ...) with zeros for the dropped."""
        if self.kept is None:
            return out * self.scale.to(out.dtype).view(-1, *(1,) * (out.ndim - 1))
        zeros = out.new_zeros(self.batch, *out.shape[1:])
        return zeros.index_add(0, self.kept, out * self.scale.to(out.dtype))


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
    """Forward pre-hook and hook of a block whose input and output have one shape: skips the block as a whole."""

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path
        self.inputs: list[Tensor] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the full batch aside and hands on the kept samples."""
        self.inputs.clear()
        if not args or not isinstance(args[0], Tensor):
            return None
        selected = self.drop_path.select(args[0])
        if self.drop_path._draw is not None:
            self.inputs.append(args[0])
        return None if selected is None else (selected, *args[1:])

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        """x + scattered (block(x) - x)."""
        draw, self.drop_path._draw = self.drop_path._draw, None
        if draw is None or not self.inputs:
            return None
        x = self.inputs.pop()
        part = x if draw.kept is None else x.index_select(0, draw.kept)
        if not isinstance(out, Tensor) or out.shape != part.shape:
            raise ValueError("a block can be skipped only where its input and output have one shape")
        return x + draw.scatter(out - part)

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
            owners.append(Owner(name, module, slots))
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


def graft(model: nn.Module) -> None:
    """Puts a `GraftedDropPath` into every place for one. State-dict keys and evaluation stay as they are."""
    for owner in find_owners(model):
        for key, child in owner.slots.items():
            if not isinstance(child, DropPath):
                rate = getattr(child, "drop_prob", getattr(child, "p", 0.0)) or 0.0
                owner.module.__dict__.pop(key, None)
                grafted = GraftedDropPath(float(rate))
                grafted.train(owner.module.training)
                setattr(owner.module, key, grafted)


# ---- converting to skip ---------------------------------------------------------------------------------------------


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
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        calls = _watch(model, owners, input_size, parameter)
        found: dict[Any, dict[str, Any]] = {}
        conversions = []
        for owner in owners:
            conversion = Conversion(owner.name)
            if owner.name not in calls:
                conversion.roles = dict.fromkeys(owner.slots, "mask")
                conversion.reason = "not called in a probe forward"
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


def _watch(
    model: nn.Module, owners: list[Owner], input_size: Sequence[int], parameter: nn.Parameter
) -> dict[str, _Call]:
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
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(torch.randn(3, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
    return calls


class _FixedDraw(GraftedDropPath):
    """For trials: keeps samples 0 and 2 of three."""

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        assert batch == 3
        return torch.tensor(2), torch.tensor([2, 0, 1], device=device)

    def _draw_mask(self, x: Tensor) -> Tensor:
        return torch.tensor([True, False, True], device=x.device)


def _try(owner: Owner, call: _Call) -> dict[str, Any]:
    """How an owner of this structure can skip: the first module of each branch, or the block, or a reason."""
    if call.times > 1:
        return {"reason": "called more than once in a forward pass"}
    entries: dict[str, str] = {}
    failure = ""
    for slot in owner.slots:
        for entry in call.candidates.get(slot, [])[:CANDIDATES]:
            failure = _disagreement(owner, call, {slot: entry})
            if not failure:
                entries[slot] = entry
                break
    if len(entries) == len(owner.slots):
        return {"entries": entries}
    failure = _disagreement(owner, call, None)
    if not failure:
        return {"block": True, "reason": "its branches cannot be skipped one by one"}
    return {"entries": entries, "reason": f"neither branches nor block agree with masking: {failure}"}


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
            if parameter.ndim <= 1 or parameter.numel() == parameter.shape[-1] or max(parameter.shape) == parameter.numel():
                parameter.uniform_(0.5, 1.5)  # a layer scale of 1e-6 would hide any error
    tested = list(owner.slots) if entries is None else list(entries)
    for slot in owner.slots:
        module = trial.get_submodule(slot)
        assert isinstance(module, GraftedDropPath)
        module.__class__ = _FixedDraw
        module.mode, module.drop_prob = "skip", 0.5 if slot in tested else 0.0
        module.role = "mask" if slot in tested else "silent"
    try:
        expected = _run(trial, call)
    except Exception as error:  # somebody's code may raise anything
        return f"masking failed with {type(error).__name__}"
    first = trial.get_submodule(tested[0])
    assert isinstance(first, GraftedDropPath)
    if entries is None:
        _hook_block(trial, first)
        for slot in tested:
            trial.get_submodule(slot).role = "block" if slot == tested[0] else "silent"  # type: ignore[assignment]
    else:
        for slot, entry in entries.items():
            module = trial.get_submodule(slot)
            assert isinstance(module, GraftedDropPath)
            _hook_branch(trial, entry, module)
    try:
        result = _run(trial, call)
    except Exception as error:
        return f"{type(error).__name__} when given the kept samples only"
    for a, b in zip(result, expected, strict=True):
        if (a is None) != (b is None):
            return "another gradient is missing"
        if a is None or b is None:
            continue
        if a.shape != b.shape or not bool(((a - b).abs() <= TOLERANCE * (b.abs().max() + 1e-6)).all()):
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
    for slot in slots.values():
        slot._has_batch_norm = norms
    conversion.reason = found.get("reason", "")
    if found.get("block"):
        first = next(iter(slots))
        _hook_block(owner.module, slots[first])
        conversion.roles = {key: "block" if key == first else "silent" for key in slots}
    else:
        entries = found.get("entries", {})
        for key, slot in slots.items():
            if key in entries:
                _hook_branch(owner.module, entries[key], slot)
        conversion.roles = {key: "branch" if key in entries else "mask" for key in slots}
    for key, slot in slots.items():
        slot.role = conversion.roles[key]


def _hook_branch(owner: nn.Module, entry: str, drop_path: GraftedDropPath) -> None:
    drop_path.role = "branch"
    owner.get_submodule(entry).register_forward_pre_hook(SelectKept(drop_path))


def _hook_block(owner: nn.Module, drop_path: GraftedDropPath) -> None:
    skip = BlockSkip(drop_path)
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
