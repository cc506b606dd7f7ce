"""What hooks by which a model skips hand on, and how they are on their modules in training only."""

from collections.abc import Callable
from dataclasses import dataclass
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


class TrainingHooks:
    """Forward hooks of some modules, all on or all off: in training only, evaluation is that of the untouched model.

    A module with hooks takes torch's slow way of calling it, which small inputs feel, and TorchScript refuses hooks that
    are not written for it. The order among hooks of one module is that in which they were put on.
    """

    def __init__(self) -> None:
        self.on = False
        self.made: list[tuple[nn.Module, bool, Callable[..., Any], dict[str, bool]]] = []
        self.handles: list[RemovableHandle] = []

    def add(self, module: nn.Module, hook: Callable[..., Any], *, before: bool, **options: bool) -> None:
        """Adds one, which is put on if the others are.

        Args:
            module: Whose hook it is.
            hook: As of `register_forward_pre_hook` or `register_forward_hook`.
            before: Whether it is a pre-hook.
            options: Of the function that registers it.
        """
        self.made.append((module, before, hook, options))
        if self.on:
            self._put_on(*self.made[-1])

    def put(self, on: bool) -> None:
        """Puts all on their modules, or takes them off."""
        if on == self.on:
            return
        self.on = on
        if on:
            for made in self.made:
                self._put_on(*made)
            return
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def clear(self) -> None:
        """Takes all off for good; later ones are put on as those were."""
        on = self.on
        self.put(False)
        self.made.clear()
        self.on = on

    def state(self) -> dict[str, Any]:
        """What there is, for `restore`."""
        return {key: value.copy() if isinstance(value, list) else value for key, value in vars(self).items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Makes it what it was, when somebody has put back the modules' own hooks."""
        vars(self).update(state)

    def _put_on(self, module: nn.Module, before: bool, hook: Callable[..., Any], options: dict[str, bool]) -> None:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self.handles.append(register(hook, **options))  # type: ignore[arg-type]
