"""Drop-path modules and hooks grafted onto a foreign model, so that it skips what it drops."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers.branches import takes_batch_statistics
from layers.draw import Draw
from layers.drop_path import DropPath, Mode
from layers.samples import replace_samples
from stochastic_depth.hooks import TrainingHooks, Way, take_off
from stochastic_depth.inside import KeepStatistics, Parts, keep_statistics
from stochastic_depth.law import bounded, drop_law
from stochastic_depth.places import Owner, branch_ends, find_owners, is_identity, misplaced, unknown_modules
from stochastic_depth.standing import Standing

Role = Literal["mask", "branch", "block", "silent"]


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
        way: What is on its way from the beginning of a branch or block to its end.
        hooks: By which its branches or its block skip. They are off in evaluation, however that was set.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True, mode: Mode = "mask") -> None:
        super().__init__(drop_prob, scale_by_keep, mode)
        self.role: Role = "mask"
        self.batch_dim: int | None = 0  # None: no dimension holds samples
        self.parts = 1
        self.reason = ""  # why it does not skip, or skips with its whole block
        self.tried = False  # whether `convert_to_skip` has looked at it
        self.as_tried: Standing | None = None  # its block as that looked at it
        self.applied = True  # whether a forward pass calls it at all: blocks without a shortcut do not
        self.begins: tuple[Entry, ...] = ()
        self.takes_nothing = False
        self.has_batch_norm = False
        self.way = Way()
        self.hooks = TrainingHooks()
        self.hooks.put(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and "hooks" in self.__dict__:  # by train(), eval(), or whoever restores what was
            self.hooks.put(value)
            self.way.draw = None

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation."""
        return super().skips and self.role != "mask"

    def skips_here(self) -> bool:
        """`skips` in the code that runs, as in `DropPath`."""
        return super().skips_here() and self.role != "mask"

    @property
    def least(self) -> int:  # type: ignore[override]
        """Samples that a branch is given when none is kept."""
        return 0 if self.takes_nothing else 1

    def least_on(self, device: torch.device) -> int:
        """`least`; one on a GPU, where not all that takes no sample on a CPU does so too."""
        return 1 if device.type == "cuda" else self.least

    def select(self, x: Tensor, parts: Parts | None, groups: int = 1) -> Tensor:
        """Draws, remembers the draw for the branch's end, and returns the samples to compute.

        Args:
            x: First argument of the branch or block, (B * groups, ...).
            parts: What runs until its end; `None`: it masks in this call.
            groups: Rows of x, one behind the other, that are one sample.
        """
        self.way.draw = None  # an exception may have left one
        if not self.training or not self.skips_here() or not x.shape[0]:
            return x
        draw = self.way.draw = self.draw(x, parts, groups=groups)
        return draw.take(x, groups)

    def norms_of(self, runs: Parts, count: int) -> Sequence[nn.Module]:
        """The batch norms that take statistics of what they are given."""
        if norms := runs.norms():
            self.warn_of_batch_norm()
        return norms

    def masks_compiled(self, runs: Parts) -> bool:
        """Whether compiled code masks a branch, since one of its parts wants to know its batch."""
        return runs.masked_compiled

    def forward_training(self, x: Tensor) -> Tensor:
        """Multiplies or scatters a branch's output by the draw that was made in front of it, if one was."""
        if self.batch_dim:
            return super().forward_training(x.movedim(self.batch_dim, 0)).movedim(0, self.batch_dim)
        draw = self.way.draw
        if self.role == "mask" or draw is None:
            return super().forward_training(x)
        if self.role == "branch":
            self.way.draw = None
            return draw.put_scaled(x)
        return draw.scaled(x)  # inside a block that is skipped as a whole


# TorchScript compiles properties unless they are named here.
GraftedDropPath.__jit_unused_properties__ = [*DropPath.__jit_unused_properties__, "least"]  # type: ignore[attr-defined]


def beside_samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int | str]:
    """Which arguments of a block hold a tensor with a row for each sample, as the first argument does."""
    if not args or not isinstance(args[0], Tensor) or not args[0].ndim or args[0].shape[0] < 2:
        return []
    rows, found = args[0].shape[0], []
    for name, value in (*enumerate(args[1:], start=1), *kwargs.items()):
        values = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(v, Tensor) and v.ndim and v.shape[0] == rows for v in values):
            found.append(name)
    return found


