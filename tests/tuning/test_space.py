"""Keys of the training config as Optuna's parameters, and back."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from files.errors import ConfigError
from tests.tuning.parts import study
from tuning.space import Space, digest_of

SCHEDULES = "space.drop_path.schedule=[{kind: constant}, {kind: early, cutoff_epochs: 1}]"


def space(tmp_path: Path, *overrides: str) -> Space:
    return Space(study(tmp_path, *overrides))


def test_distributions(tmp_path: Path) -> None:
    made = space(
        tmp_path,
        SCHEDULES,
        "space.optim.lr={low: 1e-4, high: 1e-2, log: true}",
        "space.optim.epochs={low: 2, high: 9, step: 3}",
        "space.optim.warmup_epochs={low: 0, high: 1}",
        "space.drop_path.profile=[linear, [0.0, 0.1]]",
    )
    d = made.distributions
    assert d["drop_path.rate"] == optuna.distributions.FloatDistribution(0.0, 0.5)
    assert d["optim.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert d["optim.epochs"] == optuna.distributions.IntDistribution(2, 8, step=3)
    assert d["optim.warmup_epochs"] == optuna.distributions.FloatDistribution(0.0, 1.0), (
        "a number, though given as 0 and 1"
    )
    assert d["drop_path.profile"] == optuna.distributions.CategoricalDistribution(["linear", "[0.0, 0.1]"])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_optuna_holds_is_decoded_to_what_was_encoded(tmp_path_factory, data) -> None:
    made = (
        ROUND_TRIP[0] if ROUND_TRIP else space(tmp_path_factory.mktemp("a"), SCHEDULES, "space.data.sampler=[shuffle]")
    )
    ROUND_TRIP[:] = [made]
    values: dict[str, Any] = {
        "drop_path.rate": data.draw(st.floats(0, 0.5)),
        "drop_path.schedule": data.draw(st.sampled_from(made.grid_points("drop_path.schedule"))),
        "data.sampler": "shuffle",
    }
    assert made.decode(made.encode(values)) == values
    config = made.candidate(values)
    assert config.drop_path.rate == values["drop_path.rate"]


ROUND_TRIP: list[Space] = []


def test_a_candidate_is_the_base_with_other_values(tmp_path: Path) -> None:
    made = space(tmp_path, SCHEDULES)
    config = made.candidate({"drop_path.rate": 0.3, "drop_path.schedule": {"kind": "early", "cutoff_epochs": 1}})
    assert (config.drop_path.rate, config.drop_path.schedule.kind, config.drop_path.schedule.shape) == (
        0.3,
        "early",
        "linear",
    )
    assert config.optim == made.study.base.optim
    assert made.study.base.drop_path.rate is None, "the base is as it was"
    with pytest.raises(ConfigError, match=r"drop_path\.rate=2: must be at most 1"):
        made.candidate({"drop_path.rate": 2})


def test_at_rate_0_nothing_else_of_drop_path_counts(tmp_path: Path) -> None:
    made = space(tmp_path, SCHEDULES, "space.drop_path.profile=[linear, constant]", "drop_path.mode=skip")
    early = {"kind": "early", "cutoff_epochs": 1}
    zero = made.candidate({"drop_path.rate": 0.0, "drop_path.profile": "constant", "drop_path.schedule": early})
    assert zero == made.candidate({"drop_path.rate": 0.0}) and zero.drop_path.mode == "skip"
    assert digest_of(made.candidate({"drop_path.rate": 0.1, "drop_path.profile": "constant"})) != digest_of(
        made.candidate({"drop_path.rate": 0.1})
    )


def test_the_digest_is_of_what_is_learned(tmp_path: Path) -> None:
    base = study(tmp_path).base
    digest = digest_of(base)
    assert len(digest) == 12
    for word in ("runtime.threads=2", "data.workers=2", "checkpoint.keep=5", "checkpoint.every_steps=9"):
        assert digest_of(study(tmp_path, word).base) == digest, word
    assert digest_of(base.model_copy(update={"seed": 5})) == digest
    others = [
        study(tmp_path, w).base
        for w in ("optim.epochs=3", "ema.enabled=true", "data.train_samples=99", "model.dims=[8, 8]")
    ]
    assert len({digest, *map(digest_of, others)}) == 5
    assert digest_of(study(tmp_path, "optim.clip_grad=null").base) == digest, "a default that is written out"


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    made = space(tmp_path, "search={sampler: grid}", "space.drop_path.rate={low: 0, high: 0.3, step: 0.1}",
                 "space.optim.epochs={low: 1, high: 2}")  # fmt: skip
    grid = made.grid()
    assert [values["drop_path.rate"] for values in grid[::2]] == [0.0, 0.1, 0.2, 0.3]
    assert len(grid) == 8 and grid[1] == {"drop_path.rate": 0.0, "optim.epochs": 2}
    for values in grid:
        assert made.distributions["drop_path.rate"]._contains(made.encode(values)["drop_path.rate"])


def test_what_is_left_open_is_as_in_the_base(tmp_path: Path) -> None:
    made = space(tmp_path, "space.optim.lr={low: 1e-3, high: 1e-2}", "space.drop_path.profile=[constant, cosine]")
    assert made.completed({"drop_path.rate": 0.0}) == {
        "drop_path.rate": 0.0, "optim.lr": 3e-3, "drop_path.profile": "constant"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["space.drop_path.ratee=[0.0]"], "unknown key; did you mean 'drop_path.rate'"),
        (["space.dropp_path=[0.0]"], "unknown key; did you mean 'drop_path'"),
        (["space.seed=[1, 2]"], "has no effect: seeds are given by"),
        (["space.runtime.threads=[1, 2]"], "cannot be searched: nothing that is learned"),
        (["space.checkpoint.keep=[1, 2]"], "cannot be searched"),
        (["space.log.wandb=[a, b]"], "cannot be searched"),
        (["space.drop_path=[{rate: 0.1}]"], r"drop_path\.rate: lies within drop_path"),
        (["space.drop_path.profile=[]"], "has no values"),
        (["space.drop_path.profile=[linear, linear]"], 'lists "linear" twice'),
        (["space.drop_path.profile=[linear, liner]"], r"profile\[1\]: the training config refuses liner: .*'linear'"),
        (["space.drop_path.rate={low: 0.0, high: 1.5}"], r"drop_path\.rate.*: the training config refuses 1\.5"),
        (["space.drop_path.schedule=[{kind: early, cutoff_epochs: 9}]"], "refuses .*beyond optim.epochs"),
        (["space.drop_path.mode={low: 0, high: 1}"], "is no number; give a list"),
        (["space.optim.epochs={low: 1.5, high: 3}"], "is an integer; give integers, got 1.5, 3"),
        (["search={sampler: grid}"], "a grid needs a step"),
        (["search={sampler: grid}", "space.drop_path.rate={low: 0.1, high: 0.2, log: true}"], "a grid needs a step"),
        (["search={sampler: grid}", "space.drop_path.rate={low: 0, high: 1, step: 1e-5}"], "a grid of 100001 points"),
        (["search={enqueue: [{drop_path.rate: 0.7}]}"], r"enqueue\[0\]\.drop_path\.rate: 0\.7 is not in the space"),
        (["search={enqueue: [{optim.lr: 0.7}]}"], r"optim\.lr: is not in the space: drop_path\.rate"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        space(tmp_path, *words)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_value_that_needs_another_is_allowed(tmp_path: Path) -> None:
    """balance_power has no effect beside sampler 'shuffle', which the base has."""
    made = space(tmp_path, "space.data.sampler=[shuffle, balanced]", "space.data.balance_power=[0.5, null]")
    assert made.candidate({"data.sampler": "balanced", "data.balance_power": 0.5}).data.balance_power == 0.5


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("space.model.name=[convformer_n4, caformer_n5]", "unknown model 'caformer_n5'; did you mean 'caformer_n4'?"),
        ("space.model.name=[convformer_n4, timm/resnet10]", "unknown model 'timm/resnet10'; did you mean"),
        ("space.model.name=[convformer_n4, mine.yaml]", "mine.yaml"),
        ("space.model=[{name: convformer_n4}, {name: nope}]", "unknown model 'nope'"),
    ],
)
def test_a_model_that_is_not_there_is_refused_before_the_study(words: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the training config refuses") as caught:
        space(tmp_path, words)
    assert nearest in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_models_that_are_there_may_be_searched(tmp_path: Path) -> None:
    made = space(
        tmp_path, "space.model.name=[convformer_n4, caformer_s18.sail_in22k, timm/resnet10t, torchvision/resnet18]"
    )
    assert len(made.grid_points("model.name")) == 4
