"""One draw of stochastic depth on its way past a branch: which samples are computed, and how the result is added."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layers import samples_cuda
from layers.fast_cuda import DTYPES
from layers.samples import add_samples, put_compiled, put_samples, split_samples, take_compiled, take_samples


@dataclass(frozen=True)
class Draw:
    """One draw on its way past a branch: made in front of it, take the samples to compute, add or scatter the result.

    Attributes:
        batch: Samples drawn for.
        scale: Factor of the computed samples: one number, or one for each, (B',); `None`: nothing is dropped or scaled.
        kept: Indices (B',) of the samples to compute; `None`: all.
        idle: Batch norms inside the branch that would be given no sample, and keep their statistics.
        places: For compiled code: where each sample stands in `kept`, (B,); B' or more where it does not.
        order: For eager code on a GPU: indices (B,) of all samples, first those of `kept`.
        counting: With `order`: how many of the computed samples count; the others, the last, are multiplied by 0.
    """

    batch: int
    scale: Tensor | None = None
    kept: Tensor | None = None
    idle: tuple[nn.Module, ...] = ()
    places: Tensor | None = None
    order: Tensor | None = None
    counting: int | None = None

    def take(self, x: Tensor, groups: int = 1) -> Tensor:
        """The samples to compute, (B * groups, ...) -> (B' * groups, ...); x itself where that is all of them."""
        if self.kept is None:
            return x
        if groups == 1:
            return self._taken(x, self.kept)
        taken = self._taken(x.reshape(self.batch, groups, *x.shape[1:]), self.kept)  # (B', groups, ...)
        return taken.reshape(self.kept.shape[0] * groups, *x.shape[1:])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples to compute and x as its own shortcut, for `add`: as `take(x), x`, with less work in backward."""
        if self.kept is None:
            return x, x
        if self.places is not None:
            return self._taken(x, self.kept), x
        if (order := self._order_on_gpu(x)) is not None:
            return samples_cuda.split_samples(x, order, len(self.kept))
        return split_samples(x, self.kept)

    def scaled(self, out: Tensor) -> Tensor:
        """The branch's output for the computed samples, (B', ...), each by its factor."""
        scale = self._scales
        return out if scale is None else out * per_sample(scale, out)

    def add(self, shortcut: Tensor, out: Tensor) -> Tensor:
        """shortcut + the branch's output for the computed samples, (B, ...) + (B', ...), in the shortcut's dtype."""
        if out.dtype in DTYPES and (order := self._order_on_gpu(shortcut)) is not None:
            return samples_cuda.add_samples(shortcut, order, out, self._factor_on_gpu, self.counting)
        out = out.to(shortcut.dtype)
        if self._factor is not None:
            alpha = float(self._factor)
            if self.kept is None:
                return torch.add(shortcut, out, alpha=alpha)
            return add_samples(shortcut, self.kept, out, alpha)
        if self.kept is not None and self.places is not None:
            return shortcut + put_compiled(self.scaled(out), self.kept, self.places)
        if self.kept is not None:
            return shortcut.index_add(0, self.kept, self.scaled(out))
        if self.scale is not None and self.scale.ndim:
            return torch.addcmul(shortcut, out, per_sample(self.scale, shortcut))
        return shortcut + self.scaled(out)

    def put(self, out: Tensor, groups: int = 1) -> Tensor:
        """The computed samples in their places, (B' * groups, ...) -> (B * groups, ...), with zeros for the others."""
        return self._placed(out, groups, 1.0)

    def put_scaled(self, out: Tensor) -> Tensor:
        """The branch's output for the computed samples, each by its factor, in their places, (B', ...) -> (B, ...)."""
        if self.scale is None and self.kept is None:
            return out
        if (order := self._order_on_gpu(out)) is not None:
            return samples_cuda.put_samples(out, order, self._factor_on_gpu, self.counting)
        if self.kept is None or self._factor is None:
            return self._placed(self.scaled(out), 1, 1.0)
        return self._placed(out, 1, float(self._factor.to(out.dtype)))

    @property
    def _factor(self) -> Tensor | None:
        """The one factor of all, on the CPU and known now: it goes into the pass over memory that adds or puts samples."""
        scale = self._scales
        return scale if scale is not None and scale.ndim == 0 and not is_compiling() else None

    @property
    def _factor_on_gpu(self) -> float:
        """The one factor of those that count, with `order`."""
        return 1.0 if self.scale is None else float(self.scale)

    @property
    def _scales(self) -> Tensor | None:
        """`scale`, for each of the computed samples, (B',), where not all of them count."""
        if self.scale is None or self.kept is None or self.counting is None or self.counting == self.kept.shape[0]:
            return self.scale
        return (torch.arange(self.kept.shape[0], device=self.kept.device) < self.counting) * self.scale

    def _placed(self, out: Tensor, groups: int, scale: float) -> Tensor:
        if self.kept is None:
            return out
        if groups == 1:
            return self._put(out, self.kept, scale)
        grouped = out.reshape(self.kept.shape[0], groups, *out.shape[1:])
        return self._put(grouped, self.kept, scale).reshape(self.batch * groups, *out.shape[1:])

    def _taken(self, x: Tensor, kept: Tensor) -> Tensor:
        if self.places is not None:
            return take_compiled(x, kept, self.places)
        if (order := self._order_on_gpu(x)) is not None:
            return samples_cuda.take_samples(x, order, len(kept))
        return take_samples(x, kept)

    def _put(self, out: Tensor, kept: Tensor, scale: float) -> Tensor:
        if self.places is not None:
            return put_compiled(out, kept, self.places)  # scaled already: compiled code does not know the factor
        if (order := self._order_on_gpu(out)) is not None:
            return samples_cuda.put_samples(out, order, scale, None)
        return put_samples(out, kept, self.batch, scale)

    def _order_on_gpu(self, x: Tensor) -> Tensor | None:
        """`order`, if the kernels take x, (B, ...) or (B', ...)."""
        return self.order if self.order is not None and samples_cuda.takes_samples(x) else None

    def as_mask(self) -> "Draw":
        """The same draw for a branch that is computed in full."""
        scale = self._scales
        if self.kept is None or scale is None:
            return self
        scale = scale * self.kept.new_ones(self.kept.shape, dtype=scale.dtype)  # (B',)
        return replace(
            self,
            kept=None,
            places=None,
            order=None,
            counting=None,
            scale=scale.new_zeros(self.batch).index_copy(0, self.kept, scale),
        )


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with x's number of dimensions and dtype; one number stays one."""
    values = values.to(x.dtype)
    return values.view(-1, *(1,) * (x.ndim - 1)) if values.ndim and x.ndim > 1 else values


@functools.lru_cache(maxsize=256)
def draw_of_all(batch: int) -> Draw:
    """The draw that keeps all of a batch and scales nothing."""
    return Draw(batch)


def draw_unread(batch: int, *, count: bool) -> None:
    """Takes from torch's CPU generator what a draw for a batch takes: a count, if wanted, and a number for each sample.

    Into the same memory again and again, since nobody reads it: half the time of new tensors.
    """
    if count:
        _unread((), torch.float64).uniform_()
    _unread((batch,), torch.get_default_dtype()).uniform_()


@functools.lru_cache(maxsize=64)
def _unread(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it is changed in place, in any mode
        return torch.empty(shape, dtype=dtype, device="cpu")


def runs_as_written() -> bool:
    """Whether code runs now and as written, nobody looking on: no compiler, tracer, fake tensors, vmap or torch.func.grad."""
    looked_at = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch.jit.is_tracing()
    return not looked_at and numbers_are_known()


def numbers_are_known() -> bool:
    """Whether a number that is drawn is known at once: not in code that is compiled, nor inside vmap or torch.func.grad."""
    return not is_compiling() and torch._C._functorch.maybe_current_level() is None  # type: ignore[attr-defined]


def is_of_vmap(value: object) -> bool:
    """Whether a value is a tensor that stands for one of each call of a torch.func.vmap, so that no one number is known."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)  # of torch.func.grad, say, inside vmap
    return False
