"""Channel MLP of a block, MLP head of a classifier, and the activations they use, for (B, ..., C)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.norm import LayerNorm


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learned scalars s and b (MetaFormer Baselines, arXiv 2210.13452, section 2.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.to(x.dtype) * F.relu(x).square() + self.bias.to(x.dtype)


class SquaredReLU(nn.Module):
    """relu(x)^2 (Primer, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ActName = Literal["gelu", "relu", "silu", "squared_relu", "star_relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "squared_relu": SquaredReLU,
    "star_relu": StarReLU,
}


def build_act(name: str) -> nn.Module:
    """Builds an activation; raises ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


class Mlp(nn.Module):
    """Two linear layers over channels, (B, ..., C) -> (B, ..., C).

    In channels-last layout the 1x1 convolutions of the original PoolFormer are linear layers.

    Args:
        dim: Channels C.
        ratio: Hidden channels per channel.
        act: Name of the activation.
        bias: Whether the linear layers have a bias.
    """

    kind = "mlp"  # of layers.drop_path.BREAK_EVEN
    break_even = 0.05

    def __init__(self, dim: int, ratio: float = 4.0, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = build_act(act)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MlpHead(nn.Module):
    """Classifier of ConvFormer and CAFormer, (B, C) -> (B, num_classes): linear, squared ReLU, norm, dropout, linear.

    Args:
        dim: Channels C.
        num_classes: Number of classes.
        drop_rate: Dropout before the last layer.
        ratio: Hidden channels per channel.
    """

    def __init__(self, dim: int, num_classes: int, drop_rate: float = 0.0, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = SquaredReLU()
        self.norm = LayerNorm(hidden, eps=1e-5)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.norm(self.act(self.fc1(x)))))
