"""Layer norm: in bfloat16 on a CPU with exact gradients of its weight and bias, on a GPU by a kernel; see `layers.fast`.

On a CPU torch adds these up in bfloat16, over all rows of a batch: of 43,904 rows of 96 numbers the weight's gradient comes
out 15 % off, the bias's 32 %, and more where the rows agree, since a large sum no longer moves. Here they are summed in
float32, by the backward pass of a batch norm, whose weight's gradient is that sum. Backward takes 1.4 to 1.7 times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cuda
from layers.fast import are_plain, no_view, plain_gradients, takes, wants_plain_gradients


def layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `F.layer_norm` over the last dimension of (..., C): exact or faster where fast paths may be taken.

    TorchScript compiles it, and has torch's form.

    Args:
        x: Input.
        shape: (C,).
        weight: (C,) or `None`.
        bias: (C,) or `None`.
        eps: Added to the variance.
    """
    if not torch.jit.is_scripting() and wants_exact_gradients(x, weight, bias):
        return _exact_layer_norm(x, weight, bias, eps)
    if not torch.jit.is_scripting() and has_kernel(x, weight, bias):
        return _kernel_layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, shape, weight, bias, eps)


@torch.jit.unused
def _exact_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


@torch.jit.unused
def _kernel_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return fast_cuda.layer_norm(x, weight, bias, eps)


@torch.jit.unused
def has_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `layers.fast_cuda` has a kernel for norms of x, (..., C), with weight and bias (C,)."""
    return isinstance(x, Tensor) and x.device.type == "cuda" and fast_cuda.takes_norm(x, weight, bias)


@torch.jit.unused
def wants_exact_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch would sum the gradients of weight or bias, (C,), in bfloat16, and fast paths may be taken."""
    return (
        isinstance(x, Tensor)
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and weight is not None
        and (weight.requires_grad or (bias is not None and bias.requires_grad))
        and x.numel() > 0
        and takes(x)
        and are_plain(weight, bias)
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x, ctx.eps = x.contiguous(), eps
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return no_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, eps = x.shape[-1:], ctx.eps
        if wants_plain_gradients(grads[0]):
            plain = lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps)  # noqa: E731
            return *plain_gradients(plain, ctx, (x, weight, bias), grads[0]), None
        grad, of_x = grads[0].contiguous(), None
        if ctx.needs_input_grad[0]:
            only_x = [True, False, False]
            of_x = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, only_x)[0]
        if not any(ctx.needs_input_grad[1:3]):
            return of_x, None, None, None
        standard = torch.native_layer_norm(x, shape, None, None, eps)[0]
        return of_x, *_column_sums(grad, standard, weight, ctx.needs_input_grad[1:3]), None


def _column_sums(grad: Tensor, x: Tensor, weight: Tensor, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
    """Sums over rows of grad * x and of grad, both (..., C) -> (C,), in float32, then in the weight's dtype."""
    channels = x.shape[-1]
    images = [rows.view(1, 1, -1, channels).permute(0, 3, 1, 2) for rows in (grad, x)]
    ones, zeros = (fill(channels, dtype=torch.float32) for fill in (torch.ones, torch.zeros))
    # of a batch norm with mean 0 and variance 1
    sums = torch.ops.aten.native_batch_norm_backward(
        *images, ones, None, None, zeros, ones, True, 0.0, [False, *wanted]
    )[1:]
    return tuple(each.to(weight.dtype) if want else None for each, want in zip(sums, wanted, strict=True))  # type: ignore[return-value]
