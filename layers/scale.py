"""Learned scale per channel: LayerScale on a branch (arXiv 2103.17239), ResScale on a shortcut (arXiv 2110.09456)."""

import torch
from torch import Tensor, nn

from layers.fast import dtype_of, takes
from layers.mlp import Mlp
from layers.norm import Affine, GroupNorm1, LayerNorm, norm_in
from layers.token_mixers import Attention, SepConv, TokenMixer


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


_LINEAR_FIRST = (Mlp, SepConv, Attention)


def _rounds_first(body: nn.Module, x: Tensor) -> bool:
    """Whether a body first rounds its input as a linear layer does, so that a norm in front may have done that."""
    return type(body) in _LINEAR_FIRST and x.dtype != dtype_of(x) and body.is_fast(x)  # type: ignore[operator]


def scaled_branch(norm: nn.Module, body: nn.Module, scale: nn.Module, x: Tensor) -> Tensor:
    """scale(body(norm(x))), (B, ..., C) to the same; where fast paths may, the scale is put into weights.

    Into those of the body's last layer, or, where the body treats all channels alike, of the norm.

    Args:
        norm: A norm of `layers.norm`.
        body: Token mixer or MLP.
        scale: A `Scale` or the identity.
        x: (B, ..., C).
    """
    if type(scale) is nn.Identity and takes(x, norm, body) and (x.device.type != "cpu" or _rounds_first(body, x)):
        return body(norm_in(norm, x, dtype_of(x)))
    if type(scale) is Scale and takes(x, norm, body, scale):
        if type(body) in _LINEAR_FIRST:
            y = norm_in(norm, x, dtype_of(x) if x.device.type != "cpu" or _rounds_first(body, x) else x.dtype)
            last = body.get_submodule(body.last)  # type: ignore[arg-type]
            # weights are scaled at less cost than activations where there are more of these
            if body.is_fast(y) and y.numel() // y.shape[-1] >= last.in_features:  # type: ignore[operator]
                return body.forward_scaled(y, scale.scale)  # type: ignore[operator]
            return scale(body(y))
        if isinstance(body, TokenMixer) and body.per_channel and type(norm) in (GroupNorm1, LayerNorm, Affine):
            bias = None if norm.bias is None else norm.bias * scale.scale  # type: ignore[operator]
            return body(norm.norm(x, norm.weight * scale.scale, bias))  # type: ignore[operator]
    return scale(body(norm(x)))
