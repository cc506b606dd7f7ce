"""Learned scale per channel: LayerScale on a branch (arXiv 2103.17239), ResScale on a shortcut (arXiv 2110.09456)."""

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Multiplies (B, ..., C) by a learned vector (C,).

    Args:
        dim: Channels C.
        init_value: Value of every entry at the start.
    """

    def __init__(self, dim: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


def build_scale(dim: int, init_value: float | None) -> nn.Module:
    """A `Scale`, or the identity where init_value is `None`."""
    return nn.Identity() if init_value is None else Scale(dim, init_value)
