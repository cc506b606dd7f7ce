"""A study from its start to its end, stopped and gone on with, by one process and by several."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from files.errors import ConfigError, Failure
from files.lock import is_locked, locked
from tests.tuning.parts import Trained, opened, stand_in
from training.config import load_config
from training.non_finite import NonFiniteError
from tuning.links import Finalist
from tuning.study import StudyFolder, Trial
from tuning.units import forget_failures
from tuning.worker import Console, end_helpers, finish, share_of_threads, start_helpers, table, work


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    return stand_in(monkeypatch)


def told(tmp_path: Path) -> list[str]:
    return [json.loads(line)["what"] for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]


def test_a_whole_study(tmp_path: Path, trained: Trained, capsys) -> None:
    one = opened(tmp_path)
    assert work(one) is None
    assert len(trained.runs) == len(set(trained.runs)) == 6 + 3 + 2
    assert trained.runs[0] == (0.0, 0), "rate 0 comes first"
    assert [seed for _, seed in trained.runs] == [0] * 6 + [1] * 3 + [2] * 2
    assert all(c.log.validate_every == c.optim.epochs and not c.log.report for c in trained.configs)
    trials = one.folder.read_trials()
    best = min(trials, key=lambda trial: abs(trial.parameters["drop_path.rate"] - 0.2))
    assert best.state == "winner" and len(best.scores) == 3 and best.steps == 30 and best.seconds == 1.5
    assert sorted(trial.state for trial in trials) == ["dropped"] * 5 + ["winner"]
    assert all(trial.reason for trial in trials if trial.state == "dropped")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and re.fullmatch(
        r"trial 0  drop_path.rate 0  seed 0  val_top1 86  [\d.]+ s  10 runs left", lines[0]
    )
    assert lines[-1].endswith("0 runs left")
    text = finish(one)
    assert text.splitlines()[1].startswith(f"{best.number} ") and "best.yaml" in text
    assert load_config(one.folder.best).drop_path.rate == best.parameters["drop_path.rate"]
    assert "trial 0 tries drop_path.rate 0" in told(tmp_path)
    assert f"trial {best.number} wins the race" in told(tmp_path)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tmp_path: Path, trained: Trained) -> None:
    work(opened(tmp_path))
    before, decided = list(trained.runs), told(tmp_path)
    assert work(opened(tmp_path)) is None
    assert trained.runs == before
    assert told(tmp_path) == decided


@pytest.mark.slow
def test_a_study_that_is_stopped_often_tries_the_same(tmp_path: Path, trained: Trained) -> None:
    overrides = ["search.sampler=tpe", "search.trials=8"]
    (tmp_path / "a").mkdir()
    work(opened(tmp_path / "a", *overrides))
    whole = list(trained.runs)
    trained.runs.clear()
    (tmp_path / "b").mkdir()
    seen: list[int] = []

    def stop_first(config) -> str | None:
        seen.append(1)
        return "SIGTERM" if len(seen) % 2 else None

    trained.stops = stop_first
    starts = 0
    while work(opened(tmp_path / "b", *overrides)) == "SIGTERM":
        starts += 1
    assert starts > 5
    assert list(dict.fromkeys(trained.runs)) == whole


@pytest.mark.slow
def test_more_trials_may_be_added(tmp_path: Path, trained: Trained) -> None:
    work(opened(tmp_path))
    work(opened(tmp_path, "search.trials=8"))
    assert len(opened(tmp_path, "search.trials=8").folder.read_trials()) == 8
    assert "the study goes on with another config" in told(tmp_path)


def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path: Path, trained: Trained, capsys) -> None:
    trained.fails = lambda config: "the loss is nan" if config.drop_path.rate == 0 else None
    trained.error = NonFiniteError
    one = opened(tmp_path)
    work(one)
    trials = one.folder.read_trials()
    assert trials[0].state == "failed" and trials[0].reason == "the loss is nan"
    assert [trial.state for trial in trials].count("winner") == 1
    assert "trial 0 failed" in told(tmp_path)
    assert "failed: the loss is nan" in capsys.readouterr().out
    assert forget_failures(one.folder.units) == 0, "it would fail again"


@pytest.mark.slow
def test_a_run_with_a_mistake_of_ours_fails_alone(tmp_path: Path, trained: Trained) -> None:
    trained.fails = lambda config: "shapes differ" if config.drop_path.rate == 0 else None
    trained.error = RuntimeError
    one = opened(tmp_path)
    work(one)
    assert one.folder.read_trials()[0].reason == "RuntimeError: shapes differ"
    log = one.folder.unit(one.folder.read_trials()[0].digest, 0) / "train.log"
    assert "Traceback" in log.read_text()


@pytest.mark.slow
def test_all_trials_failing_ends_the_study_which_can_be_mended(tmp_path: Path, trained: Trained) -> None:
    trained.fails = lambda config: "rare" if config.drop_path.rate == 0 else "no such file: a.png"
    one = opened(tmp_path)
    with pytest.raises(Failure, match=r"all 6 trials failed; 5 of them: no such file: a\.png\nmend"):
        work(one)
    assert len(trained.runs) == 6
    trained.fails = lambda config: None
    assert forget_failures(one.folder.units) == 6
    again = opened(tmp_path)
    assert work(again) is None
    assert "winner" in [trial.state for trial in again.folder.read_trials()]


def test_a_metric_that_no_run_reports(tmp_path: Path, trained: Trained) -> None:
    trained.score = lambda config: float("nan")
    with pytest.raises(Failure, match="all 6 trials failed; 6 of them: val_top1 of the last epoch is nan"):
        work(opened(tmp_path))


@pytest.mark.slow
def test_the_final_is_run_on_fresh_seeds(tmp_path: Path, trained: Trained, capsys) -> None:
    one = opened(tmp_path, "verdict={seeds: 3, split: val}")
    work(one)
    fresh = [(rate, seed) for rate, seed in trained.runs if seed >= 1000]
    assert len(fresh) == len(set(fresh)) == 6 and {seed for _, seed in fresh} == {1000, 1001, 1002}
    assert all(seed < 1000 for _, seed in trained.runs[:11]), "nothing of it before the winner is known"
    assert "it is so" in finish(one)
    verdict = json.loads(one.folder.verdict.read_text())
    assert (verdict["metric"], verdict["split"]) == ("top1", "val")
    assert [config["role"] for config in verdict["configs"]] == ["winner", "zero"]
    assert verdict["configs"][1]["scores"] == [80.0] * 3
    assert "final zero" in capsys.readouterr().out


@pytest.mark.slow
def test_a_winner_at_rate_0_is_run_once_and_compared_with_the_next_best(tmp_path: Path, trained: Trained) -> None:
    trained.score = lambda config: -(config.drop_path.rate or 0.0)
    one = opened(tmp_path, "verdict={seeds: 2, split: val}")
    work(one)
    above = [trial for trial in one.folder.read_trials() if trial.parameters["drop_path.rate"] > 0]
    most = max(len(trial.scores) for trial in above)
    second = round(min(t.parameters["drop_path.rate"] for t in above if len(t.scores) == most), 4)
    fresh = [run for run in trained.runs if run[1] >= 1000]
    assert sorted(fresh) == [(0.0, 1000), (0.0, 1001), (second, 1000), (second, 1001)]
    finish(one)
    roles = [each["role"] for each in json.loads(one.folder.verdict.read_text())["configs"]]
    assert roles == ["winner", "zero", "runner-up"]


def test_runs_of_the_final_that_fail_are_counted(tmp_path: Path, trained: Trained) -> None:
    lost = {(0.0, 1000), (0.0, 1001), (0.2, 1001)}
    trained.fails = lambda config: "it diverged" if (config.drop_path.rate, config.seed) in lost else None
    found: list[Finalist] = []

    def conclude(folder: StudyFolder, finalists: list[Finalist], metric: str, split: str) -> dict[str, Any]:
        found.extend(finalists)
        return {"sentence": "it is so"}

    one = opened(
        tmp_path,
        "verdict={seeds: 2, split: val}",
        "search={sampler: grid, trials: null}",
        "space.drop_path.rate=[0.2, 0.4]",
        "race={seeds: [1], keep: []}",
        conclude=conclude,
    )
    work(one)
    finish(one)
    assert [(f.role, sorted(f.scores), f.failed) for f in found] == [("winner", [1000], 1), ("zero", [], 2)]
    assert "2 of 2 runs of the final failed: zero" in told(tmp_path)


def test_a_unit_that_another_process_holds_is_not_taken(tmp_path: Path, trained: Trained) -> None:
    one = opened(tmp_path)
    after = one.plan.update()
    one.plan.search.ask()
    (unit,) = one.plan.update().now
    unit.folder.mkdir(parents=True)
    with locked(unit.folder):
        after = one.plan.update()
        assert after.running == 1 and not after.now and after.may_ask
    assert one.plan.update().now == [unit], "free as soon as its holder is gone, and the first to be taken"


@pytest.mark.slow
def test_nothing_is_held_in_the_end(tmp_path: Path, trained: Trained) -> None:
    one = opened(tmp_path)
    work(one)
    folders = [one.folder.path, *one.folder.units.glob("*/seed-*")]
    assert len(folders) == 12 and not any(is_locked(folder) for folder in folders)


def test_a_full_disk_ends_it_in_words(tmp_path: Path, trained: Trained, monkeypatch) -> None:
    one = opened(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(one.plan, "update", full)
    with pytest.raises(Failure, match="No space left on device: somewhere\nthe study is intact"):
        work(one)


def test_the_table_shows_the_winner_first() -> None:
    trials = [
        Trial(0, "a", {"drop_path.rate": 0.0}, "zero", {0: 90.0}, "dropped", "why"),
        Trial(1, "b", {"drop_path.rate": 0.12345}, "gp", {0: 90.0, 1: 92.0}, "winner"),
        Trial(2, "", {"drop_path.rate": 0.5}, "gp", {}, "failed", "why"),
    ]
    lines = table(trials, "val_top1").splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["trial", "seeds", "val_top1", "state", "from", "parameters"],
        ["1", "2", "91", "winner", "gp", "drop_path.rate", "0.123"],
    ]
    assert lines[3].split()[:4] == ["2", "0", "-", "failed"]


def test_threads_are_shared_out(tmp_path: Path, monkeypatch) -> None:
    one = opened(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("tuning.worker.number_of_threads", lambda setting: 8)
    assert [share_of_threads(one.study, jobs) for jobs in (1, 2, 3, 20)] == [None, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_of_threads(one.study, 2) is None


def test_helpers_are_waited_for_and_told_to_stop() -> None:
    quick = start_helpers([sys.executable, "-c", "raise SystemExit(3)"], 2, threads=1)
    assert end_helpers(quick, stop=False) == 2
    slow = start_helpers([sys.executable, "-c", "import time; time.sleep(60)"], 1, threads=None)
    assert end_helpers(slow, stop=True) == 1


def test_there_is_no_bar_in_a_log(capsys) -> None:
    console = Console()
    console.write("a line")
    console.wait("for others")
    console.wait("for others")
    console.close()
    assert console.bar is None and capsys.readouterr().out == "a line\nfor others\n"


def test_a_study_in_use_for_long_is_told(tmp_path: Path, monkeypatch) -> None:
    one = opened(tmp_path)
    monkeypatch.setattr("tuning.opening.WAIT", 0.0)
    with one.alone(), pytest.raises(ConfigError, match="process"), one.alone():
        pass


HELPER = """
import os, sys, time
from training.console import StopSignals
from tuning.worker import stop_with
with StopSignals() as signals:
    stop_with(int(sys.argv[1]))
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.05)
    print(signals.received, flush=True)
"""
MAIN = "import os, sys, time; from subprocess import Popen; Popen([*sys.argv[1:], str(os.getpid())]); time.sleep(60)"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")
def test_a_helper_is_told_to_stop_when_the_main_process_is_killed() -> None:
    command = [sys.executable, "-c", MAIN, sys.executable, "-c", HELPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as main:
        assert main.stdout is not None and main.stdout.readline() == "ready\n"
        main.kill()
        assert main.stdout.read() == "SIGTERM\n", "and its end, which closes the pipe"
