"""Whether drop-path modules that were put into a block still stand there; anybody may replace one afterwards."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn


class Standing:
    """Whether drop-path modules of a block still stand where hooks found them, or somebody has put others there.

    Then what stands there works as it is, and hooks leave its branch alone: it runs on all samples.
    """

    def __init__(self, block: nn.Module, drop_paths: Sequence[nn.Module]) -> None:
        names = {id(module): name for name, module in block.named_modules()}
        self.block = block
        self.places = [(names[id(module)].split("."), module) for module in drop_paths]
        self.warned = False

    def replaced(self) -> bool:
        """Whether one of them has been replaced, which is warned about once."""
        for path, module in self.places:
            found: nn.Module | None = self.block
            for part in path:
                found = None if found is None else found._modules.get(part)
            if found is not module:
                if not self.warned and not torch.compiler.is_compiling():
                    self.warned = True
                    warnings.warn(
                        f"{'.'.join(path)} of a {type(self.block).__name__} was replaced after set_drop_path: what stands "
                        "there now works as it is, and its branch does not skip; to have it skip, put nn.Identity() there "
                        "and call set_drop_path again",
                        stacklevel=2,
                    )
                return True
        return False
