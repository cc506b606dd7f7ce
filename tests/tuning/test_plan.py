"""What is next follows from the trials and the units' folders alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from files.durable import save_text
from files.errors import ConfigError
from files.lock import locked
from tests.tuning.parts import Trained, opened, stand_in
from training.config import TrainConfig
from tuning.opening import Opened
from tuning.plan import in_words
from tuning.race import Decision
from tuning.units import note_failure
from tuning.verdict import label_of
from tuning.worker import work


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    return stand_in(monkeypatch)


def test_a_study_begins_with_a_question(tmp_path: Path) -> None:
    one = opened(tmp_path)
    first = one.plan.update()
    assert first.may_ask and not first.now and first.winner is None and first.left == 11
    one.plan.search.ask()
    second = one.plan.update()
    assert [unit.seed for unit in second.now] == [0] and not second.may_ask and second.left == 11
    assert second.trials[0].state == "waiting"


def test_an_interrupted_unit_goes_first(tmp_path: Path) -> None:
    one = opened(tmp_path)
    for _ in range(3):
        one.plan.search.ask()
    units = one.plan.update().now
    units[2].folder.mkdir(parents=True)
    assert one.plan.update().now == [units[2], units[0], units[1]]


def test_two_equal_trials_are_one(tmp_path: Path, trained: Trained) -> None:
    one = opened(tmp_path, "space.drop_path.rate=[0.0, 0.1]", "search.trials=5")
    work(one)
    assert len(trained.runs) == len(set(trained.runs))
    trials = one.folder.read_trials()
    assert len(trials) == 5
    same = [trial for trial in trials if trial.reason.startswith("the same configuration as trial")]
    assert len(same) == 3 and all(trial.scores for trial in same)
    assert [trial.told for trial in one.plan.search.proposals()] == [True] * 5


def test_what_is_proposed_again_is_measured_again(tmp_path: Path, trained: Trained) -> None:
    """On the next seed while the race has some, so that Optuna learns of the noise."""
    trained.score = lambda config: 90.0 + config.seed
    one = opened(tmp_path, "space.drop_path.rate=[0.0]", "search.trials=5")
    work(one)
    assert trained.runs == [(0.0, 0), (0.0, 1), (0.0, 2)]
    assert [trial.value for trial in one.plan.search.study.get_trials()] == [90.0, 91.0, 92.0, 90.0, 90.0]
    assert [trial.state for trial in one.folder.read_trials()] == ["winner"] + ["dropped"] * 4


@pytest.mark.slow
def test_a_failure_late_in_the_race_makes_room(tmp_path: Path, trained: Trained) -> None:
    one = opened(tmp_path)
    work(one)
    won = next(trial for trial in one.folder.read_trials() if trial.state == "winner")
    note_failure(one.folder.unit(won.digest, 2), "the disk broke", final=False)
    after = one.plan.update()
    assert after.winner is None and after.now, "the next best has seeds to run"
    work(one)
    trials = one.folder.read_trials()
    assert trials[won.number].state == "failed"
    assert [trial.state for trial in trials].count("winner") == 1


def test_who_has_nothing_else_to_do_runs_for_the_final(tmp_path: Path) -> None:
    one = opened(tmp_path, "search.trials=1", "verdict={seeds: 2, split: val}")
    one.plan.search.ask()
    (unit,) = one.plan.update().now
    unit.folder.mkdir(parents=True)
    with locked(unit.folder):
        after = one.plan.update()
    assert not after.now and not after.may_ask and after.running == 1
    assert [unit.seed for unit in after.spare] == [1000, 1001]


RATES_AND_LR = [
    "space.drop_path.rate=[0.0, 0.2]",
    "space.drop_path.profile=[linear, constant]",
    "space.optim.lr=[1e-3, 1e-2]",
    "search={sampler: grid, trials: null}",
    "race={seeds: [1], keep: []}",
    "verdict={seeds: 2, split: val}",
]


def in_the_final(one: Opened) -> list[tuple[str, float | None, object, float]]:
    """Role, rate, profile and learning rate of those of whom runs are wanted."""
    configs = [(f.role, f.config) for f in one.plan.update().finalists]
    return [(role, c.drop_path.rate, c.drop_path.profile, c.optim.lr) for role, c in configs]


def test_the_winner_s_other_values_are_those_of_what_it_is_compared_with(tmp_path: Path, trained: Trained) -> None:
    """Else a lead over rate 0 may be that of the learning rate."""
    advice: Any = SimpleNamespace(rate=0.1, profile="linear", published=0.3, published_profile="linear")
    trained.score = lambda config: 90 + 100 * config.optim.lr + (config.drop_path.profile == "constant")
    one = opened(tmp_path, *RATES_AND_LR, advise=lambda config: advice)
    assert not one.plan.update().finalists, "what the winner has beside its rate is not known"
    assert one.plan.update().left == 8 + 3 * 2
    work(one)
    assert in_the_final(one) == [
        ("winner", 0.2, "constant", 0.01),
        ("zero", 0.0, "linear", 0.01),
        ("published", 0.3, "linear", 0.01),
    ]
    labels = [label_of(f.config, f.values) for f in one.plan.update().finalists]
    assert labels == ["rate 0.2 (constant), lr 0.01", "rate 0, lr 0.01", "rate 0.3 (linear), lr 0.01"]
    assert {(c.drop_path.rate, c.optim.lr) for c in trained.configs if c.seed >= 1000} == {
        (0.2, 0.01), (0.0, 0.01), (0.3, 0.01)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "role", "rate"),
    [
        ({"convformer_n4": 0.1, "caformer_n4": 0.3}, "published", 0.3),
        pytest.param({"caformer_n4": 0.3}, "published", 0.3, marks=pytest.mark.slow),
        ({"convformer_n4": 0.1}, "", None),
    ],
)
def test_the_published_rate_in_the_final_is_that_of_the_winner_s_model(
    rates: dict[str, float], role: str, rate: float | None, tmp_path: Path, trained: Trained
) -> None:
    def advise(config: TrainConfig) -> Any:
        return SimpleNamespace(
            rate=0.2, profile="linear", published=rates.get(config.model.name), published_profile="linear"
        )

    words = [*RATES_AND_LR, "space.model.name=[convformer_n4, caformer_n4]"]
    trained.score = lambda config: 90 + (config.model.name == "caformer_n4") + (config.drop_path.rate or 0.0)
    one = opened(tmp_path, *words, advise=advise)
    assert one.plan.update().left == 16 + 3 * 2, "one may be published, whichever wins"
    work(one)
    found = {f.role: f.config for f in one.plan.update().finalists}
    assert {config.model.name for config in found.values()} == {"caformer_n4"}
    assert list(found) == ["winner", "zero", *([role] if role else [])]
    assert (found[role].drop_path.rate if role else None) == rate
    told = [d["why"] for d in one.folder.read_decisions() if d["what"] == "not in the final: published"]
    assert told == ([] if role else ["no rate is published for caformer_n4 and its purpose"])


def test_a_winner_of_which_no_advice_can_be_had_has_no_published_rate_beside_it(
    tmp_path: Path, trained: Trained
) -> None:
    def advise(config: TrainConfig) -> Any:
        if config.optim.lr == 0.01:
            raise ConfigError("no such data")
        return SimpleNamespace(rate=0.1, profile="linear", published=0.3, published_profile="linear")

    trained.score = lambda config: 90 + 100 * config.optim.lr + (config.drop_path.rate or 0.0)
    one = opened(tmp_path, *RATES_AND_LR, advise=advise)
    work(one)
    assert [role for role, *_ in in_the_final(one)] == ["winner", "zero"]
    (why,) = [d["why"] for d in one.folder.read_decisions() if d["what"] == "not in the final: published"]
    assert why == "no such data"


def test_a_winner_at_rate_0_is_rate_0_whatever_else_was_varied(tmp_path: Path, trained: Trained) -> None:
    trained.score = lambda config: 90 + 100 * config.optim.lr - (config.drop_path.rate or 0.0)
    one = opened(tmp_path, *RATES_AND_LR)
    work(one)
    found = in_the_final(one)
    assert [role for role, *_ in found] == ["winner", "zero", "runner-up"] and found[0][1:] == found[1][1:]


def test_rate_0_is_known_early_where_drop_path_alone_is_varied(tmp_path: Path, trained: Trained) -> None:
    words = ["space.drop_path.profile=[linear, [0.1, 0.3]]", "space.drop_path.rate=[0.2, null]", *RATES_AND_LR[3:]]
    trained.score = lambda config: 90 + isinstance(config.drop_path.profile, list)
    one = opened(tmp_path, *words)
    assert [f.role for f in one.plan.update().finalists] == ["zero"]
    work(one)
    assert in_the_final(one)[1] == ("zero", 0.0, "linear", 0.003), "a list of rates is not the profile of none"


def test_what_does_not_go_with_the_winner_is_left_out_of_the_final(tmp_path: Path, trained: Trained) -> None:
    early = "drop_path.schedule={kind: early, cutoff_epochs: 2}"
    words = ["space={drop_path: [{rate: 0.2}, {rate: 0.3}], optim.epochs: [1, 2]}", early, *RATES_AND_LR[3:]]
    trained.score = lambda config: 90 - config.optim.epochs
    one = opened(tmp_path, *words)
    work(one)
    assert [role for role, *_ in in_the_final(one)] == ["winner", "runner-up"]
    (why,) = [d["why"] for d in one.folder.read_decisions() if d["what"] == "not in the final: zero"]
    assert "with the winner's other values" in why and "beyond optim.epochs (1)" in why


def test_optuna_is_told_the_mean_of_the_first_round(tmp_path: Path, trained: Trained) -> None:
    trained.score = lambda config: 90.0 + config.seed
    one = opened(tmp_path, "race={seeds: [2, 3], keep: [1]}", "search.trials=2")
    work(one)
    assert {trial.value for trial in one.plan.search.study.get_trials()} == {90.5}


def test_what_a_dead_process_did_not_tell_is_told(tmp_path: Path, trained: Trained) -> None:
    trained.stops = lambda config: "SIGTERM" if len(trained.runs) == 2 else None
    work(opened(tmp_path))
    one = opened(tmp_path)
    assert [proposal.told for proposal in one.plan.search.proposals()] == [True, False]
    trained.stops = lambda config: None
    work(one)
    assert all(proposal.told for proposal in one.plan.search.proposals())


def test_decisions_are_noted_once_also_behind_a_line_cut_short(tmp_path: Path) -> None:
    one = opened(tmp_path)
    count = len(one.folder.read_decisions())
    one.plan.note([Decision("a", "b")])
    one.plan.note([Decision("a", "b"), Decision("a", "c")])
    with one.folder.decisions.open("a") as file:
        file.write('{"what": "cut')
    one.plan.note([Decision("d", "e")])
    told = [(decision["what"], decision["why"]) for decision in one.folder.read_decisions()[count:]]
    assert told == [("a", "b"), ("a", "c"), ("d", "e")]
    assert all("T" in decision["time"] for decision in one.folder.read_decisions())


def test_values_in_words() -> None:
    assert (
        in_words({"a": 0.123456, "b": [1, 2], "c": "x", "d": {"kind": "early"}})
        == 'a 0.123, b [1, 2], c x, d {"kind": "early"}'
    )


def test_a_damaged_summary_is_trained_again(tmp_path: Path, trained: Trained) -> None:
    one = opened(tmp_path, "search.trials=1", "race={seeds: [1]}")
    work(one)
    unit = one.folder.unit(one.folder.read_trials()[0].digest, 0)
    save_text(unit / "summary.json", "{")
    work(one)
    assert len(trained.runs) == 2
