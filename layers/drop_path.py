"""Stochastic depth per sample (DropPath), as a mask or by never computing what is dropped.

Huang et al. 2016, "Deep Networks with Stochastic Depth" (https://arxiv.org/abs/1603.09382) drop a residual branch for a
whole batch; Larsson et al. 2016, "FractalNet" (https://arxiv.org/abs/1605.07648) named drop-path; per-sample dropping
is what timm made common. Differences from timm's `DropPath`:

- `residual` takes the branch as a callable, so mode `skip` computes it for the kept samples only;
- draws are made in float32 whatever the dtype of the activations, so 0.4 stays 0.4 in bfloat16;
- the rate may change at any time without recompiling, and how often samples were dropped is counted.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layers.branches import batch_norms, held_modules, left_alone, masked_compiled, samples_to_compute
from layers.counts import SampleCounts
from layers.draw import Draw, draw_of_all, draw_unread, is_of_vmap, numbers_are_known, per_sample, runs_as_written
from layers.mlp import Mlp
from layers.rates import check_choice, check_drop_prob
from layers.token_mixers import TOKEN_MIXERS

Mode = Literal["mask", "skip", "batch"]
MODES: tuple[str, ...] = get_args(Mode)
Branch = Callable[[Tensor], Tensor]

BREAK_EVEN: dict[str, float] = {branch.kind: branch.break_even for branch in (*TOKEN_MIXERS.values(), Mlp)}
"""Drop rate from which leaving samples out of a branch of that kind beats masking them, as each class says.

