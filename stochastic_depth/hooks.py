"""What hooks by which a model skips hand on, and how they are on their modules in training only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from layers.draw import Draw


@dataclass
class Way:
    """What is on its way from the beginning of a branch or block to its end. A copy of it is one with nothing on it.

    Not in attributes of the module, which cost more to set.

    Attributes:
        draw: The draw that was made at the beginning.
        batch_around: Samples of the block around it, where its branch begins with windows of samples.
    """

    draw: Draw | None = None
    batch_around: int = 0

    def __reduce__(self) -> tuple[type["Way"], tuple[()]]:
        return Way, ()


# Where a module holds its pre-hooks and its hooks, and what it knows of them, by their numbers.
_STORES = {
    True: ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    False: ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


@dataclass
class _Hook:
    """One hook of a module.

    Attributes:
        module: Whose it is.
        before: Whether it is a pre-hook.
        number: By which torch knows it.
        entries: What the module's stores hold of it while it is off.
    """

    module: nn.Module
    before: bool
    number: int
    entries: dict[str, Any]

    def take_off(self) -> None:
        """Takes it off its module."""
        self.entries = take_off(self.module, self.number, before=self.before)


class TrainingHooks:
    """Forward hooks of some modules, all on or all off: in training only, evaluation is that of the untouched model.

    A module with hooks takes torch's slow way of calling it, which small inputs feel, and TorchScript refuses hooks that
    are not written for it. The order among hooks of one module is that in which they were put on. A hook keeps its number,
    since compiled code asks for it: with another one it would be compiled anew after every evaluation.
    """

    def __init__(self) -> None:
        self.on = False
        self.hooks: list[_Hook] = []

    def add(self, module: nn.Module, hook: Callable[..., Any], *, before: bool, **options: bool) -> None:
        """Adds one, which is on if the others are.

        Args:
            module: Whose hook it is.
            hook: As of `register_forward_pre_hook` or `register_forward_hook`.
            before: Whether it is a pre-hook.
            options: Of the function that registers it.
        """
        register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
        self.hooks.append(_Hook(module, before, register(hook, **options).id, {}))
        if not self.on:
            self.hooks[-1].take_off()

    def put(self, on: bool) -> None:
        """Puts all on their modules, or takes them off."""
        if on == self.on:
            return
        self.on = on
        for hook in self.hooks:
            if not on:
                hook.take_off()
                continue
            for name, entry in hook.entries.items():
                getattr(hook.module, name)[hook.number] = entry
            hook.entries = {}

    def clear(self) -> None:
        """Takes all off for good; later ones are put on as those were."""
        for hook in self.hooks:
            hook.take_off()
        self.hooks.clear()

    def modules(self) -> list[nn.Module]:
        """Whose hooks there are."""
        return [hook.module for hook in self.hooks]

    def state(self) -> tuple[bool, list[_Hook]]:
        """What there is, for `restore`."""
        return self.on, [replace(hook) for hook in self.hooks]

    def restore(self, state: tuple[bool, list[_Hook]]) -> None:
        """Makes it what it was, when somebody has put back the modules' own hooks."""
        self.on, self.hooks = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # in another process torch may not have given out these numbers yet
        RemovableHandle.next_id = max([RemovableHandle.next_id, *(hook.number + 1 for hook in self.hooks)])


def take_off(module: nn.Module, number: int, *, before: bool) -> dict[str, Any]:
    """Takes a hook, or pre-hook, off a module.

    Returns:
        What the module's stores held of it, by their names.
    """
    stores = {name: getattr(module, name) for name in _STORES[before]}
    return {name: store.pop(number) for name, store in stores.items() if number in store}
