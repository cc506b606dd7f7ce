"""What a foreign drop-path module does to its input, found by calling it."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.drop_path import Mode
from layers.rates import as_number


@dataclass(frozen=True)
class DropLaw:
    """What a drop-path module of another library does.

    Attributes:
        attribute: The number that its rate is read from: `.drop_prob`, or `PART.p` where a part of it holds that.
        keeps: Whether that is the probability of keeping a sample.
        scale_by_keep: Whether kept samples are divided by that probability.
        mode: `mask` (one draw per sample) or `batch` (one per batch).
    """

    attribute: str
    keeps: bool
    scale_by_keep: bool
    mode: Mode

    def rate(self, module: nn.Module) -> float:
        """The rate of a module that follows this law."""
        part, _, key = self.attribute.rpartition(".")
        number = as_number(getattr(module.get_submodule(part), key))
        return 0.0 if number is None else 1.0 - number if self.keeps else number


def drop_law(module: nn.Module) -> DropLaw | None:
    """Finds out what a module does, by running copies of it with other rates.

    Names tell little: `p` may be a rate or the chance of keeping, and a subclass may do anything. A module is known if in
    evaluation it returns its input, and in training, at two rates that are put into one of its attributes, whole samples
    become 0 in that share and the others are multiplied by 1 or 1 / (1 - rate).

    Returns:
        The law; `None` if the module does something else, or takes no tensor alone.
    """
    names = [f"{part}.{key}" for part, m in module.named_modules() for key, value in (*vars(m).items(), *m._buffers.items())
             if as_number(value) is not None or (value is None and not key.startswith("_"))]  # fmt: skip
    with undisturbed(module):
        for name in names:
            for keeps in (False, True):
                seen = {_observe(module, name, keeps, rate) for rate in (0.25, 0.5)}
                if len(seen) == 1 and (law := seen.pop()) is not None:
                    return law
    return None


def _observe(module: nn.Module, attribute: str, keeps: bool, rate: float) -> DropLaw | None:
    """The law that a copy of the module follows at that rate, if it follows one."""
    laws: set[tuple[bool, Mode] | None] = set()
    try:
        trial = copy.deepcopy(module).cpu().train()
        part, _, key = attribute.rpartition(".")
        holder = trial.get_submodule(part)
        old, value = getattr(holder, key), 1.0 - rate if keeps else rate
        setattr(holder, key, torch.full_like(old, value, dtype=torch.float32) if isinstance(old, Tensor) else value)
    except Exception:  # somebody's module may refuse anything
        return None
    # Sizes that broadcast with no other: a module may be made for images (B, C, H, W) or for tokens (B, L, C) only.
    for shape in ((3,), (3, 5), (3, 5, 7)):
        x = torch.rand(512, *shape) + 0.5
        try:
            trial.eval()
            if not torch.equal(trial(x.clone()), x):
                return None
            trial.train()
            factors = _factors(trial, x)
            mode: Mode = "mask"
            if len((factors != 0).unique()) == 1:
                mode = "batch"
                factors = torch.stack([_factors(trial, x[:2]) for _ in range(200)])  # (200, 2)
                if not torch.equal(factors[:, 0] != 0, factors[:, 1] != 0):
                    return None
        except Exception:
            continue
        kept = factors[factors != 0]
        share = 1.0 - kept.numel() / factors.numel()
        scales = [scaled for scaled, factor in ((False, 1.0), (True, 1.0 / (1.0 - rate)))
                  if torch.allclose(kept, torch.tensor(factor))]  # fmt: skip
        # 0.12: four standard deviations of 200 draws at least; at a rate of 0.25, 0.75 is far outside
        laws.add((scales[0], mode) if len(scales) == 1 and abs(share - rate) < 0.12 else None)
    if len(laws) != 1 or (law := laws.pop()) is None:
        return None
    return DropLaw(attribute, keeps, *law)


def _factors(module: nn.Module, x: Tensor) -> Tensor:
    """What a module multiplied each sample of x by, (B,); NaN where it was not one number."""
    out = module(x.clone())
    if out.shape != x.shape:
        raise TypeError("not made for this number of dimensions")
    ratio = (out / x).flatten(1)  # (B, ...)
    return torch.where((ratio - ratio[:, :1]).abs().amax(1) < 1e-5, ratio[:, 0], torch.nan)


def bounded(rate: float) -> float:
    """The next rate in [0, 1]: somebody's own module may hold any number."""
    return min(max(rate, 0.0), 1.0) if rate == rate else 0.0


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Draws start at that seed inside; afterwards random states, training flags and buffers (statistics) are as before."""
    numpy = sys.modules.get("numpy")  # only if somebody else draws from it
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(m._buffers, key, buffer, buffer.detach().clone())
               for m in model.modules() for key, buffer in m._buffers.items() if buffer is not None]  # fmt: skip
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=cuda):
            # not torch.manual_seed, which would seed a CUDA device that is started later
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
                generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for module, flag in flags:
            module.training = flag
        for store, key, buffer, value in buffers:
            store[key] = buffer
            if not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 are computed in float32: neither TF32 nor bfloat16 nor autocast."""
    backends: Any = torch.backends
    units = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
                        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]  # fmt: skip
    lower = [(unit, unit.fp32_precision) for unit in units if unit.fp32_precision not in ("none", "ieee")]
    try:
        for unit, _ in lower:
            unit.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for unit, precision in lower:
            unit.fp32_precision = precision
