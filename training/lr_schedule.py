"""The learning rate over a run, by timm's schedulers and under timm's names: a pure function of the optimizer step.

Differences from timm's script: `optim.epochs` is the whole run, so warm-up, cycles and cooldown are parts of it; and a
milestone m lowers the rate after m epochs, as PyTorch's MultiStepLR does, where timm's lowers it one earlier.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import timm.scheduler
import torch
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from timm.scheduler.scheduler import Scheduler

from files.errors import ConfigError, FieldError, nearest

if TYPE_CHECKING:
    from training.config import OptimSection

LrScheduleName = Literal["cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "constant"]
LR_SCHEDULES: tuple[str, ...] = get_args(LrScheduleName)

_LONGEST_CYCLE = 1_000_000
_CYCLES = ("cycle_limit", "cycle_mul", "cycle_decay", "cooldown_epochs")
# The keys that have an effect on a schedule, each with its default; "needed" where there is none, None: timm's own way.
_KEYS: dict[str, dict[str, Any]] = {
    "cosine": {**dict.fromkeys(_CYCLES), "k_decay": None},
    "tanh": dict.fromkeys(_CYCLES),
    "poly": {"decay_rate": "needed", **dict.fromkeys(_CYCLES), "k_decay": None},
    "step": {"decay_epochs": "needed", "decay_rate": 0.1},
    "multistep": {"decay_milestones": "needed", "decay_rate": 0.1},
    "wsd": {"decay_epochs": None, "cooldown_epochs": None},
    "rsqrt": {"decay_epochs": None, "cooldown_epochs": None},
    "constant": {},
}
SCHEDULE_KEYS: tuple[str, ...] = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
"""The keys of section `optim` that belong to some schedules only; None in the config where they are not given."""

_NEEDED = {
    "decay_epochs": "decay_epochs: epochs between two decays",
    "decay_rate": "decay_rate: the power of the polynomial, for example 1.0",
    "decay_milestones": "decay_milestones: epochs after which the rate is lowered, for example [30, 60, 90]",
}


def known_schedule(name: Any) -> Any:
    """The name as it is; says of timm's other names why they are not here.

    Raises:
        ValueError: An unknown name, with the nearest.
    """
    if name == "plateau":
        raise ValueError(
            "'plateau' is not offered: its rate hangs on the metrics before and not on the step alone (timm calls it "
            "deprecated); use cosine, or step, and early_stopping to end a run that no longer improves"
        )
    if name == "none":
        raise ValueError("'none' is called 'constant' here; with optim.warmup_epochs=0 the rate never changes")
    if isinstance(name, str) and name not in LR_SCHEDULES:
        raise ValueError(f"expected {' or '.join(map(repr, LR_SCHEDULES))}, got {name!r}{nearest(name, LR_SCHEDULES)}")
    return name


def check_schedule(optim: OptimSection) -> None:
    """Refuses keys without effect on the schedule and misses those it needs; fills in defaults.

    Raises:
        FieldError: Naming the key.
    """
    own, kind = _KEYS[optim.schedule], optim.schedule
    for key in SCHEDULE_KEYS:
        if getattr(optim, key) is not None and key not in own:
            takes = f"its keys are {', '.join(own)}" if own else "it takes none of these keys"
            raise FieldError(key, f"has no effect with schedule {kind!r}; {takes}", beside="schedule")
    for key, default in own.items():
        if getattr(optim, key) is None:
            if default == "needed":
                raise FieldError("schedule", f"{kind!r} needs {_NEEDED[key]}")
            setattr(optim, key, default)
    if optim.decay_milestones and any(b <= a for a, b in pairwise([0.0, *optim.decay_milestones])):
        raise FieldError("decay_milestones", f"epochs must rise strictly from above 0, got {optim.decay_milestones}")
    left = optim.epochs - optim.warmup_epochs - (optim.cooldown_epochs or 0)
    if optim.cooldown_epochs and left <= 0:
        raise FieldError(
            "cooldown_epochs",
            f"leaves no epoch between warm-up and cooldown, of optim.epochs ({optim.epochs})",
            beside="epochs",
        )
    longest = left if kind in ("wsd", "rsqrt") else optim.epochs
    last = optim.decay_milestones[-1] if optim.decay_milestones else optim.decay_epochs
    if last is not None and last > longest:
        key = "decay_milestones" if optim.decay_milestones else "decay_epochs"
        what = "the epochs between warm-up and cooldown" if kind in ("wsd", "rsqrt") else "optim.epochs"
        raise FieldError(key, f"{last:g} is beyond {what} ({longest:g})", beside="epochs")
    if optim.cycle_limit in (None, 1):
        for key in ("cycle_mul", "cycle_decay"):
            if getattr(optim, key) is not None:
                raise FieldError(key, "has no effect on a single cycle; set cycle_limit to 2 or more")
    elif optim.cycle_mul and (optim.cycle_limit - 1) * math.log(optim.cycle_mul) > math.log(_LONGEST_CYCLE):
        times = f"more than {_LONGEST_CYCLE:,} times the first"
        raise FieldError("cycle_mul", f"{optim.cycle_mul:g} makes the last of {optim.cycle_limit} cycles {times}")


def build_scheduler(optimizer: torch.optim.Optimizer, optim: OptimSection, steps_per_epoch: int) -> Scheduler:
    """Learning rate as a pure function of the optimizer step, set by `step_update(step)`.

    Raises:
        ConfigError: The schedule is one that this timm has not.
    """
    total = optim.epochs * steps_per_epoch
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    cooldown = round((optim.cooldown_epochs or 0) * steps_per_epoch)
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": min(optim.warmup_lr, optim.lr),
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    length = total - warmup - cooldown
    if optim.schedule == "constant" or length <= 0:
        return StepLRScheduler(optimizer, decay_t=total + 1, decay_rate=1.0, **common)
    if optim.schedule in ("step", "multistep"):
        common["warmup_prefix"] = False  # epochs are counted from the start of the run
        rate = optim.decay_rate
        assert rate is not None, "filled in by check_schedule"
        if optim.schedule == "step":
            assert optim.decay_epochs is not None, "by check_schedule"
            every = max(1, round(optim.decay_epochs * steps_per_epoch))
            return StepLRScheduler(optimizer, decay_t=every, decay_rate=rate, **common)
        # timm compares with the step's number + 1
        steps = [round(epoch * steps_per_epoch) + 1 for epoch in optim.decay_milestones or ()]
        return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=rate, **common)
    lowest = min(optim.min_lr, optim.lr)
    if optim.schedule in ("wsd", "rsqrt"):
        return _warmup_stable_decay(optimizer, optim, steps_per_epoch, length, common | {"lr_min": lowest})
    cycles = {key: getattr(optim, key) for key in ("cycle_limit", "cycle_mul", "cycle_decay", "k_decay")}
    common |= {key: value for key, value in cycles.items() if value is not None}
    count, growth = optim.cycle_limit or 1, optim.cycle_mul or 1.0
    # All cycles together fill what is left; the only one is a whole number of steps. A hair less, because at the very end
    # of a cycle timm's logarithm may round to the one before, whose polynomial is then a root of a negative number.
    first = length if count == 1 else length / sum(growth**i for i in range(count)) * (1 - 1e-9)
    common |= {"t_initial": first, "lr_min": lowest}
    if optim.schedule == "poly":
        return PolyLRScheduler(optimizer, power=optim.decay_rate or 0.0, **common)
    return {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler}[optim.schedule](optimizer, **common)


def _warmup_stable_decay(
    optimizer: torch.optim.Optimizer, optim: OptimSection, steps_per_epoch: int, length: int, common: dict[str, Any]
) -> Scheduler:
    """timm's scheduler of constant (wsd) or 1/sqrt (rsqrt) rates with a decay at the end, by default a fifth of the run."""
    scheduler = getattr(timm.scheduler, "WSDLRScheduler", None)
    if scheduler is None:
        raise ConfigError(f"optim.schedule: {optim.schedule} needs a newer timm: pip install --upgrade timm")
    decay = 0.2 * length if optim.decay_epochs is None else optim.decay_epochs * steps_per_epoch
    stable, fall = ("rsqrt", "linear") if optim.schedule == "rsqrt" else ("constant", "1-sqrt")
    del common["warmup_prefix"]  # always so
    decay_t = min(length, max(1, round(decay)))
    return scheduler(optimizer, t_initial=length, decay_t=decay_t, stable_fn=stable, decay_fn=fall, **common)
