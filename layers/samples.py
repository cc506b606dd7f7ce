"""Taking samples out of a batch and putting them back, with the gradients of both.

On a CPU torch's `index_select`, and `index_add` with a factor, go from sample to sample and wake their threads for each,
and both leave channels-last memory. Here samples are rows of numbers in the order of memory. They are taken in one sweep:
24 of 32 samples of 14 x 14 x 320 (float32, 2 cores) in 0.14 instead of 1.5 ms. They are put and added in runs, neighbours
that are all kept or all dropped, of which ascending indices make few: each is written once, with its factor. 13 of 16
samples of 56 x 56 x 96 (bfloat16) are added in 1.9 ms, where zeros, a copy and a sum took 3.9, and a sum of all takes 1.1.
What is computed is the same; compiled, traced and exported code, torch.func and tensors of other kinds have torch's own
forms, as everything has with `layers.fast.set_fast_paths(False)`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.fast import is_batched, is_eager, run

SMALL_BATCH = 2**18
"""Numbers of a batch up to which adding sample by sample is faster."""

LONG_RUN = 2**17
"""Numbers of a run of samples, in the mean, from which a call for each run is faster than sweeps over all rows."""


def take_samples(x: Tensor, kept: Tensor) -> Tensor:
    """As `x.index_select(0, kept)`, (B, ...) -> (B', ...), in x's layout in memory.

    Args:
        x: The batch.
        kept: Indices (B',), each at most once.
    """
    if not _in_rows(x):
        return x.index_select(0, kept)
    return run(_Take, x, kept)


def split_samples(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`take_samples`, and x itself, whose gradient and that of the taken samples are added in one pass.

    Args:
        x: The batch, (B, ...).
        kept: Indices (B',), each at most once.

    Returns:
        The samples (B', ...), and x, not to be changed in place.
    """
    if not torch.is_grad_enabled() or not _in_rows(x):
        return take_samples(x, kept), x
    return _Split.apply(x, kept)  # type: ignore[no-any-return, no-untyped-call]


def put_samples(out: Tensor, kept: Tensor, batch: int, scale: float = 1.0) -> Tensor:
    """Samples times a factor in their places, with zeros for the others, (B', ...) -> (B, ...).

    Args:
        out: The samples.
        kept: Their indices (B',), each at most once.
        batch: B.
        scale: The factor.
    """
    if not _in_rows(out):
        out = out if scale == 1.0 else out * scale
        return out.new_zeros(batch, *out.shape[1:]).index_add(0, kept, out)
    return run(_Put, out, kept, batch, scale)


def add_samples(x: Tensor, kept: Tensor, out: Tensor, scale: float) -> Tensor:
    """As `x.index_add(0, kept, out, alpha=scale)`, (B, ...) and (B', ...) -> (B, ...).

    Args:
        x: The batch.
        kept: Indices (B',), each at most once.
        out: What is added to these, in x's dtype.
        scale: Its factor.
    """
    if x.numel() <= SMALL_BATCH or not (_in_rows(x) and _in_rows(out)) or x.dtype != out.dtype:
        return x.index_add(0, kept, out, alpha=scale)
    return run(_Add, x, kept, out, scale)


def take_compiled(x: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """`take_samples` for compiled code: its gradient is read from the samples' places, not added to zeros one by one.

    Args:
        x: The batch, (B, ...).
        kept: Indices (B',).
        places: Where each sample of the batch stands in `kept`, (B,); B' or more where it does not.
    """
    return _TakeCompiled.apply(x, kept, places)  # type: ignore[no-any-return, no-untyped-call]


def put_compiled(out: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """`put_samples` for compiled code, which fuses it with what comes next: every sample is written once.

    Args:
        out: The samples, (B', ...).
        kept: Their indices (B',).
        places: Where each sample of the batch stands in `kept`, (B,); B' or more where it does not.
    """
    return _PutCompiled.apply(out, kept, places)  # type: ignore[no-any-return, no-untyped-call]


def replace_samples(x: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """As `x.index_copy(0, kept, out)`, (B, ...) and (B', ...) -> (B, ...), in x's layout in memory."""
    if not _in_rows(x):
        return x.index_copy(0, kept, out)
    order = memory_order(x)
    return x.permute(order).index_copy(0, kept, out.permute(order)).permute(_inverse(order))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.kept, ctx.batch = kept, len(x)
        return _taken(x, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return put_samples(grads[0], ctx.kept, ctx.batch), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kept, ctx.batch = kept, len(x)
        return _taken(x, kept), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        of_taken, of_x = grads
        if of_taken is None:
            return of_x, None
        if of_x is None:
            return put_samples(of_taken, ctx.kept, ctx.batch), None
        return add_samples(of_x, ctx.kept, of_taken, 1.0), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, kept: Tensor, batch: int, scale: float) -> Tensor:
        ctx.kept, ctx.scale = kept, scale
        return _placed(out, kept, batch, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gradient(grads[0], ctx.kept, ctx.scale), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, out: Tensor, scale: float) -> Tensor:
        ctx.kept, ctx.scale = kept, scale
        return _added(x, kept, out, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, _gradient(grads[0], ctx.kept, ctx.scale), None


class _TakeCompiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(kept, places)
        return x.index_select(0, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _in_places(grads[0], ctx.saved_tensors[1]), None, None


class _PutCompiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(kept, places)
        return _in_places(out, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def _in_places(out: Tensor, places: Tensor) -> Tensor:
    """Samples (B', ...) in their places (B,), and zeros."""
    return F.pad(out, (0, 0) * (out.ndim - 1) + (0, 1)).index_select(0, places.clamp(max=out.shape[0]))


def _gradient(grad: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Of the samples that were put: the taken gradients times the factor."""
    if scale != 1.0 and not torch.is_grad_enabled() and _in_rows(grad) and (runs := _runs(kept, grad)):
        taken = empty_like_samples(grad, len(kept))
        for rows, part in _side_by_side(runs, grad, taken):
            if part is not None:
                torch.mul(rows, scale, out=part)
        return taken
    taken = take_samples(grad, kept)
    return taken if scale == 1.0 else taken.mul_(scale)


def _taken(x: Tensor, kept: Tensor) -> Tensor:
    rows, taken = _rows(x), empty_like_samples(x, len(kept))
    if len(kept):
        torch.gather(rows, 0, kept[:, None].expand(-1, rows.shape[1]), out=_rows(taken))
    return taken


def _placed(out: Tensor, kept: Tensor, batch: int, scale: float) -> Tensor:
    placed = empty_like_samples(out, batch)
    if runs := _runs(kept, placed):
        for rows, part in _side_by_side(runs, placed, out):
            if part is None:
                rows.zero_()
            elif scale == 1.0:
                rows.copy_(part)
            else:
                torch.mul(part, scale, out=rows)
        return placed
    _rows(placed.zero_()).index_copy_(0, kept, _rows(out if scale == 1.0 else out * scale))
    return placed


def _added(x: Tensor, kept: Tensor, out: Tensor, scale: float) -> Tensor:
    runs = _runs(kept, x) if memory_order(x) == memory_order(out) else None
    if not runs:
        placed = _placed(out, kept, len(x), 1.0)
        return torch.add(x, placed, alpha=scale, out=placed)
    added = empty_like_samples(x, len(x))
    sums = _rows(added).split([length for length, _ in runs])
    for into, (rows, part) in zip(sums, _side_by_side(runs, x, out), strict=True):
        if part is None:
            into.copy_(rows)
        else:
            torch.add(rows, part, alpha=scale, out=into)
    return added


def _runs(kept: Tensor, x: Tensor) -> list[tuple[int, bool]] | None:
    """Lengths of the runs of neighbours that are all kept or all dropped, and which; `None` where they do not pay.

    Args:
        kept: Indices (B',).
        x: The batch that they are of, (B, ...).
    """
    if x.numel() < LONG_RUN:
        return None
    indices, is_kept = kept.tolist(), [False] * len(x)
    for i in indices:
        is_kept[i] = True
    if indices != sorted(indices):
        return None
    runs = [(len(list(run)), value) for value, run in itertools.groupby(is_kept)]
    return runs if x.numel() >= LONG_RUN * len(runs) else None


def _side_by_side(runs: list[tuple[int, bool]], x: Tensor, taken: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows of each run in a batch (B, ...) and among its kept samples (B', ...); `None` for a dropped run."""
    parts = iter(_rows(taken).split([length for length, is_kept in runs if is_kept]))
    for rows, (_, is_kept) in zip(_rows(x).split([length for length, _ in runs]), runs, strict=True):
        yield rows, next(parts) if is_kept else None


def empty_like_samples(x: Tensor, batch: int, dtype: torch.dtype | None = None) -> Tensor:
    """Other samples in x's layout in memory; no view, so that what comes next may change it in place.

    Args:
        x: Samples, (B, ...).
        batch: How many there shall be.
        dtype: Theirs; default x's.
    """
    in_order = memory_order(x)[-1] == x.ndim - 1
    layout = torch.contiguous_format if in_order else torch.channels_last
    return torch.empty((batch, *x.shape[1:]), dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def _rows(x: Tensor) -> Tensor:
    """Samples as rows of memory, (B, N)."""
    return x.permute(memory_order(x)).view(len(x), -1)


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Dimensions in the order of memory, where x has no gaps."""
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (0, 2, 3, 1) if channels_last else tuple(range(x.ndim))


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _in_rows(x: Tensor) -> bool:
    """Whether samples are copied as rows of memory."""
    if not is_eager(x) or x.ndim < 2 or not x.numel():
        return False
    if is_batched(x):
        return False
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
