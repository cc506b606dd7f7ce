"""Normalisation of channels-last activations, (B, ..., C), by name.

`group_norm` is PoolFormer's GroupNorm with one group: statistics over all positions and channels of a sample, one weight
and bias per channel. The `_no_bias` forms are those of MetaFormer Baselines (arXiv 2210.13452). `affine`
takes the norm's place in ResMLP (arXiv 2105.03404) and normalises nothing.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from layers import fast_cuda
from layers.fast_norm import has_kernel, layer_norm, narrow_layer_norm


class GroupNorm1(nn.Module):
    """Group norm with one group over (B, ..., C).

    Args:
        dim: Channels C.
        eps: Added to the variance; 1e-5 is PoolFormer's.
        bias: Whether there is a bias.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The norm with another weight and bias, (B, ..., C) to the same."""
        if not torch.jit.is_scripting() and has_kernel(x, weight, bias):
            return _kernel_group_norm(x, weight, bias, self.eps)
        # A view in (B, C, ...), which on a CPU runs and stays in channels-last memory. Not a layer norm over x.shape[1:]:
        # that one is slower there, and torch's older ONNX exporter wants to know its shape (and no dimension -1).
        bias = None if bias is None else bias.to(x.dtype)
        x = torch.group_norm(x.movedim(x.ndim - 1, 1), 1, weight.to(x.dtype), bias, self.eps)
        return x.movedim(1, x.ndim - 1)

    def extra_repr(self) -> str:
        """As torch's norms print."""
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


@torch.jit.unused
def _kernel_group_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return fast_cuda.group_norm(x, weight, bias, eps)


@torch.jit.unused
def norm_in(norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm of (B, ..., C) whose result is wanted in a dtype, with `layers.fast.takes(x, norm)`."""
    if type(norm) in (GroupNorm1, LayerNorm) and has_kernel(x, norm.weight, norm.bias):  # type: ignore[arg-type]
        form = fast_cuda.group_norm if type(norm) is GroupNorm1 else fast_cuda.layer_norm
        return form(x, norm.weight, norm.bias, norm.eps, dtype)  # type: ignore[arg-type]
    if type(norm) is LayerNorm and x.device.type == "cpu" and dtype == torch.bfloat16:
        y = narrow_layer_norm(x, norm.weight, norm.bias, norm.eps)
        return norm(x) if y is None else y
    return norm(x)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension of (B, ..., C); eps 1e-6 as in MetaFormer Baselines and timm."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The norm with another weight and bias, (B, ..., C) to the same."""
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps)  # type: ignore[arg-type]


class Affine(nn.Module):
    """A learned scale and shift per channel over (B, ..., C), without statistics."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The norm with another weight and bias, (B, ..., C) to the same."""
        return torch.addcmul(bias.to(x.dtype), x, weight.to(x.dtype))

    def extra_repr(self) -> str:
        """As torch's norms print."""
        return f"{self.weight.numel()}"


NormName = Literal["group_norm", "group_norm_no_bias", "layer_norm", "layer_norm_no_bias", "affine", "none"]
NORMS: dict[str, Callable[[int, float | None], nn.Module]] = {
    "group_norm": lambda dim, eps: GroupNorm1(dim, eps or 1e-5),
    "group_norm_no_bias": lambda dim, eps: GroupNorm1(dim, eps or 1e-6, bias=False),
    "layer_norm": lambda dim, eps: LayerNorm(dim, eps or 1e-6),
    "layer_norm_no_bias": lambda dim, eps: LayerNorm(dim, eps or 1e-6, bias=False),
    "affine": lambda dim, eps: Affine(dim),
    "none": lambda dim, eps: nn.Identity(),
}
"""Norms by name: channels and eps, or `None` for the published one -> module."""


def build_norm(name: str, dim: int, eps: float | None = None) -> nn.Module:
    """Builds a norm over (B, ..., dim).

    Args:
        name: One of `NORMS`.
        dim: Channels.
        eps: Added to the variance; default 1e-5 for `group_norm`, 1e-6 for the others, as published; no effect in
            `affine` and `none`, which have no variance.

    Raises:
        ValueError: Unknown name.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name](dim, eps)
