"""The learning rate at every step, by each schedule."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from files.errors import ConfigError
from training import lr_schedule as tested
from training.config import OptimSection, load_config
from training.lr_schedule import LR_SCHEDULES, SCHEDULE_KEYS, build_scheduler

STEPS = 10  # per epoch


def section(**settings) -> OptimSection:
    return OptimSection.model_validate({"epochs": 6, "warmup_epochs": 2, "lr": 0.1, "warmup_lr": 0.01, "min_lr": 0.001,
                                        **settings})  # fmt: skip


def rates(optim: OptimSection) -> list[float]:
    """The learning rate at each step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = build_scheduler(optimizer, optim, STEPS)
    found = []
    for step in range(optim.epochs * STEPS):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_then_cosine() -> None:
    warm_up = [0.01 + (0.1 - 0.01) * step / 20 for step in range(20)]
    cosine = [0.001 + (0.1 - 0.001) * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert rates(section()) == pytest.approx(warm_up + cosine)


def test_warm_up_then_constant() -> None:
    found = rates(section(schedule="constant"))
    assert found[:20] == pytest.approx([0.01 + 0.09 * step / 20 for step in range(20)])
    assert found[20:] == pytest.approx([0.1] * 40)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: str) -> None:
    assert rates(section(schedule=schedule, warmup_epochs=0))[0] == pytest.approx(0.1)


def test_the_cosine_comes_down_to_min_lr() -> None:
    assert rates(section(warmup_epochs=0))[-1] == pytest.approx(0.001, abs=1e-4)


def test_a_fraction_of_an_epoch_warms_up() -> None:
    found = rates(section(warmup_epochs=0.5, schedule="constant"))
    assert found[:6] == pytest.approx([0.01, 0.028, 0.046, 0.064, 0.082, 0.1])


def test_warm_up_may_fill_the_run() -> None:
    found = rates(section(epochs=2, warmup_epochs=2))
    assert found == pytest.approx([0.01 + 0.09 * step / 20 for step in range(20)])


def test_no_part_of_the_schedule_exceeds_lr() -> None:
    found = rates(section(lr=1e-4, warmup_lr=1e-3, min_lr=1e-2))
    assert found == pytest.approx([1e-4] * len(found))


EACH: list[dict[str, Any]] = [
    {"schedule": "cosine"},
    {
        "schedule": "cosine",
        "cycle_limit": 3,
        "cycle_mul": 2.0,
        "cycle_decay": 0.5,
        "k_decay": 1.5,
        "cooldown_epochs": 1,
    },
    {"schedule": "tanh", "cooldown_epochs": 0.5},
    {"schedule": "poly", "decay_rate": 0.9, "cycle_limit": 2},
    {"schedule": "step", "decay_epochs": 1.5, "decay_rate": 0.5},
    {"schedule": "multistep", "decay_milestones": [3, 4.5]},
    {"schedule": "wsd", "decay_epochs": 1, "cooldown_epochs": 1},
    {"schedule": "rsqrt"},
    {"schedule": "constant"},
]


def test_each_schedule_is_looked_at() -> None:
    assert {settings["schedule"] for settings in EACH} == set(LR_SCHEDULES)


@pytest.mark.parametrize("settings", EACH, ids=str)
def test_the_rate_is_a_pure_function_of_the_step(settings: dict[str, Any]) -> None:
    """A fresh scheduler that jumps to a step has the rate of one that walked there: nothing of it is saved."""
    optim = section(**settings)
    walked = rates(optim)
    assert len(set(walked)) > 15, "it changes"
    assert walked[:20] == pytest.approx([0.01 + 0.09 * step / 20 for step in range(20)]), "the warm-up"
    for step in (0, 7, 20, 33, 59):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
        build_scheduler(optimizer, optim, STEPS).step_update(step)
        assert optimizer.param_groups[0]["lr"] == walked[step]


# ---- timm's other schedules -----------------------------------------------------------------------------------------