def is_given_more(known: Collection[int | str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a block is given a tensor with a row for each sample that it was not given in its trial."""
    return any(name not in known for name in beside_samples(args, kwargs))


class Around:
    """Forward pre-hook and hook of the block around a branch: say when it runs, and on how many samples.

    Only then does the branch's first module hand on a selection: others may call it too, such as a block that shares a
    norm with this one, or a model whose last norm is that of its last block. And where the block is given more that has a
    row for each sample than it was in its trial (`known`), such as a mask of attention, its branch masks in this call.
    """

    def __init__(
        self, block: nn.Module, drop_path: GraftedDropPath, entries: "Sequence[Entry]", known: Collection[int | str]
    ) -> None:
        self.block = block
        self.drop_path = drop_path
        inside = {part for entry in entries for part in (entry.inner if entry.alone else entry.parts)}
        self.standing = Standing(block, [drop_path], [block.get_submodule(entry.part) for entry in entries], inside)
        self.windows = any(entry.windows for entry in entries)
        self.known = known
        self.runs = False
        self.replaced = False
        self.masks = False  # in this call

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The block begins; where its branch begins with windows of samples, how many samples there are is noted."""
        if self.drop_path.training:
            self.replaced = self.standing.replaced()
            self.runs = not self.replaced
            self.masks = is_given_more(self.known, args, kwargs)
        if self.windows:
            self.drop_path.way.batch_around = args[0].shape[0]

    def after(self, _module: nn.Module, _args: tuple[Any, ...], _out: object) -> None:
        """The block has ended, or was left by an exception."""
        self.runs = False

    def selects(self) -> bool:
        """Whether a call of the branch's first module is the block's own, or that of a checkpoint inside it, which a
        backward pass runs again without the block."""
        if self.replaced:
            return False
        return self.runs or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runs": False}


class SelectKept:
    """Forward pre-hook of the first module of a branch, whose first argument holds samples or windows of samples."""

    def __init__(self, around: Around, parts: Parts, *, windows: bool = False) -> None:
        self.around = around
        self.block = around.block
        self.drop_path = around.drop_path
        self.parts = parts
        self.windows = windows

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.drop_path.training or not self.around.selects():  # no time to lose in evaluation
            self.drop_path.way.draw = None
            return None
        if not args or not isinstance(args[0], Tensor):
            return None
        groups = args[0].shape[0] // self.drop_path.way.batch_around if self.windows else 1
        selected = self.drop_path.select(args[0], None if self.around.masks else self.parts, groups)
        return None if selected is args[0] else (selected, *args[1:])


class SkipModule:
    """Hooks of one module, where the code around it wants the full batch: computes it for the kept samples only."""

    def __init__(self, around: Around, parts: Parts, *, windows: bool = False) -> None:
        self.select = SelectKept(around, parts, windows=windows)
        self.block = around.block
        self.drawn: Draw | None = None
        self.groups = 1  # rows of a sample

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hands on the kept samples, and leaves a mask of the full batch for the branch's end."""
        selected, way = self.select(module, args), self.select.drop_path.way
        self.drawn = way.draw
        if self.drawn is not None:
            self.groups = args[0].shape[0] // self.drawn.batch
            way.draw = self.drawn.as_mask()
        return selected

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The kept samples' results in their places, zeros in the others."""
        draw, self.drawn = self.drawn, None
        return None if draw is None else draw.put(out, self.groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "drawn": None}


class ApplyAfter:
    """Forward hook of a branch's last module, in a block that has no place of its own for stochastic depth.

    It calls what stands in the place that the block was given, whatever that is.
    """

    def __init__(self, block: nn.Module, place: str) -> None:
        self.block = block
        self.place = place

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        drop_path = self.block._modules.get(self.place)
        return out if drop_path is None else drop_path(out)


class BlockSkip:
    """Forward pre-hook and hook of a block whose input and output have one shape: skips all its branches together."""

    def __init__(self, drop_paths: Sequence[GraftedDropPath], parts: Parts, known: Collection[int | str]) -> None:
        self.drop_paths = list(drop_paths)  # the first draws for all
        self.block = parts.block
        self.standing = Standing(parts.block, drop_paths, inside=parts.names)
        self.parts = parts
        self.known = known  # as in `Around`
        self.inputs: list[Tensor] = []

    def before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keeps the full batch aside and hands on the kept samples."""
        self.inputs.clear()
        if not self.drop_paths[0].training:
            self.drop_paths[0].way.draw = None
            return None
        if self.standing.replaced():
            for module in self.drop_paths:
                module.way.draw = None
            return None
        if not args or not isinstance(args[0], Tensor):
            return None
        first, *others = self.drop_paths
        masks = is_given_more(self.known, args, kwargs)
        selected = first.select(args[0], None if masks else self.parts)
        draw = first.way.draw
        for other in others:
            other.way.draw = draw
        if draw is None or draw.kept is None:
            return None
        self.inputs.append(args[0])
        return (selected, *args[1:]), kwargs

    def after(self, _module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        """The full batch with the kept samples' results in their places."""
        draw = self.drop_paths[0].way.draw
        for module in self.drop_paths:
            module.way.draw = None
        if draw is None or draw.kept is None or not self.inputs:
            return None
        x = self.inputs.pop()
        if not isinstance(out, Tensor) or out.shape != (len(draw.kept), *x.shape[1:]):
            raise ValueError("a block can be skipped only where its input and output have one shape")
        return replace_samples(x.to(out.dtype), draw.kept, out)

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
        new = False
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
            _apply_after(owner, key)
            new = True
        if new:
            take_off_hooks(owner)


def apply_again(model: nn.Module) -> None:
    """Has a block tried anew where somebody has replaced or added modules, as converting batch norms does.

    Of a block without a place of its own the ends of the branches are found again.
    """
    for owner in find_owners(model):
        slots = {key: slot for key, slot in owner.slots.items() if isinstance(slot, GraftedDropPath)}
        changed = any(slot.as_tried is not None and not slot.as_tried.untouched() for slot in slots.values())
        if any([_apply_after(owner, key) for key in slots]) or changed:
            take_off_hooks(owner)


def _apply_after(owner: Owner, key: str) -> bool:
    """Has a slot called behind its branch, in a block without a place of its own for stochastic depth.

    Returns:
        Whether it was not yet.
    """
    if not branch_ends(owner.module):
        return False
    last = owner.module.get_submodule(key.removeprefix("drop_path_"))
    if any(isinstance(hook, ApplyAfter) for hook in last._forward_hooks.values()):
        return False
    last.register_forward_hook(ApplyAfter(owner.module, key))
    return True


def take_off_hooks(owner: Owner) -> None:
    """Takes off that by which a block skips, where one of its drop-path modules is new, so that it is tried anew."""
    kinds = (Around, SelectKept, SkipModule, BlockSkip, KeepStatistics)
    for module in owner.module.modules():
        for before, hooks in ((True, module._forward_pre_hooks), (False, module._forward_hooks)):
            for number, hook in [*hooks.items()]:
                itself = getattr(hook, "__self__", hook)
                if isinstance(itself, kinds) and itself.block is owner.module:
                    take_off(module, number, before=before)
    for slot in map(owner.module.get_submodule, owner.slots):
        if isinstance(slot, GraftedDropPath):
            slot.hooks.clear()
            slot.way.draw = None
            slot.role, slot.begins, slot.reason, slot.tried, slot.has_batch_norm = "mask", (), "", False, False


@dataclass(frozen=True)
class Entry:
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

    @property
    def inner(self) -> tuple[str, ...]:
        """The first module of it and what runs in that."""
        return tuple(part for part in self.parts if f"{part}.".startswith(f"{self.part}."))


def hook_branch(
    owner: nn.Module, entries: Sequence[Entry], drop_path: GraftedDropPath, known: Collection[int | str] = ()
) -> None:
    """Hooks that skip one slot's branches; `known` names arguments that held a row for each sample when that was tried."""
    drop_path.role, drop_path.begins = "branch", tuple(entries)
    around = Around(owner, drop_path, entries, known)
    hooks = drop_path.hooks
    hooks.add(owner, around.before, before=True, with_kwargs=True)
    hooks.add(owner, around.after, before=False, always_call=True)
    for entry in entries:
        first = owner.get_submodule(entry.part)
        if entry.alone:
            parts = Parts(owner, entry.inner, drop_path.way, hooks)
            skip = SkipModule(around, parts, windows=entry.windows)
            hooks.add(first, skip.before, before=True)
            hooks.add(first, skip.after, before=False)
        else:
            parts = Parts(owner, entry.parts, drop_path.way, hooks)
            hooks.add(first, SelectKept(around, parts, windows=entry.windows), before=True)
        drop_path.has_batch_norm |= bool(parts.found)
    _keep_statistics(owner, {part for entry in entries for part in entry.parts}, drop_path)


def hook_block(owner: nn.Module, drop_paths: Sequence[GraftedDropPath], known: Collection[int | str] = ()) -> None:
    """Hooks that skip a whole block; `known` as of `hook_branch`."""
    names = [name for name, _ in owner.named_modules() if name]
    parts = Parts(owner, names, drop_paths[0].way, drop_paths[0].hooks)
    skip = BlockSkip(drop_paths, parts, known)
    for i, module in enumerate(drop_paths):
        module.role = "block" if i == 0 else "silent"
        module.has_batch_norm = bool(parts.found)
    hooks = drop_paths[0].hooks
    hooks.add(owner, skip.before, before=True, with_kwargs=True)
    hooks.add(owner, skip.after, before=False)
    _keep_statistics(owner, names, drop_paths[0])


def _keep_statistics(owner: nn.Module, names: Collection[str], drop_path: GraftedDropPath) -> None:
    for name, module in owner.named_modules():
        if name in names and takes_batch_statistics(module):
            keep_statistics(owner, module, drop_path.way, drop_path.hooks)


def grafted(model: nn.Module) -> Iterator[GraftedDropPath]:
    """The grafted modules of a model."""
    return (m for m in model.modules() if isinstance(m, GraftedDropPath))


def role_of(module: DropPath) -> Role | None:
    """What a grafted module does where its mode skips; `None` for one in a block of ours."""
    return module.role if isinstance(module, GraftedDropPath) else None


def is_applied(module: DropPath) -> bool:
    """Whether a forward pass calls a module: blocks without a shortcut do not."""
    return not isinstance(module, GraftedDropPath) or module.applied
