"""Attention on a CPU: by a kernel, or, in training over few tokens, as products and a softmax one after the other.

torch's fused form, for many tokens, computes in small tiles that leave much of a processor idle, and its gradients are
stacked and moved before the layer in front can use them. `fast_cpu` has kernels for float32 and, where the processor
multiplies in it, for bfloat16; else, over few tokens, the products are apart, with scores in float32. Who may take this,
and how it is turned off, is said in `layers.fast`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cpu
from layers.fast import in_own_dtype, plain_gradients, run, wants_plain_gradients

MOST_TOKENS = {torch.float32: 64, torch.bfloat16: 256}
"""Tokens of attention up to which its products are faster apart, in training, and its weights few enough to keep."""


def attention(qkv: Tensor) -> Tensor:
    """Multi-head attention with `takes` of what qkv is computed from.

    Args:
        qkv: Queries, keys and values, (B, N, 3, heads, D).

    Returns:
        (B, N, heads, D). In bfloat16 it and the gradients are as near to float32's as those of torch's own form.
    """
    if qkv.device.type != "cpu" or not qkv.shape[0]:
        return plain_attention(qkv)
    if fast_cpu.has_attention(*_parts(qkv)):
        return run(_KernelAttention, qkv, None).transpose(1, 2)
    return _attention(qkv, None) if _gains_apart(qkv.shape[1], qkv.dtype) else plain_attention(qkv)


def window_attention(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention within windows, with `has_few_tokens` and `takes` of what qkv is computed from.

    Args:
        qkv: Queries, keys and values, (B, N, 3, heads, D): of the windows of one image after those of another.
        bias: What is added to the scores, (W, heads, N, N), for each window of an image or, with W = 1, for all.

    Returns:
        (B, N, heads, D). Apart, the products that the bias is added to are in qkv's dtype.
    """
    bias = bias.flatten(0, 1)
    if torch.is_grad_enabled() and fast_cpu.has_attention(*_parts(qkv), bias):
        return run(_KernelAttention, qkv, bias).transpose(1, 2)
    return _attention(qkv, bias)


def _attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    batch, tokens, _, heads, width = qkv.shape
    parts = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, tokens, width)
    return run(_Attention, parts, bias).view(batch, heads, tokens, width).transpose(1, 2)


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_of` takes queries, keys and values of one shape and dtype, (B, heads, N, D), with `takes(q)`."""
    return fast_cpu.has_attention(q, k, v) or _gains_apart(q.shape[2], q.dtype)


def attention_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `F.scaled_dot_product_attention(q, k, v)`, all (B, heads, N, D), with `takes_attention`."""
    if fast_cpu.has_attention(q, k, v):
        return run(_KernelAttentionOf, q, k, v)
    return run(_Attention, torch.stack((q, k, v)).flatten(1, 2), None).view(q.shape)


def has_few_tokens(tokens: int, dtype: torch.dtype) -> bool:
    """Whether attention over so many tokens is faster as products, in training."""
    return 0 < tokens <= MOST_TOKENS.get(dtype, 0)


def _gains_apart(tokens: int, dtype: torch.dtype) -> bool:
    """Whether products apart are faster than torch's form, which without a backward pass they are not."""
    return torch.is_grad_enabled() and has_few_tokens(tokens, dtype)


def plain_attention(qkv: Tensor) -> Tensor:
    """torch's form of `attention`."""
    # traced and scripted too: no call of `_parts`, whose result could not be taken apart there
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, N, D), of (B, N, 3, heads, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


class _KernelAttention(torch.autograd.Function):
    """(B, N, 3, heads, D), and a bias (E, N, N) or `None`, with `fast_cpu.has_attention` -> (B, heads, N, D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None) -> Tensor:
        out, logs = fast_cpu.attention(*_parts(qkv), bias)
        ctx.save_for_backward(qkv, bias, out, logs)
        return out

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        qkv, bias, out, logs = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(_plain_kernel_attention, ctx, (qkv, bias), grads[0])
        of_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)  # without gaps, whatever qkv is a part of
        of_bias = fast_cpu.attention_backward(
            grads[0], *_parts(qkv), out, logs, _parts(of_qkv), bias, of_bias=ctx.needs_input_grad[1]
        )
        return of_qkv, None if of_bias is None else of_bias.to(bias.dtype)


def _plain_kernel_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """torch's form of `_KernelAttention`."""
    if bias is None:
        return plain_attention(qkv).transpose(1, 2)
    parts = qkv.permute(2, 0, 3, 1, 4)
    return _plain_attention_of(parts.flatten(1, 2), bias).view(parts.shape[1:])


class _KernelAttentionOf(torch.autograd.Function):
    """Three times (B, heads, N, D), with `fast_cpu.has_attention` -> (B, heads, N, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logs = fast_cpu.attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, logs)
        return out

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, logs = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(F.scaled_dot_product_attention, ctx, (q, k, v), grads[0])
        found = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device).unbind(0)
        fast_cpu.attention_backward(grads[0], q, k, v, out, logs, found)  # type: ignore[arg-type]
        return found


class _Attention(torch.autograd.Function):
    """(3, S, N, D), and a bias (B, N, N) with B a divisor of S or `None` -> (S, N, D)."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k, v = parts.unbind(0)
            scale = q.shape[-1] ** -0.5
            products = torch.bmm(q.float(), k.float().mT) if bias is None else torch.bmm(q, k.mT)
            weights = _softmax(products, bias, scale, parts.dtype)  # (S, N, N)
            ctx.save_for_backward(parts, weights, bias)
            return torch.bmm(weights, v)

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts, weights, bias = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(_plain_attention_of, ctx, (parts, bias), grads[0])
        q, k, v = parts.unbind(0)
        grad, found = grads[0].contiguous(), torch.empty_like(parts)
        torch.bmm(weights.mT, grad, out=found[2])
        of_weights = torch.bmm(grad, v.mT)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_bias = None if bias is None else of_scores.unflatten(0, (-1, len(bias))).sum(0).to(bias.dtype)
        scale = q.shape[-1] ** -0.5
        _scaled_product(of_scores, k, scale, out=found[0])
        _scaled_product(of_scores.mT, q, scale, out=found[1])
        return found, of_bias


def _softmax(products: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * products + bias), (S, N, N), in float32, then in a dtype; bias: (B, N, N), B a divisor of S."""
    fits = bias is None or (bias.shape[1:] == products.shape[1:] and len(products) % len(bias) == 0)
    if fits and fast_cpu.has_softmax(products):
        return fast_cpu.softmax(products, None if bias is None else bias.float().contiguous(), scale, dtype)
    if bias is None:
        return products.mul_(scale).softmax(-1).to(dtype)
    scores = torch.add(bias.float(), products.unflatten(0, (-1, len(bias))), alpha=scale)
    return scores.softmax(-1).to(dtype).flatten(0, 1)


def _scaled_product(x: Tensor, y: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * (x @ y), (S, N, K) and (S, K, M) -> (S, N, M)."""
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale, out=out)


def _plain_attention_of(parts: Tensor, bias: Tensor | None) -> Tensor:
    """torch's form of `_Attention`."""
    q, k, v = parts.unbind(0)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (part.unflatten(0, (-1, len(bias))) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).flatten(0, 1)