By `benchmark.py drop-path --subjects branches foreign` on 2 CPU cores, in float32 and bfloat16: pooling 0.30 and 0.35, random
mixing 0.13 and 0.25, identity above 0.5 (extrapolated), the others below 0.05. Of other kinds, which always skip:
those of timm's ConvNeXt and ViT below 0.05, of EfficientNet 0.09 (at 0.05 a step takes 4 % longer than with masks).
"""

ROUNDED_UP = 64
"""Samples of a batch from which a GPU is given the same number at every step, `DropPath.rounds_up`."""

MASKED_COMPILED = 0.2
"""Break-even rate from which a branch is masked in compiled code whatever its rate: what is compiled must not depend on
rates, which may change at every step, and branches this cheap gain little."""


def drop_path(x: Tensor, drop_prob: float | None = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """Zeroes each sample of a residual branch with probability `drop_prob`, independently.

    Args:
        x: Output of a residual branch, (B, ...).
        drop_prob: Probability in [0, 1] that a sample is dropped; `None` means 0.
        training: Identity when false.
        scale_by_keep: Divide the kept samples by 1 - drop_prob, so that the expectation is x.

    Returns:
        A tensor like x; x itself when nothing can be dropped.

    Raises:
        ValueError: drop_prob is not in [0, 1].
    """
    drop_prob = check_drop_prob(drop_prob)
    if drop_prob == 0.0 or not training:
        return x
    return _drop_samples(x, drop_prob, scale_by_keep)


@torch.fx.wrap  # stays one call in a graph of torch.fx
def _drop_samples(x: Tensor, drop_prob: float, scale_by_keep: bool) -> Tensor:
    keep_prob = 1.0 - drop_prob
    scale = (torch.rand(x.shape[0], device=x.device) < keep_prob).to(x.dtype)
    if scale_by_keep and keep_prob > 0.0:
        scale = scale / keep_prob
    return x * per_sample(scale, x)


class DropPath(nn.Module):
    """Stochastic depth of one residual branch.

    `x + self.drop_path(branch)` works as everywhere; `self.drop_path.residual(x, branch)` computes the same and can
    save the work of the dropped samples. Modes:

    - `mask`: the branch runs on the whole batch, dropped samples are multiplied by 0.
    - `skip`: the branch runs on the kept samples only. Their number is B * (1 - drop_prob), rounded up or down at
      random so that its expectation is exact at every batch size, 1 included. Each sample is kept with probability
      1 - drop_prob exactly; the samples of one batch are not independent, since their count varies less than a
      binomial's. Below `break_even` the same draw is applied as a mask, because gathering would cost more than it saves.
      On a GPU a large batch's branches get the larger number at every step (`rounds_up`); what is kept stays the same.
    - `batch`: one draw decides for the whole batch (Huang et al. 2016).

    In `skip` and `batch` a branch with nothing to do runs on an empty slice, so every parameter still gets a (zero)
    gradient, which plain DistributedDataParallel needs. Branches must not mix samples. A batch norm inside one is looked
    for (`layers.branches`): in mode `skip` it sees the kept samples only, which is warned about once, and a single kept
    sample is masked there, as it is where the branch cannot be looked into. With no sample kept it is left as it is,
    statistics included. A branch that changes its input in place, where that is the shortcut, is computed anew for all
    samples when that is first seen, with a warning, and masked from then on.

    Under torch.compile what runs does not depend on rates: mode `skip` masks kinds with a break-even of `MASKED_COMPILED`
    and more, and `skip` and `batch` mask branches with a batch norm (which then sees every batch), branches with
    convolutions that inductor compiles for a known number of samples only (all but `layers.token_mixers.DepthwiseConv`),
    and callables that are neither modules nor methods of one. Draws and results are those of eager code.

    Inside torch.func.vmap with randomness "different" each call has a number of its own: dropped samples are masked there.

    torch.fx and TorchScript: a graph traced in training calls this module with the branch's output, so mode `skip` masks
    the same draw there, and rates may change as in eager code. TorchScript compiles evaluation, where this is the
    identity; training raises.

    In training a draw is made at every rate, 0 included: the random stream does not depend on the rates. Counts are
    drawn on the CPU and indices on x's device, both from torch's default generators, so nothing waits for the GPU.

    Args:
        drop_prob: Probability in [0, 1] that a sample's branch is dropped; `None` means 0.
        scale_by_keep: Divide the kept samples by 1 - drop_prob, so that the expectation is the branch itself.
        mode: `mask`, `skip` or `batch`.
        kind: What the branch computes, a key of `BREAK_EVEN`, which gives its `break_even`: the rate from which
            skipping pays in mode `skip`, compared with `drop_prob` when either is set. Other kinds always skip.

    Attributes:
        masks_all: Compute dropped samples too, and multiply them by 0: the same draws, for comparisons.
        least: Samples that a branch is given when none is kept.

    Raises:
        ValueError: A probability outside [0, 1], an unknown mode, or a kind that is no word.
    """

    least = 0
    _changes_input = False  # whether the branch was seen to change its input in place

    def __init__(
        self,
        drop_prob: float | None = 0.0,
        scale_by_keep: bool = True,
        mode: Mode = "mask",
        *,
        kind: str = "",
    ) -> None:
        super().__init__()
        self.scale_by_keep = scale_by_keep
        # The effective rate lives in a plain 0-dim CPU tensor: compiled code reads it as an input, so changing it
        # recompiles nothing (a Python float would), and it is no buffer, so state_dict, casts, meta construction,
        # EMA and export never see it. Eager code reads the number.
        with torch.inference_mode(False):  # it is changed in place, in any mode
            self._rate = torch.zeros((), dtype=torch.float64, device="cpu")
        self._counts = SampleCounts()  # for the report
        self._multiplier = 1.0
        self._drop_prob = check_drop_prob(drop_prob)
        if not isinstance(kind, str):
            raise ValueError(f"kind must be a word, one of {', '.join(BREAK_EVEN)} or another, got {kind!r}")
        self.kind, self._break_even = kind, BREAK_EVEN.get(kind, 0.0)
        self._looked_into = 0  # id of the code that was last looked into
        self._warned = False
        self.masks_all = False
        self.mode = mode
        self._refresh()

    # ---- settings -------------------------------------------------------------------------------------------------

    @property
    def drop_prob(self) -> float:
        """Nominal probability of dropping a sample, before the schedule's multiplier. May be set at any time."""
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, value: float | None) -> None:
        self._drop_prob = check_drop_prob(value)
        self._refresh()

    @property
    def multiplier(self) -> float:
        """Factor in [0, 1] that a schedule over training time puts on `drop_prob`."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = check_drop_prob(value, "multiplier")
        self._refresh()

    @property
    def rate(self) -> float:
        """Probability of dropping a sample in the next step: drop_prob * multiplier."""
        return self._drop_prob * self._multiplier

    @property
    def mode(self) -> Mode:
        """`mask`, `skip` or `batch`."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        check_choice(value, MODES, "mode")
        self._mode: Mode = value
        self._refresh()

    @property
    def break_even(self) -> float:
        """Nominal rate from which mode `skip` gathers the kept samples instead of masking the same draw."""
        return self._break_even

    @break_even.setter
    def break_even(self, value: float) -> None:
        self._break_even = check_drop_prob(value, "break_even")
        self._refresh()

    @property
    def skips(self) -> bool:
        """Whether dropped samples are left out of the computation: resolved from settings, never from timing."""
        return self._skips

    def skips_here(self) -> bool:
        """`skips` in the code that runs: compiled code decides by the kind of branch alone, eager code by the rate too."""
        if torch.compiler.is_compiling():
            skips = self._mode == "batch" or (self._mode == "skip" and self._break_even < MASKED_COMPILED)
            return skips and not self._changes_input
        return self._skips

    def _refresh(self) -> None:
        self._rate.fill_(self._drop_prob * self._multiplier)
        # From the nominal rate, not the scheduled one: a run keeps one form of each branch.
        mode = getattr(self, "_mode", "mask")
        skips = mode == "batch" or (mode == "skip" and self._drop_prob >= self._break_even)
        self._skips = skips and not self._changes_input

    # ---- counting -------------------------------------------------------------------------------------------------

    def reset_counts(self) -> None:
        """Forgets the draws made so far."""
        self._counts.set(0, 0, 0)

    def set_counts(self, seen: int, dropped: int, computed: int) -> None:
        """Goes on from draws that were made elsewhere."""
        self._counts.set(seen, dropped, computed)

    @property
    def samples_seen(self) -> int:
        """Samples drawn for in training since `reset_counts`."""
        return self._counts.samples_seen()

    @property
    def samples_dropped(self) -> int:
        """Samples dropped in training since `reset_counts`. On an accelerator, reading it waits for the device."""
        return self._counts.samples_dropped()

    @property
    def samples_computed(self) -> int:
        """Samples that the branch ran on in training since `reset_counts`, kept or not: what is masked is computed."""
        return self._counts.samples_computed()

    # ---- drawing --------------------------------------------------------------------------------------------------

    def _draw_count(self, batch: int) -> int | Tensor:
        """Number of kept samples, with expectation batch * keep_prob exactly; compiled, a 0-dim int64 tensor on the CPU."""
        chance = torch.rand((), dtype=torch.float64, device="cpu")
        if numbers_are_known():
            keep_prob, number = 1.0 - self.rate, float(chance)
            if self._mode == "batch":
                return batch if number < keep_prob else 0
            # min: in float64 batch + chance may round up to batch + 1
            return min(math.floor(batch * keep_prob + number), batch)
        keep = 1.0 - self._rate
        if self._mode == "batch":
            return (chance < keep).long() * batch
        return torch.floor(batch * keep + chance).long().clamp(max=batch)

    def choose(self, batch: int, device: torch.device) -> tuple[int | Tensor, Tensor]:
        """How many samples are kept, as of `_draw_count`, and a random order of all, of which the first are kept."""
        # argsort and narrow, not randperm(b)[:n]: inductor crashes on the latter
        return self._draw_count(batch), torch.rand(batch, device=device).argsort()

    def draw(self, x: Tensor, runs: Any = None, dtype: torch.dtype | None = None, groups: int = 1) -> Draw:
        """Draws for one batch, by the mode's own law, and counts it.

        Args:
            x: (B * groups, ...), of which only the size and the device matter.
            runs: What runs on the kept samples only, for `norms_of` and `masks_compiled`; `None`: all are computed.
            dtype: Of the factors; default x's.
            groups: Rows of x, one behind the other, that are one sample.
        """
        batch = x.shape[0] // groups
        if not torch.compiler.is_compiling() and self.rate == 0.0:
            return self._draw_nothing(batch, x.device)
        scale = self._scale(dtype or x.dtype)
        if self._mode == "mask":
            kept = torch.rand(batch, device=x.device) < 1.0 - self._rate
            self._counts.add(batch, kept, batch)
            return Draw(batch, kept * scale)
        count, order = self.choose(batch, x.device)
        if runs is not None and self.skips_here() and not self._masks_here(runs, count):
            draw = self._draw_to_skip(batch, count, order, scale, runs)
            return draw.as_mask() if self.masks_all else draw
        self._counts.add(batch, count, batch)
        # the rank of each sample in that order: the same kept set as `order[:count]` when gathering
        return Draw(batch, (order.argsort() < count) * scale)

    def _masks_here(self, runs: Any, count: int | Tensor) -> bool:
        """Whether what skips elsewhere is masked: by the compiler, or since vmap drew a number of its own for each call."""
        return self.masks_compiled(runs) if torch.compiler.is_compiling() else is_of_vmap(count)

    def _draw_nothing(self, batch: int, device: torch.device) -> Draw:
        """A draw at rate 0: the numbers are drawn and counted as at any rate, and nothing is made of them."""
        if device.type == "cpu" and runs_as_written():  # the same in less time, which small inputs feel
            draw_unread(batch, count=self._mode != "mask")
            self._counts.add_numbers(batch, batch, batch)
            return draw_of_all(batch)
        if self._mode != "mask":
            torch.rand((), dtype=torch.float64, device="cpu")  # of the count
        torch.rand(batch, device=device)
        self._counts.add(batch, batch, batch)
        return Draw(batch)

    def _draw_to_skip(self, batch: int, count: int | Tensor, order: Tensor, scale: Tensor, runs: Any) -> Draw:
        least, rounds_up = self.least_on(order.device), self.rounds_up(batch, order.device)
        if torch.compiler.is_compiling():
            assert isinstance(count, Tensor)
            rows = torch.ceil(batch * (1.0 - self._rate)).long() if rounds_up else count
            rows = rows.clamp(min=least, max=batch)
            self._counts.add(batch, count, rows)
            computed = int(rows.item())
            torch._check(computed >= least)
            torch._check(computed <= batch)
            idle, places = (), order.argsort()
            if least or rounds_up:
                scale = (torch.arange(computed, device=order.device) < count) * scale
        else:
            kept, places = int(count), None
            norms = self.norms_of(runs, kept)
            computed = samples_to_compute(kept, batch, norms)
            idle = () if computed else tuple(norms or ())
            computed = max(computed, least)
            if rounds_up and norms == [] and not self._warned:
                computed = max(computed, min(math.ceil(batch * (1.0 - self.rate)), batch))
            self._counts.add(batch, kept, computed)
            if kept == batch:  # nothing to leave out, nothing to gather
                return Draw(batch, scale)
            if computed == batch:
                return Draw(batch, (order.argsort() < kept) * scale, idle=idle)
            if computed == kept and order.device.type == "cpu":  # neighbours stay neighbours, for `layers.samples`
                return Draw(batch, scale, order.narrow(0, 0, kept).sort().values, idle)
            if order.device.type == "cuda":
                return Draw(batch, scale, order.narrow(0, 0, computed), idle, order=order, counting=kept)
            if computed > kept:
                scale = (torch.arange(computed, device=order.device) < kept) * scale
        return Draw(batch, scale, order.narrow(0, 0, computed), idle, places)

    def least_on(self, device: torch.device) -> int:
        """Samples that a branch is given when none is kept: on a GPU attention in bfloat16 fails on none (torch 2.11)."""
        return 1 if device.type == "cuda" and self.kind == "attention" else self.least

    def rounds_up(self, batch: int, device: torch.device) -> bool:
        """Whether a branch is given its largest number of samples at every step, of which the last may count for nothing.

        At one rate the kept samples are one of two numbers. To a GPU each number is a shape of its own: cuDNN prepares every
        convolution and attention for it, some 20 ms each, and the memory of one does not fit the other. Of a large batch
        half a sample more, on average, costs less. Batch norms would see that sample; where there are any it is left out.
        """
        return device.type == "cuda" and batch >= ROUNDED_UP and self._mode == "skip"

    def _scale(self, dtype: torch.dtype) -> Tensor:
        """Factor of the kept samples, a 0-dim CPU tensor: 1 / keep_prob, or 1 where nothing can be kept."""
        if not self.scale_by_keep:
            return torch.ones((), dtype=dtype, device="cpu")
        if numbers_are_known():
            return torch.full((), 1.0 / (1.0 - self.rate) if self.rate < 1.0 else 1.0, dtype=dtype, device="cpu")
        keep_prob = 1.0 - self._rate
        return torch.where(keep_prob > 0.0, 1.0 / keep_prob, 1.0).to(dtype)

    # ---- use ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Drops samples of a branch output x, (B, ...), that is already computed. Identity in eval and at rate 0."""
        if not self.training:
            return x
        if torch.jit.is_scripting():
            raise RuntimeError(
                "TorchScript has stochastic depth in evaluation only: call eval(), or train the model itself"
            )
        else:
            return self.forward_training(x)

    def forward_training(self, x: Tensor) -> Tensor:
        """`forward` in training, apart from it because TorchScript compiles `forward`."""
        if isinstance(x, torch.fx.Proxy):
            return self._in_graph(x)
        return self.draw(x).scaled(x)

    def residual(self, x: Tensor, branch: Branch, shortcut: Tensor | None = None) -> Tensor:
        """Returns shortcut + drop_path(branch(x)).

        Args:
            x: Input of the branch, (B, ...).
            branch: Callable from (B', ...) to the shortcut's shape but for the batch; called once, with the kept
                samples only where this module skips. It should leave its input as it is, see the class.
            shortcut: What the branch is added to, (B, ...); default x.

        Returns:
            A tensor like the shortcut; the branch's result is cast to the shortcut's dtype.
        """
        shortcut = x if shortcut is None else shortcut
        if not self.training:
            return shortcut + branch(x).to(shortcut.dtype)
        if isinstance(x, torch.fx.Proxy):  # a graph is being traced: it holds what the branch computes, for all samples
            return shortcut + self(branch(x)).to(shortcut.dtype)
        draw = self.draw(x, branch, shortcut.dtype)
        if shortcut is not x:
            taken = draw.take(x)
            with left_alone(draw.idle):
                return draw.add(shortcut, branch(taken))
        taken, shortcut = draw.split(x)
        before = _version(taken) if draw.kept is not None else None
        with left_alone(draw.idle):
            out = branch(taken)
        if before is not None and _version(taken) != before:
            return self._masked_after_all(x, branch, draw)
        return draw.add(shortcut, out)

    def _masked_after_all(self, x: Tensor, branch: Branch, draw: Draw) -> Tensor:
        """`residual` of a branch that has turned out to change its input, which is the shortcut of dropped samples too."""
        assert draw.kept is not None
        warnings.warn(
            f"mode {self._mode!r}: this residual branch changes its input in place, which is the shortcut of dropped samples "
            "too; it is masked from now on. To have it skip, use relu() instead of relu_(), ReLU(inplace=False) and the like",
            stacklevel=3,
        )
        self._changes_input, self._skips = True, False
        self._counts.add(0, 0, draw.batch - len(draw.kept))
        out = branch(x)  # again, since what it makes of the other samples is needed
        return draw.as_mask().add(x, out)

    # ---- what runs on the kept samples ----------------------------------------------------------------------------

    def masks_compiled(self, runs: Branch) -> bool:
        """Whether compiled code masks a branch, since it cannot say what that holds, or that wants to know its batch."""
        return masked_compiled(runs)

    def norms_of(self, runs: Branch, count: int) -> Sequence[nn.Module] | None:
        """The batch norms that a branch runs in training; `None` where it cannot be looked into.

        An empty list also where it does not matter: from two kept samples on they are only warned about, once.
        """
        code = id(getattr(runs, "__code__", runs))  # of a method or lambda, which are other objects at every call
        if count >= 2 and (self._warned or code == self._looked_into):
            return []
        held = held_modules(runs)
        self._looked_into = code
        norms = None if held is None else batch_norms(held)
        if norms:
            self.warn_of_batch_norm()
        return norms

    def warn_of_batch_norm(self) -> None:
        """Says once that mode `skip` changes what a batch norm sees. Mode `batch` does not: all samples or none."""
        if self._mode == "skip" and self.rate > 0.0 and not self._warned:
            self._warned = True
            warnings.warn(
                "mode 'skip': the batch norm inside this residual branch sees the kept samples only; "
                "a single kept sample is masked instead of skipped",
                stacklevel=2,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._counts.follow(fn(torch.zeros((), device=self._counts.kept_by_mask.device)).device)
        return self

    # ---- torch.fx and TorchScript ---------------------------------------------------------------------------------

    def _in_graph(self, x: torch.fx.Proxy) -> Any:
        """A call of this module as one node of the graph that torch.fx is tracing."""
        assert isinstance(x.tracer, torch.fx.Tracer)
        path = x.tracer.path_of_module(self)
        module = x.tracer.create_proxy("get_attr", path or "itself", (), {})  # "": this module alone is traced
        return call_drop_path(module, x)  # type: ignore[arg-type]

    @property
    def itself(self) -> "DropPath":
        """This module, which a graph traced of it alone calls by this name."""
        return self

    def extra_repr(self) -> str:
        """Settings that differ from timm's are always shown."""
        return f"drop_prob={round(self._drop_prob, 4):.4g}, mode={self._mode}"


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; `None` where nobody counts that."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


# TorchScript compiles properties unless they are named here; evaluation reads none.
DropPath.__jit_unused_properties__ = [  # type: ignore[attr-defined]
    name for name, value in vars(DropPath).items() if isinstance(value, property)
]


@torch.fx.wrap
def call_drop_path(module: DropPath, x: Tensor) -> Tensor:
    """Calls the module; one node of a traced graph, so that the rate, the mode and `training` stay the module's own."""
    return module(x)
