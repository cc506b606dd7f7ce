"""Stochastic depth in residual blocks that are not ours, timm's and torchvision's: the one file that knows such blocks.

Their drop-path modules are found by class name, by attribute name where an identity (or nothing) stands for rate 0, and
replaced by `GraftedDropPath`; blocks that have no place for one, or a wrong one, get it behind the last module of each
branch (`BRANCH_ENDS`). A block's own forward is left alone. To skip, the kept samples are selected in a hook in
front of the first module of a branch, and the grafted module at the branch's end scatters the result into zeros of the
full batch. Where a branch begins is found by watching one forward pass, and every conversion is then run against masking
with the same kept set, outputs and gradients, on a copy with randomised scales. What does not agree falls back to
skipping the whole block, and what does not agree then either is masked.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath, Mode, is_fixed_conv

Role = Literal["mask", "branch", "block", "silent"]

CLASS_NAMES = ("DropPath", "StochasticDepth")
ATTRIBUTE = re.compile(r"drop_path|stochastic_depth")
# Containers of what shares the rate of the block around it: branches side by side (timm's parallel ViT), and the
# transformer inside a MobileViT block.
NESTED = ("attns", "ffns", "transformer")
# Blocks that update the class token alone (CaiT, XCiT, VOLO). Their authors never drop them, so they count as no block.
CLASS_ATTENTION = ("LayerScaleBlockClassAttn", "ClassAttentionBlock", "ClassBlock")
# Residual blocks without a place for stochastic depth: by module and class, the last module of each branch, and the
# attribute that says whether there is a shortcut ("": always).
BRANCH_ENDS: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("torchvision.models.resnet", "BasicBlock"): (("bn2",), ""),
    ("torchvision.models.resnet", "Bottleneck"): (("bn3",), ""),
    ("torchvision.models.regnet", "ResBottleneckBlock"): (("f",), ""),
    ("torchvision.models.vision_transformer", "EncoderBlock"): (("dropout", "mlp"), ""),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): (("conv",), "use_res_connect"),
    ("torchvision.models.mobilenetv3", "InvertedResidual"): (("block",), "use_res_connect"),
    ("torchvision.models.mnasnet", "_InvertedResidual"): (("layers",), "apply_residual"),
    # timm's own place drops the block's input there: see MISPLACED
    ("timm.models.resnest", "ResNestBottleneck"): (("bn3",), ""),
}
MISPLACED = ("ResNestBottleneck",)
"""Classes whose own forward applies drop path to something else than a branch (timm 1.0.31)."""
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
        self._batch = 0  # of the block around it, where its branch begins with windows of samples

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation."""
        return self._skips and self.role != "mask"

    def select(self, x: Tensor, groups: int = 1) -> Tensor | None:
        """Draws, remembers the draw for the branch's end, and returns the kept samples; `None`: take all.

        `groups` rows of x, one behind the other, are one sample.
        """
        self._draw = None
        if not (self.training and self._skips_here()) or self.role == "mask" or not x.shape[0]:
            return None
        batch = x.shape[0] // groups
        count_tensor, order = self.draw(batch, x.device)
        self._count(batch, count_tensor)
        scale = self._scale(x.dtype)
        if torch.compiler.is_compiling() and (self._has_fixed_conv or self._has_batch_norm):
            self._draw = _Draw(batch, None, (order.argsort() < count_tensor) * scale)
            return None
        if self._has_batch_norm:  # with too few to take statistics of, all are computed and the others multiplied by 0
            computed_tensor = torch.where(count_tensor < 2, batch, count_tensor)
        else:
            # The block's own code may not take an empty batch: one sample is computed and multiplied by 0, so that
            # every parameter gets its (zero) gradient.
            computed_tensor = count_tensor.clamp(min=1)
        computed = int(computed_tensor.item())
        if torch.compiler.is_compiling():
            torch._check(computed >= 1)
            torch._check(computed <= batch)
        elif computed == batch:
            self._draw = _Draw(batch, None, None if self.rate == 0.0 else (order.argsort() < count_tensor) * scale)
            return None
        kept = order.narrow(0, 0, computed)
        self._draw = _Draw(batch, kept, (torch.arange(computed, device=x.device) < count_tensor) * scale)
        if groups == 1:
            return x.index_select(0, kept)
        grouped = x.reshape(batch, groups, *x.shape[1:]).index_select(0, kept)  # (B', groups, ...)
        return grouped.reshape(computed * groups, *x.shape[1:])

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of kept samples (0-dim, CPU) and a random order of the samples, of which the first are kept."""
        return self._draw_count(batch), torch.rand(batch, device=device).argsort()

    def forward_training(self, x: Tensor) -> Tensor:
        """Multiplies or scatters a branch's output by the draw that was made in front of it, if one was."""
        if self.role == "mask" or self._draw is None:
            return super().forward_training(x)
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
    kept: Tensor | None  # indices of the samples that are computed; None: all
    scale: Tensor | None  # their factors, 1 / keep_prob or 0; None: nothing is dropped

    def scaled(self, out: Tensor) -> Tensor:
        """The branch's output for those samples that are computed, each by its factor."""
        return out if self.scale is None else out * self.scale.to(out.dtype).view(-1, *(1,) * (out.ndim - 1))

    def as_mask(self) -> "_Draw":
        """The same draw for a branch that is computed in full."""
        if self.kept is None or self.scale is None:
            return self
        return replace(self, kept=None, scale=self.scale.new_zeros(self.batch).index_copy(0, self.kept, self.scale))

    def scatter(self, out: Tensor) -> Tensor:
        """The branch's scaled output for the computed samples, (B', ...) -> (B, ...) with zeros for the others."""
        out = self.scaled(out)
        return out if self.kept is None else out.new_zeros(self.batch, *out.shape[1:]).index_add(0, self.kept, out)


