"""Layer norm: in training on a CPU and on a GPU by kernels, and in bfloat16 with exact gradients; see `layers.fast`.

On a CPU torch adds up the gradients of weight and bias in bfloat16, over all rows of a batch: of 43,904 rows of 96 numbers
the weight's comes out 15 % off, the bias's 32 %, and more where the rows agree, since a large sum no longer moves. Here they
are summed in float32: by the kernels of `layers.fast_cpu`, or without them by the backward pass of a batch norm, whose
weight's gradient is that sum (backward then takes 1.4 to 1.7 times as long as torch's).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cpu, fast_cuda
from layers.fast import are_plain, no_view, plain_gradients, takes, wants_plain_gradients
from layers.fast_cuda import as_gradient


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
    if not torch.jit.is_scripting() and is_trained_on_cpu(x, shape, weight, bias):
        return _layer_norm_on_cpu(x, weight, bias, eps)
    if not torch.jit.is_scripting() and has_kernel(x, weight, bias):
        return _kernel_layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, shape, weight, bias, eps)


@torch.jit.unused
def _layer_norm_on_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # a copy without gaps is made outside, so that what is kept is the input that second derivatives are taken of
    return _LayerNorm.apply(x.contiguous(), weight, bias, float(eps), x.dtype)  # type: ignore[no-any-return, no-untyped-call]


def narrow_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """A layer norm of (..., C) in float32 whose result is in bfloat16, as what follows would round it; else `None`.

    Args:
        x: Input on a CPU.
        weight: (C,) or `None`.
        bias: (C,) or `None`.
        eps: Added to the variance.
    """
    if x.dtype != torch.float32 or not x.is_contiguous() or not fast_cpu.has_kernels(x):
        return None
    if not is_trained_on_cpu(x, list(x.shape[-1:]), weight, bias):
        return None
    return _LayerNorm.apply(x, weight, bias, float(eps), torch.bfloat16)  # type: ignore[no-any-return, no-untyped-call]


@torch.jit.unused
def _kernel_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return fast_cuda.layer_norm(x, weight, bias, eps)


@torch.jit.unused
def has_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `layers.fast_cuda` has a kernel for norms of x, (..., C), with weight and bias (C,)."""
    return isinstance(x, Tensor) and x.device.type == "cuda" and fast_cuda.takes_norm(x, weight, bias)


@torch.jit.unused
def is_trained_on_cpu(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a norm of x, (..., C), over (C,) has gradients, and `_LayerNorm` is faster or more exact."""
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and takes(x)  # before sizes are looked at, which compiled code would remember
        and are_plain(weight, bias)
        and x.numel() > 0
        and all(tuple(of) == x.shape[-1:] for of in (shape, *(t.shape for t in (weight, bias) if t is not None)))
        and (x.requires_grad or _is_trained(weight, bias))
        and (fast_cpu.has_kernels(x) or (x.dtype == torch.bfloat16 and _is_trained(weight, bias)))
        and _has_dtypes(x, weight, bias)
    )


def _has_dtypes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch computes a norm with these dtypes: weights in x's own, or all in float32."""
    dtypes = {t.dtype for t in (weight, bias) if t is not None}
    return dtypes <= {x.dtype} or (x.dtype == torch.bfloat16 and dtypes == {torch.float32})


def _is_trained(*weights: Tensor | None) -> bool:
    return any(weight is not None and weight.requires_grad for weight in weights)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.eps, ctx.dtype = eps, dtype
        if fast_cpu.has_kernels(x):
            y, mean, rstd = fast_cpu.layer_norm(x, _in_float32(weight), _in_float32(bias), eps, dtype)
        else:
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return no_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, eps, wanted = x.shape[-1:], ctx.eps, ctx.needs_input_grad
        if wants_plain_gradients(grads[0]):
            plain = lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps).to(ctx.dtype)  # noqa: E731
            return *plain_gradients(plain, ctx, (x, weight, bias), grads[0]), None, None
        grad = grads[0].contiguous()
        if fast_cpu.has_kernels(x, grad):
            of_x, of_weight, of_bias = fast_cpu.layer_norm_backward(
                grad, x, _in_float32(weight), mean, rstd, of_input=wanted[0]
            )
            return of_x, as_gradient(of_weight, weight), as_gradient(of_bias, bias), None, None
        grad, of_x = grad.to(x.dtype), None
        if wanted[0]:
            only_x = [True, False, False]
            of_x = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, only_x)[0]
        if not any(wanted[1:3]):
            return of_x, None, None, None, None
        standard = torch.native_layer_norm(x, shape, None, None, eps)[0]
        of_weight, of_bias = _column_sums(grad, standard)
        return of_x, as_gradient(of_weight, weight), as_gradient(of_bias, bias), None, None


def _in_float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def _column_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of grad * x and of grad, both (..., C) -> (C,), in float32."""
    channels = x.shape[-1]
    images = [rows.view(1, 1, -1, channels).permute(0, 3, 1, 2) for rows in (grad, x)]
    ones, zeros = (fill(channels, dtype=torch.float32) for fill in (torch.ones, torch.zeros))
    # of a batch norm with mean 0 and variance 1
    mask = [False, True, True]
    return torch.ops.aten.native_batch_norm_backward(*images, ones, None, None, zeros, ones, True, 0.0, mask)[1:]
