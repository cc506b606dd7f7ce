"""`layers.samples` on an NVIDIA GPU, in eager code: by `layers.fast_cuda`'s kernels, every sample written once.

torch adds samples one number at a time by atomic additions, into a copy of the batch, in bfloat16 at a fifth of what a
kernel reaches. The kernels read what they add in its own dtype, and so save a copy of that too.
"""

from typing import Any

import torch
from torch import Tensor

from layers import samples
from layers.fast import is_batched, is_eager, run, wants_plain_gradients
from layers.fast_cuda import has_kernels, put_rows, take_rows
from layers.samples import empty_like_samples, memory_order


def takes_samples(x: Tensor) -> bool:
    """Whether the functions of this file take a batch, (B, ...)."""
    return is_eager(x, "cuda") and x.ndim >= 2 and not is_batched(x) and has_kernels(_ordered(x))


def split_samples(x: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kept samples and x itself, whose gradients are added in one pass, with `takes_samples(x)`.

    Args:
        x: The batch, (B, ...).
        order: Indices (B,) of its samples, first those that are kept.
        count: How many are kept.

    Returns:
        The samples (B', ...) in x's layout in memory, and x, not to be changed in place.
    """
    if not torch.is_grad_enabled():
        return take_samples(x, order, count), x
    return _Split.apply(x, order, count)  # type: ignore[no-any-return, no-untyped-call]


def take_samples(x: Tensor, order: Tensor, count: int) -> Tensor:
    """The kept samples alone, (B, ...) -> (B', ...), otherwise as `split_samples`."""
    return run(_Take, x, order, count)


def put_samples(out: Tensor, order: Tensor, scale: float, counting: int | None) -> Tensor:
    """Samples times a factor in their places, with zeros for the others, (B', ...) -> (B, ...).

    Args:
        out: The samples.
        order: Indices (B,) of all samples of the batch, first theirs.
        scale: The factor.
        counting: How many of them are put, the first; `None`: all.
    """
    counting = len(out) if counting is None else counting
    if is_batched(out):
        return samples.put_samples(out[:counting], order[:counting], len(order), scale)
    return run(_Put, out, order, scale, counting)


def add_samples(x: Tensor, order: Tensor, out: Tensor, scale: float, counting: int | None) -> Tensor:
    """x with samples times a factor added in their places, (B, ...) and (B', ...) -> (B, ...), with `takes_samples(x)`.

    Args:
        x: The batch.
        order: Indices (B,) of its samples, first those of out.
        out: What is added, of any floating-point dtype that kernels take.
        scale: Its factor.
        counting: How many of out are added, the first; `None`: all.
    """
    counting = len(out) if counting is None else counting
    if is_batched(x) or is_batched(out):
        return samples.add_samples(x, order[:counting], out[:counting].to(x.dtype), scale)
    return run(_Add, x, order, out, scale, counting)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, count: int) -> Tensor:
        ctx.order = order
        return _taken(x, order[:count], 1.0, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return put_samples(grads[0], ctx.order, 1.0, None), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.order = order
        return _taken(x, order[:count], 1.0, x.dtype), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        of_taken, of_x = grads
        if of_taken is None:
            return of_x, None, None
        if of_x is None:
            return put_samples(of_taken, ctx.order, 1.0, None), None, None
        return add_samples(of_x, ctx.order, of_taken, 1.0, None), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, order: Tensor, scale: float, counting: int) -> Tensor:
        ctx.order, ctx.computed, ctx.scale, ctx.counting = order, len(out), scale, counting
        return _placed(out, order, None, scale, counting)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gradient(ctx, grads[0], grads[0].dtype), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, out: Tensor, scale: float, counting: int) -> Tensor:
        ctx.order, ctx.computed, ctx.scale, ctx.counting, ctx.dtype = order, len(out), scale, counting, out.dtype
        return _placed(out, order, x, scale, counting)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_out = _gradient(ctx, grads[0], ctx.dtype) if ctx.needs_input_grad[2] else None
        return grads[0], None, of_out, None, None


def _gradient(ctx: Any, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the samples that were put, from that of the batch."""
    if wants_plain_gradients(grad):  # it is differentiated again, or many are taken at once
        counts = torch.arange(ctx.computed, device=grad.device) < ctx.counting
        taken = samples.take_samples(grad, ctx.order[: ctx.computed]) * ctx.scale
        return (taken * counts.view(-1, *(1,) * (grad.ndim - 1))).to(dtype)
    taken = _taken(grad, ctx.order[: ctx.computed], ctx.scale, dtype)
    if ctx.counting < ctx.computed:
        taken[ctx.counting :] = 0.0
    return taken


def _taken(x: Tensor, kept: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    x = _gapless(x)
    taken = empty_like_samples(x, len(kept), dtype)
    take_rows(_ordered(x), kept, _ordered(taken), scale)
    return taken


def _placed(out: Tensor, order: Tensor, base: Tensor | None, scale: float, counting: int) -> Tensor:
    like = _gapless(out if base is None else base)
    result = empty_like_samples(like, len(order), like.dtype)
    by = memory_order(like)
    rows = out.permute(by).contiguous()
    put_rows(rows[:counting], order, None if base is None else like.permute(by), result.permute(by), scale)
    return result


def _ordered(x: Tensor) -> Tensor:
    """Its dimensions in the order of memory."""
    return x.permute(memory_order(x))


def _gapless(x: Tensor) -> Tensor:
    return x if _ordered(x).is_contiguous() else x.contiguous()