class NoteBatch:
    """Forward pre-hook of a block in which a branch begins with windows of samples: says how many samples there are."""

    def __init__(self, drop_path: GraftedDropPath) -> None:
        self.drop_path = drop_path

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.drop_path._batch = args[0].shape[0]


class SelectKept:
    """Forward pre-hook of the first module of a branch, whose first argument holds samples or windows of samples."""

    def __init__(self, drop_path: GraftedDropPath, *, windows: bool = False) -> None:
        self.drop_path = drop_path
        self.windows = windows

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        groups = args[0].shape[0] // self.drop_path._batch if self.windows else 1
        selected = self.drop_path.select(args[0], groups)
        return None if selected is None else (selected, *args[1:])


class SkipModule:
    """Hooks of one module, where the code around it wants the full batch: computes it for the kept samples only."""

    def __init__(self, drop_path: GraftedDropPath, *, windows: bool = False) -> None:
        self.select = SelectKept(drop_path, windows=windows)
        self.kept: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hands on the kept samples, and leaves a mask of the full batch for the branch's end."""
        selected = self.select(module, args)
        drop_path = self.select.drop_path
        self.kept = None if selected is None or drop_path._draw is None else drop_path._draw.kept
        if drop_path._draw is not None:
            drop_path._draw = drop_path._draw.as_mask()
        return selected

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The kept samples' results in their places, zeros in the others."""
        kept, self.kept = self.kept, None
        draw = self.select.drop_path._draw
        if kept is None or draw is None:
            return None
        groups = out.shape[0] // kept.shape[0]
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
        if type(module).__name__ in CLASS_ATTENTION:
            continue
        for key, child in module.named_children():
            named = isinstance(child, nn.Identity) and ATTRIBUTE.search(key)
            if isinstance(child, DropPath) or type(child).__name__ in CLASS_NAMES or named:
                slots[key] = child
        for key, value in vars(module).items():
            if value is None and ATTRIBUTE.fullmatch(key):  # timm's ResNet at rate 0
                slots[key] = None
        if ends := branch_ends(module):
            slots = {f"drop_path_{end}": getattr(module, f"drop_path_{end}", None) for end in ends}
        if slots:
            # without the part that torch.compile puts into the name: names tell blocks and stages apart
            owners.append(Owner(".".join(p for p in name.split(".") if p != "_orig_mod"), module, slots))
    return owners


def branch_ends(module: nn.Module) -> tuple[str, ...]:
    """Names of the last modules of a block's branches, where the block has no (good) place for stochastic depth."""
    ends, shortcut = BRANCH_ENDS.get((type(module).__module__, type(module).__name__), ((), ""))
    return ends if not shortcut or getattr(module, shortcut) else ()


def block_names(owners: Sequence[Owner]) -> list[str]:
    """For each owner the name of the residual block it belongs to: owners of one block share a drop-path rate.

    A block is named by its last index, that of parts which share its rate (`NESTED`) left out; owners of different
    classes that sit in one indexed container (timm's DaViT) are one block.
    """
    names = []
    for owner in owners:
        parts = owner.name.split(".")
        for i, part in enumerate(parts):
            if part in NESTED:
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


def class_attention_blocks(model: nn.Module) -> int:
    """Number of blocks that are left alone since they update the class token only (`CLASS_ATTENTION`)."""
    return sum(type(module).__name__ in CLASS_ATTENTION for module in model.modules())


def is_foreign(model: nn.Module) -> bool:
    """Whether a model has places for stochastic depth that are not ours."""
    return any(not isinstance(child, DropPath) for owner in find_owners(model) for child in owner.slots.values())


def misplaced(owner: Owner) -> bool:
    """Whether a block's own drop path is at work and drops something else than a branch."""
    return type(owner.module).__name__ in MISPLACED and isinstance(getattr(owner.module, "drop_path", None), nn.Module)


