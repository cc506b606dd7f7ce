"""Residual blocks taken out of a trained model: what stochastic depth prepares it for (Huang et al. 2016, LayerDrop of Fan
et al. 2019, arXiv 1909.11556).

A removed block is one whose every branch is dropped: what is left of it is its shortcut, and its branches are not computed.
In a block of ours that is what `DropPath.residual` is given as a shortcut (with ResScale, if the block has one). The forward
of a foreign block is not ours: it is replaced by the identity, which is right only where the block is one when all its
branches are 0. That is tried out. A block that changes the size or has a convolution as its shortcut stays.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.blocks import Block, find_blocks, model_input_size, unwrap
from stochastic_depth.graft import GraftedDropPath
from stochastic_depth.law import undisturbed
from stochastic_depth.places import is_foreign
from stochastic_depth.setting import set_drop_path


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block of a live model, for removal.

    Attributes:
        number: Its place among the residual blocks, from 1.
        name: As in `drop_path_report`.
        reason: Why it cannot be removed; empty where it can.
        modules: What is switched off: its DropPath modules, or the block itself where it is foreign.
        outputs: Of a foreign block: how many values it returns, `None` for one tensor.
    """

    number: int
    name: str
    reason: str = ""
    modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    outputs: int | None = field(default=None, repr=False, compare=False)

    @property
    def removable(self) -> bool:
        """Whether it can be removed."""
        return not self.reason


class Removed(nn.Module):
    """What stands where a foreign block was: its first arguments, as they came.

    Args:
        outputs: How many of them; `None` for the first alone.
    """

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor, *others: Any, **_named: Any) -> Any:
        return x if self.outputs is None else (x, *others)[: self.outputs]


def residual_blocks(model: nn.Module, input_size: Sequence[int] | None = None) -> list[ResidualBlock]:
    """The residual blocks of a model in order, and which of them can be removed.

    Args:
        model: Ours or a foreign one, which is prepared as by `set_drop_path` at rate 0 if it was not before.
        input_size: (C, H, W) for trying out a foreign model; default the model's, else (3, 224, 224).

    Raises:
        ValueError: There are none (`NoBlocksError`), or a foreign model does not run on images of that size.
    """
    inner = unwrap(model)
    size = input_size or model_input_size(inner) or (3, 224, 224)
    if is_foreign(inner):
        set_drop_path(inner, 0.0, mode="mask", input_size=size)
    blocks = find_blocks(inner)
    foreign = [b for b in blocks if any(isinstance(m, GraftedDropPath) for m in b.drop_paths.values())]
    returned = _try_as_identities(inner, foreign, size) if foreign else {}
    users: dict[int, list[str]] = {}
    for block in blocks:
        for key in {id(m) for m in block.drop_paths.values()}:
            users.setdefault(key, []).append(block.name)
    found = []
    for number, block in enumerate(blocks, start=1):
        if block in foreign:
            reason, outputs = returned[block.name]
            module = () if reason else (inner.get_submodule(block.name),)
            found.append(ResidualBlock(number, block.name, reason, module, outputs))
            continue
        modules = tuple(block.drop_paths.values())
        others = sorted({name for m in modules for name in users[id(m)]} - {block.name})
        reason = f"its DropPath serves {others[0]} too" if others else ""
        found.append(ResidualBlock(number, block.name, reason, modules))
    return found


@contextmanager
def removed(blocks: Sequence[ResidualBlock]) -> Iterator[None]:
    """Switches blocks off; afterwards they are as before.

    Raises:
        ValueError: One of them cannot be removed.
    """
    with ExitStack() as stack:
        for block in blocks:
            if block.reason:
                raise ValueError(f"{block.name} cannot be removed: {block.reason}")
            for module in block.modules:
                if isinstance(module, DropPath):
                    stack.enter_context(_replaced(module, residual=_shortcut, forward=torch.zeros_like))
                else:
                    stack.enter_context(_replaced(module, forward=Removed(block.outputs).forward))
        yield


def take_out(model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Puts `Removed` in the places of blocks of a foreign model, whose weights are gone then.

    Raises:
        ValueError: One of them cannot be removed.
    """
    inner = unwrap(model)
    for block in blocks:
        if block.reason or any(isinstance(m, DropPath) for m in block.modules):
            raise ValueError(f"{block.name} cannot be removed: {block.reason or 'it is no foreign block'}")
    for block in blocks:
        parent, _, key = block.name.rpartition(".")
        setattr(inner.get_submodule(parent), key, Removed(block.outputs))


def _shortcut(x: Tensor, _branch: Callable[[Tensor], Tensor], shortcut: Tensor | None = None) -> Tensor:
    """In place of `DropPath.residual`: the branch is not called."""
    return x if shortcut is None else shortcut


@contextmanager
def _replaced(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Instance attributes that hide methods for a while."""
    own = {key: vars(module)[key] for key in methods if key in vars(module)}
    vars(module).update(methods)
    try:
        yield
    finally:
        for key in methods:
            vars(module).pop(key, None)
        vars(module).update(own)


def _try_as_identities(
    model: nn.Module, blocks: Sequence[Block], input_size: Sequence[int]
) -> dict[str, tuple[str, int | None]]:
    """For each foreign block why it is no identity when its branches are 0 (or an empty text), and what it returns."""
    try:
        return _one_pass(model, blocks, input_size)
    except Exception as error:  # somebody's model may raise anything
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{type(model).__name__}: a forward pass on images of {tuple(input_size)} failed "
            f"({type(error).__name__}: {first}); give input_size=(C, H, W)"
        ) from error


def _one_pass(
    model: nn.Module, blocks: Sequence[Block], input_size: Sequence[int]
) -> dict[str, tuple[str, int | None]]:
    found: dict[str, tuple[str, int | None]] = {b.name: ("it is not called as one module", None) for b in blocks}
    given: dict[str, tuple[Any, ...]] = {}
    times: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            times[name] = times.get(name, 0) + 1
            # what a block changes in place must not change what it was given
            given[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            args = given.pop(name)
            outs = out if isinstance(out, (tuple, list)) else (out,)
            found[name] = (_no_identity(args, outs), len(outs) if isinstance(out, (tuple, list)) else None)

        return hook

    parameter = next(p for p in model.parameters() if p.is_floating_point())
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        model.eval()
        for block in blocks:
            for module in block.drop_paths.values():
                stack.enter_context(_replaced(module, forward=torch.zeros_like))
            module = model.get_submodule(block.name)
            stack.callback(module.register_forward_pre_hook(before(block.name)).remove)
            stack.callback(module.register_forward_hook(after(block.name)).remove)
        model(torch.randn(2, *input_size, device=parameter.device, dtype=parameter.dtype))
    return {
        name: (f"it is called {times[name]} times in a forward pass" if times.get(name, 1) > 1 else reason, outputs)
        for name, (reason, outputs) in found.items()
    }


def _no_identity(args: Sequence[Any], outs: Sequence[Any]) -> str:
    """Why a block that returned this is no identity; an empty text where it is one."""
    if not args or not isinstance(args[0], Tensor):
        return "its first argument is no tensor"
    first = outs[0] if outs else None
    if not isinstance(first, Tensor) or first.shape != args[0].shape:
        return "its output has another shape than its input"
    if len(outs) > len(args) or not all(map(_same, outs, args)):
        return "its shortcut is no identity"
    return ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)
