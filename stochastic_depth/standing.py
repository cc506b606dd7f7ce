"""Whether what a block skips by is still what was tried; anybody may replace or add modules afterwards."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from layers.branches import takes_batch_statistics
from layers.drop_path import DropPath


class Standing:
    """Whether drop-path modules of a block, those that its branches begin with, and those inside still stand where hooks
    found them, and whether the block's code is still that.

    Where somebody has put others there, what stands there works as it is, and hooks leave its branch alone: it runs on all
    samples. Nothing else would be right: what was proven was proven of the modules that stood there. Only a batch norm in
    the place of another, as torch puts synchronised and others put frozen ones, is no change.

    Args:
        block: Whose modules they are.
        drop_paths: Those that drop.
        beginnings: Those that branches begin with.
        inside: Names of those that run from there to the end; what is in them counts too.
    """

    def __init__(
        self,
        block: nn.Module,
        drop_paths: Sequence[nn.Module],
        beginnings: Sequence[nn.Module] = (),
        inside: Collection[str] = (),
    ) -> None:
        names = {id(module): name for name, module in block.named_modules()}
        self.block = block
        self.places = [
            (names[id(module)].split("."), module, module in drop_paths)
            for module in (*drop_paths, *beginnings)
            if module is not block
        ]
        parts = {name: block.get_submodule(name) for name in inside}
        # a drop-path module inside is another block's place, and draws for itself whatever it is
        self.inside = {name: module for name, module in parts.items() if not isinstance(module, DropPath)}
        self.children = {name: set(module._modules) for name, module in self.inside.items() if _holds(module)}
        self.held = _held(block)
        self.forward: Any = _forward_of(block)
        self.own_forward = block.__dict__.get("forward")  # what somebody has put over it in this block alone
        self.warned = False

    def replaced(self) -> bool:
        """Whether any of it has changed so that what was proven no longer holds, which is warned about once."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self._is_untouched():
            return False
        if (words := self._changed()) is None:
            if not compiling:
                self.held = _held(self.block)  # from now on it is looked at quickly again
            return False
        if not self.warned and not compiling:
            self.warned = True
            warnings.warn(f"{words[0]} of a {type(self.block).__name__}{words[1]}", stacklevel=2)
        return True

    def untouched(self) -> bool:
        """Whether the very modules stand inside that stood there, and no others, and the block has the code that it had."""
        return self._has_its_code() and all(
            found is module and not self._added(name, module) for name, module, found in self._found()
        )

    def _is_untouched(self) -> bool:
        """Whether nothing at all has changed: what every step asks, so it takes two microseconds."""
        for module, children in self.held:  # no all(...), which takes half as long again
            if module._modules != children:
                return False
        return self._has_its_code()

    def _has_its_code(self) -> bool:
        block = self.block
        is_its = type(block).forward is self.forward or _forward_of(block) is self.forward
        return is_its and block.__dict__.get("forward") is self.own_forward

    def _found(self) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
        """By name what stood in each place inside, and what stands there."""
        for name, module in self.inside.items():
            yield name, module, _at(self.block, name.split("."))

    def _changed(self) -> tuple[str, str] | None:
        """What has changed, and what follows from it, in words; `None` where nothing has that matters here."""
        for path, module, drops in self.places:
            if _at(self.block, path) is not module:
                return ".".join(path), _AFTER_DROP_PATH if drops else f", where its branch begins, {_AFTER_PART}"
        for name, module, found in self._found():
            if found is None or not (found is module or _is_norm_for_norm(module, found)):
                return name, f", inside its branch, {_AFTER_PART}"
            if added := self._added(name, found):
                return added, f", inside its branch, {_AFTER_PART.replace('replaced', 'added')}"
        return None if self._has_its_code() else ("forward", f" {_AFTER_PART}")

    def _added(self, name: str, module: nn.Module) -> str:
        """The first part of a module that it did not hold, by name; an empty text where there is none."""
        if name not in self.children:
            return ""
        return next((f"{name}.{key}" for key in module._modules if key not in self.children[name]), "")

    def __getstate__(self) -> dict[str, Any]:
        # not the class's code, which somebody may have put there from where pickle does not find it
        return {key: value for key, value in self.__dict__.items() if key != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forward = _forward_of(self.block)


_AFTER_PART = "was replaced after set_drop_path: the branch does not skip until set_drop_path is called again"
_AFTER_DROP_PATH = (
    " was replaced after set_drop_path: what stands there now works as it is, and its branch does not "
    "skip; to have it skip, put nn.Identity() there and call set_drop_path again"
)


def _forward_of(block: nn.Module) -> Any:
    """The code of a block, past a class in front of its own that computes the same (`models.fast_layers`)."""
    kind = type(block)
    return getattr(kind, "plain", kind).forward


def _held(block: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module | None]]]:
    """What each module of a block holds at once, by name."""
    return [(module, dict(module._modules)) for module in block.modules() if _holds(module)]


def _holds(module: nn.Module) -> bool:
    """Whether a module holds others, or is made for that; of a linear layer nobody runs what is put into it."""
    return bool(module._modules) or isinstance(module, nn.Sequential)


def _at(block: nn.Module, path: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = block
    for part in path:
        found = None if found is None else found._modules.get(part)
    return found


def _is_norm_for_norm(module: nn.Module, found: nn.Module) -> bool:
    """Whether a module in the place of a batch norm is one too, or one that is frozen."""
    return takes_batch_statistics(module) and (
        takes_batch_statistics(found) or "running_var" in dict(found.named_buffers(recurse=False))
    )
