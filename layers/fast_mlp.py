"""Two linear layers with an activation between them, on a CPU: what is kept for backward, and its passes over memory.

The hidden tensor, the widest of a block, is kept once, before the activation, which is computed again in backward. Who may
take this, and how it is turned off, is said in `layers.fast`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cpu
from layers.fast import (
    bias_gradient,
    cast,
    in_own_dtype,
    is_large,
    linear,
    no_view,
    onednn_product,
    plain_gradients,
    product,
    shapes_of,
    stand_ins,
    wants_plain_gradients,
    weight_gradient,
)

ACTS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": lambda x: F.relu(x).square(),
}
"""Activations that `mlp` knows, by name."""


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str) -> Tensor:
    """As `F.linear(act(F.linear(x, weight1, bias1)), weight2, bias2)` on a CPU, (..., C) -> (..., D), with `takes(x)`.

    Args:
        x: Input.
        weight1: (H, C).
        bias1: (H,) or `None`.
        weight2: (D, H).
        bias2: (D,) or `None`.
        act: A key of `ACTS`.
    """
    if not torch.is_grad_enabled():
        return linear(linear_act(x, weight1, bias1, act), weight2, bias2)
    x, weight1, bias1 = cast(x, weight1, bias1, leave=True)
    _, weight2, bias2 = cast(x, weight2, bias2, leave=True)
    return _Mlp.apply(x, weight1, bias1, weight2, bias2, act)  # type: ignore[no-any-return, no-untyped-call]


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """As `act(F.linear(...))` without gradients, (..., C) -> (..., D), with `takes(x)`; act: a key of `ACTS`."""
    x, weight, bias = cast(x, weight, bias)
    fused = {"squared_relu": "relu"}.get(act, act)
    if fused not in ("gelu", "relu") or not is_large(x, weight):
        return ACTS[act](F.linear(x, weight, bias))
    y = onednn_product(x, weight, bias, fused)
    return y.square_() if act == "squared_relu" else y


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str
    ) -> Tensor:
        hidden = product(x, weight1.to(x.dtype), bias1)
        of_x, of_weight1, of_bias1, of_weight2, *_ = ctx.needs_input_grad
        behind = of_x or of_weight1 or of_bias1
        # only what a gradient is computed of, or a second one taken for: the rest may be changed in place, as of torch
        ctx.save_for_backward(
            x if of_x or of_weight1 else None,
            weight1 if of_x or of_weight1 else None,
            bias1 if of_bias1 else None,
            weight2 if behind else None,
            hidden if behind or of_weight2 else None,
        )
        ctx.shapes, ctx.act = shapes_of(x, weight1, bias1, weight2, bias2), act
        return no_view(product(_act(hidden, act), weight2.to(x.dtype), bias2))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight1, bias1, weight2, hidden = ctx.saved_tensors
        act, wanted = ctx.act, ctx.needs_input_grad
        if wants_plain_gradients(grads[0]):
            inputs = stand_ins((x, weight1, bias1, weight2, None), ctx.shapes, grads[0])
            return *plain_gradients(_plain_mlp(act, hidden), ctx, inputs, grads[0]), None
        grad = grads[0].contiguous()
        of_bias2 = bias_gradient(grad) if wanted[4] else None
        if not any(wanted[:3]):
            return None, None, None, weight_gradient(grad, _act(hidden, act)) if wanted[3] else None, of_bias2, None
        y, of_hidden, of_bias1 = _act_gradient(hidden, product(grad, weight2.to(grad.dtype).t(), None), act)
        return (
            product(of_hidden, weight1.to(grad.dtype).t(), None) if wanted[0] else None,
            weight_gradient(of_hidden, x) if wanted[1] else None,
            (bias_gradient(of_hidden) if of_bias1 is None else of_bias1.to(grad.dtype)) if wanted[2] else None,
            weight_gradient(grad, y) if wanted[3] else None,
            of_bias2,
            None,
        )


def _plain_mlp(act: str, hidden: Tensor | None) -> Any:
    """torch's form of `mlp`, around the hidden tensor, where it was kept: not all that it was computed from is."""

    def plain(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
        found = F.linear(x, weight1.to(x.dtype), bias1)
        # with found's gradients, and the numbers of hidden
        inner = found if hidden is None else found + (hidden - found).detach()
        return F.linear(ACTS[act](inner), weight2.to(x.dtype), bias2)

    return plain


def _act(x: Tensor, act: str) -> Tensor:
    if fast_cpu.has_activation(x, act):
        return fast_cpu.activation(x, act)
    return F.relu(x).square_() if act == "squared_relu" else ACTS[act](x)


def _act_gradient(x: Tensor, grad: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """act(x), the gradient of x in the place of that of act(x), and, where it comes at no cost, its sum over rows."""
    if x.dtype == grad.dtype and fast_cpu.has_kernels(x, grad):
        y, sums = fast_cpu.activation_backward_(x, grad, act)
        return y, grad, sums
    if act == "squared_relu":
        relu = F.relu(x)
        grad.mul_(relu).mul_(2)
        return relu.square_(), grad, None
    y = ACTS[act](x)
    if act == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    elif act == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    else:
        torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    return y, grad, None