def test_steps_count_from_the_start_of_the_run() -> None:
    found = rates(section(schedule="step", decay_epochs=1.5, warmup_epochs=0, epochs=4, decay_rate=0.5))
    assert found == pytest.approx([0.1 * 0.5 ** (step // 15) for step in range(40)])
    assert section(schedule="step", decay_epochs=2).decay_rate == 0.1, "filled in, so that the saved config says it"


def test_a_milestone_lowers_the_rate_after_that_many_epochs() -> None:
    found = rates(section(schedule="multistep", decay_milestones=[1, 2.5], warmup_epochs=0, epochs=3))
    assert found == pytest.approx([0.1] * 10 + [0.01] * 15 + [0.001] * 5)


def test_polynomial_and_tanh() -> None:
    shares = [step / 40 for step in range(40)]
    poly = rates(section(schedule="poly", decay_rate=2.0))[20:]
    assert poly == pytest.approx([0.001 + 0.099 * (1 - share) ** 2 for share in shares])
    tanh = rates(section(schedule="tanh"))[20:]
    assert tanh == pytest.approx([0.001 + 0.099 * (1 - math.tanh(-7 * (1 - t) + 3 * t)) / 2 for t in shares])


def test_cycles_and_cooldown_fit_into_the_run() -> None:
    found = rates(section(cycle_limit=2, cycle_decay=0.5, cooldown_epochs=1, warmup_epochs=1))
    assert found[10] == pytest.approx(0.1) and found[30] == pytest.approx(0.05), "peaks"
    assert found[29] < 0.002 and found[50:] == pytest.approx([0.001] * 10), "the end of a cycle, and the cooldown"
    longer = rates(section(cycle_limit=2, cycle_mul=3.0, warmup_epochs=0, epochs=4))
    assert longer[10] == pytest.approx(0.1), "10 steps, then 30"


@pytest.mark.parametrize("growth", [1.0, 1.5, 3.0])
def test_no_cycle_ends_in_a_root_of_a_negative_number(growth: float) -> None:
    settings = {"decay_rate": 0.5, "cycle_limit": 5, "cycle_mul": growth, "cooldown_epochs": 1, "warmup_epochs": 0}
    for epochs in (7, 10, 31):
        found = rates(section(schedule="poly", epochs=epochs, **settings))
        assert all(isinstance(rate, float) and 0.001 <= rate <= 0.1 + 1e-9 for rate in found)


def test_hold_then_decay() -> None:
    found = rates(section(schedule="wsd", decay_epochs=2, cooldown_epochs=1))
    assert found[20:31] == pytest.approx([0.1] * 11) and found[31] < 0.1
    assert found[50:] == pytest.approx([0.001] * 10)
    falling = rates(section(schedule="rsqrt", warmup_epochs=1))
    assert falling[30] == pytest.approx(0.1 / math.sqrt(3)), "1 / sqrt(t), with the warm-up as the unit"
    assert rates(section(schedule="wsd", epochs=12))[99] == pytest.approx(0.1), "a fifth of 10 epochs by default"


def test_an_old_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tested.timm.scheduler, "WSDLRScheduler")
    with pytest.raises(ConfigError, match=r"optim\.schedule: wsd needs a newer timm"):
        rates(section(schedule="wsd"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.schedule=cosin"], "got 'cosin'; did you mean 'cosine'?"),
        (["optim.schedule=plateau"], "'plateau' is not offered: its rate hangs on the metrics"),
        (["optim.schedule=none"], "'none' is called 'constant' here"),
        (["optim.schedule=3"], "got 3"),
        (["optim.decay_rate=0.1"], "has no effect with schedule 'cosine'; its keys are cycle_limit"),
        (["optim.schedule=constant", "optim.cooldown_epochs=1"], "'constant'; it takes none of these keys"),
        (["optim.schedule=step"], "'step' needs decay_epochs"),
        (["optim.schedule=multistep"], "'multistep' needs decay_milestones"),
        (["optim.schedule=poly"], "'poly' needs decay_rate: the power"),
        (["optim.schedule=multistep", "optim.decay_milestones=[5, 3]"], "epochs must rise strictly"),
        (["optim.schedule=multistep", "optim.decay_milestones=[3, 500]"], "500 is beyond optim.epochs"),
        (["optim.schedule=step", "optim.decay_epochs=500"], "500 is beyond optim.epochs"),
        (["optim.schedule=wsd", "optim.decay_epochs=19"], "19 is beyond the epochs between warm-up and cooldown"),
        (["optim.cooldown_epochs=25"], "leaves no epoch between warm-up and cooldown"),
        (["optim.cycle_mul=2"], "no effect on a single cycle"),
        (
            ["optim.cycle_limit=3", "optim.cycle_mul=1e4"],
            "10000 makes the last of 3 cycles more than 1,000,000",
        ),
        (["optim.decay_epoch=3"], "did you mean 'optim.decay_epochs'?"),
    ],
)
def test_what_has_no_effect_or_is_missing_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["optim.epochs=20", "optim.warmup_epochs=2", *settings])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_every_key_is_a_key_of_the_config() -> None:
    assert set(SCHEDULE_KEYS) <= OptimSection.model_fields.keys()