def foreign_rate(module: nn.Module | None) -> float:
    """The rate of timm's or torchvision's module; 0 for an identity or nothing."""
    return float(getattr(module, "drop_prob", getattr(module, "p", 0.0)) or 0.0)


def graft(model: nn.Module) -> None:
    """Puts a `GraftedDropPath` into every place for one. State-dict keys and evaluation stay as they are."""
    for owner in find_owners(model):
        if misplaced(owner):
            owner.module.drop_path = None  # type: ignore[assignment]
        for key, child in owner.slots.items():
            if not isinstance(child, DropPath):
                grafted = GraftedDropPath(foreign_rate(child))
                owner.module.__dict__.pop(key, None)
                grafted.train(owner.module.training)
                setattr(owner.module, key, grafted)
                if end := key.removeprefix("drop_path_") if branch_ends(owner.module) else "":
                    owner.module.get_submodule(end).register_forward_hook(ApplyAfter(grafted))


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


@dataclass(frozen=True)
class _Entry:
    """Where a branch begins.

    Attributes:
        part: The first module of it.
        windows: Whether that is given windows of samples.
        alone: Whether only this one module is skipped, since the code behind it wants the full batch.
    """

    part: str
    windows: bool = False
    alone: bool = False


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
    for part, given in sorted(call.parts, key=lambda part: part[0].count(".")):  # outer ones first; the sort is stable
        if given == rows:
            entries.append(_Entry(part))
        elif rows and rows == call.rows and given % rows == 0:
            entries.append(_Entry(part, windows=True))
    return _SlotCall(rows, entries[:CANDIDATES])


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
                calls[owner.name] = _Call(_clone(args), _clone(kwargs))

        return hook

    def note_part(owner: Owner, part: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.get(owner.name)
            if call is None or call.times > 1:
                return
            if part in owner.slots:
                call.slots.setdefault(part, []).append(_slot_call(len(args[0]), call))
                call.parts.clear()
            elif args and isinstance(args[0], Tensor) and args[0].ndim:
                call.parts.append((part, len(args[0])))

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
    """For trials: keeps samples 0 and 2 of every three."""

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        kept = [i for i in reversed(range(batch)) if i % 3 != 1]
        return torch.tensor(len(kept)), torch.tensor(kept + list(range(1, batch, 3)), device=device)

    def _draw_mask(self, x: Tensor) -> Tensor:
        return (torch.arange(len(x), device=x.device) % 3 != 1) | (self.drop_prob == 0.0)


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
    if complete and not _disagreement(owner, call, entries):
        return {"entries": entries, "kinds": kinds}
    entries = {slot: found for slot, found in entries.items() if len(found) == 1}
    often = [f"{slot} is called {len(calls)} times" for slot, calls in call.slots.items() if len(calls) > 1]
    why = "; ".join([*often, f"neither branches nor block agree with masking: {failure}"])
    return {"entries": entries, "kinds": kinds, "reason": why}


def _has_matrices(owner: Owner, first: _Entry, slot_call: _SlotCall) -> bool:
    """Whether a branch that begins at `first` holds a matrix; one that holds none is as cheap as pooling."""
    parts = [entry.part for entry in slot_call.entries]
    return any(_has_matrix(owner.module, part) for part in parts[parts.index(first.part) :])


def _has_matrix(module: nn.Module, part: str) -> bool:
    return any(p.ndim > 1 and min(p.shape[:2]) > 1 for p in module.get_submodule(part).parameters())


def _disagreement(owner: Owner, call: _Call, entries: dict[str, list[_Entry]] | None) -> str:
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


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _install(owner: Owner, found: dict[str, Any], conversion: Conversion) -> None:
    slots = {key: s for key, s in owner.slots.items() if isinstance(s, GraftedDropPath)}
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in owner.module.modules())
    conversion.reason = found.get("reason", "")
    for slot in slots.values():
        slot._has_batch_norm, slot.tried, slot.reason = norms, True, conversion.reason
        slot._has_fixed_conv = any(is_fixed_conv(m) for m in owner.module.modules())
    if found.get("block"):
        _hook_block(owner.module, list(slots.values()))
    else:
        entries = found.get("entries", {})
        for key, slot in slots.items():
            if key in entries:
                _hook_branch(owner.module, entries[key], slot)
                slot.kind = found["kinds"][key]
    conversion.roles = {key: slot.role for key, slot in slots.items()}


def _hook_branch(owner: nn.Module, entries: Sequence[_Entry], drop_path: GraftedDropPath) -> None:
    drop_path.role = "branch"
    if any(entry.windows for entry in entries):
        owner.register_forward_pre_hook(NoteBatch(drop_path))
    for entry in entries:
        first = owner.get_submodule(entry.part)
        if entry.alone:
            skip = SkipModule(drop_path, windows=entry.windows)
            first.register_forward_pre_hook(skip.before)
            first.register_forward_hook(skip.after)
        else:
            first.register_forward_pre_hook(SelectKept(drop_path, windows=entry.windows))


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
