"""What runs inside a branch, on the kept samples only, and what its batch norms are spared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layers.branches import batch_norms, takes_batch_statistics, wants_known_batch
from stochastic_depth.hooks import TrainingHooks, Way


class Parts:
    """Modules of a block that run on the kept samples only.

    Known by name: a batch norm may be replaced by a synchronised one at any time, and is spared as that was.

    Args:
        block: Whose they are.
        names: Their names in it.
        way: Of the drop-path module that draws for them.
        hooks: To which those of new batch norms are added.
    """

    def __init__(self, block: nn.Module, names: Sequence[str], way: Way, hooks: TrainingHooks) -> None:
        modules = {name: block.get_submodule(name) for name in names}
        self.block = block
        self.names = tuple(names)
        self.way = way
        self.hooks = hooks
        self.found = {name: module for name, module in modules.items() if takes_batch_statistics(module)}
        self.masked_compiled = any(map(wants_known_batch, modules.values()))

    def norms(self) -> list[nn.Module]:
        """Batch norms that take statistics of what they see."""
        for name, known in self.found.items():
            module = self.block.get_submodule(name)
            if module is not known:
                self.found[name] = module
                if takes_batch_statistics(module):
                    keep_statistics(self.block, module, self.way, self.hooks)
        return batch_norms(self.found.values())


class KeepStatistics:
    """Hooks of a batch norm inside a branch: with no sample kept it takes no statistics, whatever it is given.

    Not a flag set from the beginning of the branch to its end, which an exception would leave behind.
    """

    def __init__(self, block: nn.Module, way: Way) -> None:
        self.block = block
        self.way = way
        self.held = False

    def before(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Puts the batch norm into evaluation for this one call."""
        if torch.compiler.is_compiling():
            return
        draw = self.way.draw
        self.held = module.training and draw is not None and module in draw.idle
        if self.held:
            module.training = False

    def after(self, module: nn.Module, _args: tuple[Any, ...], _out: object) -> None:
        """Puts it back."""
        if not torch.compiler.is_compiling() and self.held:
            self.held = False
            module.training = True


def keep_statistics(block: nn.Module, norm: nn.Module, way: Way, hooks: TrainingHooks) -> None:
    """Puts the hooks of `KeepStatistics` on a batch norm of a block, behind those that draw: it may be the first module of
    a branch, or its last."""
    keep = KeepStatistics(block, way)
    hooks.add(norm, keep.before, before=True)
    hooks.add(norm, keep.after, before=False, always_call=True)
