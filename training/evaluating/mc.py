"""MC drop-path: a prediction as the mean of several passes in which branches are dropped as in training.

As MC dropout (Gal and Ghahramani 2016, arXiv 1506.02142), with stochastic depth for dropout: K passes in the training mode of
the drop-path modules alone (batch norms and dropout stay in evaluation), each sample with masks of its own, and the mean of
the probabilities. The masks are a function of (seed, sample, pass, module): they depend on no batch, worker or process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from files.errors import ConfigError
from files.words import counted
from layers.draw import Draw
from layers.drop_path import DropPath
from stochastic_depth import set_drop_path
from training.config import TrainConfig
from training.data.draws import hash_words, uniform

_STREAM = 0x3C  # of draws, apart from those of training and of corruptions


@dataclass(frozen=True)
class MonteCarlo:
    """What is asked for.

    Attributes:
        passes: Forward passes per image.
        rate: The largest drop-path rate over blocks; None: the rates that the model's run was trained with.
        seed: Of the masks.
    """

    passes: int
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ConfigError(f"--mc: must be at least 1 pass, got {self.passes}")
        if self.rate is not None and not 0 < self.rate < 1:
            raise ConfigError(f"--mc-rate: must be above 0 and below 1, got {self.rate:g}")


@dataclass(frozen=True)
class DropRates:
    """The rates that are at work.

    Attributes:
        passes: See `MonteCarlo`.
        rates: Of each block in order.
        told: Both in words.
    """

    passes: int
    rates: tuple[float, ...]
    told: str


def set_rates(model: nn.Module, run: TrainConfig | None, wanted: MonteCarlo) -> DropRates:
    """Sets a model's drop-path rates for its passes; its evaluation stays as it is.

    Args:
        model: Is set to mode mask.
        run: The config of the run that the model comes from.
        wanted: What is asked for.

    Raises:
        ConfigError: The model has no place for drop path, or all rates are 0.
    """
    section = run.drop_path if run is not None else None
    profile: Any = "linear"
    rate_is: Any = "max"
    rate = wanted.rate
    if section is not None and (rate is None or not isinstance(section.profile, list)):
        profile = section.profile
    if section is not None and rate is None:
        rate, rate_is = section.rate, section.rate_is
    if rate is None and not isinstance(profile, list):
        raise ConfigError(
            "--mc: these weights do not say which drop-path rates they were trained with; give --mc-rate RATE"
        )
    try:
        depth = set_drop_path(model, rate, profile=profile, rate_is=rate_is, mode="mask")
    except ValueError as error:
        raise ConfigError(f"--mc: {error}") from None
    if not any(depth.rates):
        raise ConfigError(
            "--mc: the model was trained with drop-path rate 0, so that all passes would be alike; give --mc-rate RATE"
        )
    shape = profile if isinstance(profile, str) else "a rate per block"
    passes = counted(wanted.passes, "pass")
    told = f"mean of {passes} with drop path, rates up to {max(depth.rates):g} ({shape})"
    return DropRates(wanted.passes, tuple(depth.rates), told)


class McDropPath(nn.Module):
    """Gives the logarithm of the mean of the probabilities over several passes.

    Args:
        evaluated: From images to logits or logarithms of probabilities; contains the model. In evaluation.
        wanted: How often, and the seed.

    Attributes:
        indices: Of the samples in the next batch, (B,); see `watch`.
    """

    def __init__(self, evaluated: nn.Module, wanted: MonteCarlo) -> None:
        super().__init__()
        self.evaluated, self.wanted = evaluated, wanted
        self.drop_paths = [m for m in evaluated.modules() if isinstance(m, DropPath) and m.drop_prob > 0]
        self.indices = torch.zeros(0, dtype=torch.int64)

    def watch(self, batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """The batches (images, targets, indices, ...), whose indices are noted: they say the masks."""
        for batch in batches:
            self.indices = torch.as_tensor(batch[2])
            yield batch

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor | None = None
        for number in range(self.wanted.passes):
            with self._dropping(number):
                logits = self.evaluated(images)
            probabilities = logits.double().softmax(dim=-1)  # in double: the order of the sum leaves no trace
            total = probabilities if total is None else total + probabilities
        assert total is not None
        return (total / self.wanted.passes).log().float()

    @contextlib.contextmanager
    def _dropping(self, number: int) -> Iterator[None]:
        """The drop-path modules in training, with the masks of one pass."""
        for place, module in enumerate(self.drop_paths):
            module.training = True
            module.draw = _Draws(module, self._masks(number, place))  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in self.drop_paths:
                module.training = False
                vars(module).pop("draw", None)

    def _masks(self, number: int, place: int) -> Callable[[int, int], Tensor]:
        samples = self.indices.numpy()

        def numbers(call: int, rows: int) -> Tensor:
            streams = hash_words(self.wanted.seed, _STREAM, samples, number, place, call)
            return torch.from_numpy(uniform(streams, rows // len(samples))).flatten()  # (B * parts,)

        return numbers


class _Draws:
    """In place of `DropPath.draw`: a mask that belongs to the samples.

    Args:
        module: Whose rate it is.
        numbers: (call, rows) -> as many numbers in [0, 1).
    """

    def __init__(self, module: DropPath, numbers: Callable[[int, int], Tensor]) -> None:
        self.module, self.numbers = module, numbers
        self.calls = 0  # more than one where a module serves two branches, or an image and its mirror image

    def __call__(self, x: Tensor, _runs: Any = None, dtype: torch.dtype | None = None, groups: int = 1) -> Draw:
        keep_prob = 1.0 - self.module.drop_prob
        kept = self.numbers(self.calls, x.shape[0] // groups) < keep_prob
        self.calls += 1
        scale = kept / keep_prob if self.module.scale_by_keep else kept
        return Draw(len(kept), scale.to(device=x.device, dtype=dtype or x.dtype))
