"""Whether modules that a block skips by still stand there; anybody may replace one afterwards."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn


class Standing:
    """Whether drop-path modules of a block, and those that its branches begin with, still stand where hooks found them.

    Where somebody has put others there, what stands there works as it is, and hooks leave its branch alone: it runs on all
    samples.
    """

    def __init__(self, block: nn.Module, drop_paths: Sequence[nn.Module], beginnings: Sequence[nn.Module] = ()) -> None:
        names = {id(module): name for name, module in block.named_modules()}
        self.block = block
        self.places = [
            (names[id(module)].split("."), module, module in drop_paths)
            for module in (*drop_paths, *beginnings)
            if module is not block
        ]
        self.warned = False

    def replaced(self) -> bool:
        """Whether one of them has been replaced, which is warned about once."""
        for path, module, drops in self.places:
            found: nn.Module | None = self.block
            for part in path:
                found = None if found is None else found._modules.get(part)
            if found is not module:
                if not self.warned and not torch.compiler.is_compiling():
                    self.warned = True
                    warnings.warn(self._words(".".join(path), drops), stacklevel=2)
                return True
        return False

    def _words(self, place: str, drops: bool) -> str:
        where = f"{place} of a {type(self.block).__name__}"
        if not drops:
            return (
                f"{where}, where its branch begins, was replaced after set_drop_path: the branch does not skip until "
                "set_drop_path is called again"
            )
        return (
            f"{where} was replaced after set_drop_path: what stands there now works as it is, and its branch does not "
            "skip; to have it skip, put nn.Identity() there and call set_drop_path again"
        )
