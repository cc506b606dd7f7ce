"""One draw of stochastic depth on its way past a branch: which samples are computed, and how the result is added."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layers.samples import add_samples, put_samples, split_samples, take_samples


@dataclass(frozen=True)
class Draw:
    """One draw on its way past a branch: made in front of it, take the samples to compute, add or scatter the result.

    Attributes:
        batch: Samples drawn for.
        scale: Factor of the computed samples: one number, or one for each, (B',); `None`: nothing is dropped or scaled.
        kept: Indices (B',) of the samples to compute; `None`: all.
        idle: Batch norms inside the branch that would be given no sample, and keep their statistics.
    """

    batch: int
    scale: Tensor | None = None
    kept: Tensor | None = None
    idle: tuple[nn.Module, ...] = ()

    def take(self, x: Tensor, groups: int = 1) -> Tensor:
        """The samples to compute, (B * groups, ...) -> (B' * groups, ...); x itself where that is all of them."""
        if self.kept is None:
            return x
        if groups == 1:
            return take_samples(x, self.kept)
        taken = take_samples(x.reshape(self.batch, groups, *x.shape[1:]), self.kept)  # (B', groups, ...)
        return taken.reshape(self.kept.shape[0] * groups, *x.shape[1:])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples to compute and x as its own shortcut, for `add`: as `take(x), x`, with less work in backward."""
        return (x, x) if self.kept is None else split_samples(x, self.kept)

    def scaled(self, out: Tensor) -> Tensor:
        """The branch's output for the computed samples, (B', ...), each by its factor."""
        return out if self.scale is None else out * per_sample(self.scale, out)

    def add(self, shortcut: Tensor, out: Tensor) -> Tensor:
        """shortcut + the branch's output for the computed samples, (B, ...) + (B', ...), in the shortcut's dtype."""
        out = out.to(shortcut.dtype)
        if self._factor is not None:
            alpha = float(self._factor)
            if self.kept is None:
                return torch.add(shortcut, out, alpha=alpha)
            return add_samples(shortcut, self.kept, out, alpha)
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
        if self.kept is None or self._factor is None:
            return self._placed(self.scaled(out), 1, 1.0)
        return self._placed(out, 1, float(self._factor.to(out.dtype)))

    @property
    def _factor(self) -> Tensor | None:
        """The one factor of all, on the CPU and known now: it goes into the pass over memory that adds or puts samples."""
        return self.scale if self.scale is not None and self.scale.ndim == 0 and not is_compiling() else None

    def _placed(self, out: Tensor, groups: int, scale: float) -> Tensor:
        if self.kept is None:
            return out
        if groups == 1:
            return put_samples(out, self.kept, self.batch, scale)
        grouped = out.reshape(self.kept.shape[0], groups, *out.shape[1:])
        return put_samples(grouped, self.kept, self.batch, scale).reshape(self.batch * groups, *out.shape[1:])

    def as_mask(self) -> "Draw":
        """The same draw for a branch that is computed in full."""
        if self.kept is None or self.scale is None:
            return self
        scale = self.scale * self.kept.new_ones(self.kept.shape, dtype=self.scale.dtype)  # (B',)
        return replace(self, kept=None, scale=scale.new_zeros(self.batch).index_copy(0, self.kept, scale))


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with x's number of dimensions and dtype; one number stays one."""
    values = values.to(x.dtype)
    return values.view(-1, *(1,) * (x.ndim - 1)) if values.ndim and x.ndim > 1 else values
