"""Channel MLP of a block, MLP head of a classifier, and the activations they use, for (B, ..., C)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import fast_cuda
from layers.fast import are_plain, is_linear, scaled, takes
from layers.fast_mlp import mlp
from layers.norm import LayerNorm


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learned scalars s and b (MetaFormer Baselines, arXiv 2210.13452, section 2.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        relu = F.relu(x)
        return self.scale.to(x.dtype) * (relu * relu) + self.bias.to(x.dtype)  # autocast makes square() float32

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, of any shape: on a GPU."""
        return takes(x) and x.device.type == "cuda" and are_plain(self.scale, self.bias) and fast_cuda.has_kernels(x)

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The activation in one pass, with `is_fast(x)`."""
        return fast_cuda.star_relu(x, self.scale, self.bias)


class SquaredReLU(nn.Module):
    """relu(x)^2 (Primer, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        relu = F.relu(x)
        return relu * relu


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
    first, last = "fc1", "fc2"  # as in layers.token_mixers.TokenMixer

    def __init__(self, dim: int, ratio: float = 4.0, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = build_act(act)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_scaled(x, None)
        return self.fc2(self.act(self.fc1(x)))

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_scaled` may take x, (B, ..., C)."""
        return is_fast_mlp(x, self.fc1, self.act, self.fc2)

    @torch.jit.unused
    def forward_scaled(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """This MLP times a scale per channel, with `is_fast(x)`: the scale goes into the last layer's weights.

        Args:
            x: (B, ..., C).
            scale: (C,), or `None` for 1.
        """
        return fast_mlp(x, self.fc1, self.act, self.fc2, scale)


def is_fast_mlp(x: Tensor, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> bool:
    """Whether `fast_mlp` may take an input, (..., C), past these modules."""
    return takes(x, fc1, act, fc2) and is_linear(fc1, fc2) and _name_of(act) is not None


def fast_mlp(x: Tensor, fc1: Any, act: nn.Module, fc2: Any, scale: Tensor | None = None) -> Tensor:
    """fc2(act(fc1(x))) * scale, (..., C) -> (..., D), with `is_fast_mlp`.

    The scale is put into the second layer's weights, which is less work, and on a CPU StarReLU's two numbers are too.

    Args:
        x: (..., C).
        fc1: First linear layer.
        act: Activation.
        fc2: Second linear layer.
        scale: (D,), or `None` for 1.
    """
    name, weight, bias = _name_of(act), fc2.weight, fc2.bias
    assert name is not None
    if x.device.type != "cpu":
        return F.linear(act(F.linear(x, fc1.weight, fc1.bias)), *scaled(weight, bias, scale))
    if isinstance(act, StarReLU):
        shift = act.bias.clone() * weight.sum(1)  # a product keeps it: its own may be changed in place, as of torch
        weight, bias = weight * act.scale, shift if bias is None else bias + shift
    weight, bias = scaled(weight, bias, scale)
    return mlp(x, fc1.weight, fc1.bias, weight, bias, name)


def _name_of(act: nn.Module) -> str | None:
    """What `layers.fast` calls an activation, StarReLU without its scale and bias; `None`: it does not know it."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu", SquaredReLU: "squared_relu", StarReLU: "squared_relu"}.get(type(act))


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
