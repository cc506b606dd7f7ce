"""What tests of a study's page share: the folder of a study as a search leaves it, without the runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.report.conftest import Page
from tuning.report.page import write_study_report
from tuning.study import StudyFolder, Trial
from tuning.verdict import Contender, Role, conclude

STUDY = """train: train.yaml
space:
  drop_path.rate: {low: 0.0, high: 0.5}
  drop_path.profile: [linear, constant]
  optim.lr: {low: 1e-4, high: 1e-2, log: true}
race: {seeds: [1, 2, 4]}
objective: {metric: val_top1, mode: auto}
"""
TRAIN = """model: {name: convformer_n4, in_chans: 1, image_size: 28}
data: {dataset: mnist5k, train_samples: 500}
optim: {epochs: 30}
"""
PROFILES = ("linear", "constant")


def score(rate: float, seed: int, profile: str = "linear", lr: float = 1e-3) -> float:
    """Best at 0.12, with the noise of a seed."""
    noise = np.random.default_rng([seed, round(1e6 * rate), len(profile)]).normal()
    return 91 - 60 * (rate - 0.12) ** 2 - (profile == "constant") * 8 * rate - abs(np.log10(lr) + 3) + 0.4 * noise


def label(trial: Trial) -> str:
    rate, profile = trial.parameters["drop_path.rate"], trial.parameters.get("drop_path.profile", "linear")
    return f"rate {rate:.3g} ({profile})" if rate else "rate 0"


def raced(trials: list[Trial], rounds: Sequence[int], *, values: Callable[[Trial, int], float]) -> list[Trial]:
    """The trials after a race: half go on each time."""
    done = {t.number: {} for t in trials}
    dropped: dict[int, str] = {}
    alive = [t.number for t in trials]
    for k, count in enumerate(rounds):
        for number in alive:
            done[number] = {seed: round(values(trials[number], seed), 2) for seed in range(count)}
        ranked = sorted(alive, key=lambda n: -sum(done[n].values()) / count)
        keep = 1 if k == len(rounds) - 1 else (len(alive) + 1) // 2
        for number in ranked[keep:]:
            dropped[number] = (
                f"mean {sum(done[number].values()) / count:.4g} over {count} seeds, below those that go on"
            )
        alive = ranked[:keep]
    return [
        Trial(
            t.number, t.digest, t.parameters, t.origin, done[t.number], "winner" if t.number in alive else "dropped",
            dropped.get(t.number, ""), 480 * len(done[t.number]), 12.5 * len(done[t.number]),
        )
        for t in trials
    ]  # fmt: skip


def proposed(count: int, keys: Sequence[str]) -> list[Trial]:
    """Trials as they are proposed: rate 0 and what is published first."""
    rng = np.random.default_rng(0)
    trials = []
    for i in range(count):
        rate = (0.0, 0.1, 0.05)[i] if i < 3 else round(float(rng.uniform(0, 0.5)), 4)
        origin = ("zero", "published", "advice")[i] if i < 3 else "gp"
        every = {
            "drop_path.rate": rate,
            "drop_path.profile": PROFILES[i % 2 if i > 2 else 0],
            "optim.lr": 1e-3 if i < 3 else round(float(10 ** rng.uniform(-4, -2)), 6),
        }
        trials.append(Trial(i, f"{i:012x}", {key: every[key] for key in keys}, origin))
    return trials


def _make_study(
    path: Path,
    *,
    trials: int = 12,
    rounds: Sequence[int] = (1, 2, 4),
    keys: Sequence[str] = ("drop_path.rate", "drop_path.profile"),
    final: int = 8,
) -> StudyFolder:
    """The folder of a study that came to its end."""
    path.mkdir(parents=True, exist_ok=True)
    folder = StudyFolder(path)
    folder.config.write_text(STUDY.replace("[1, 2, 4]", str(list(rounds))))
    folder.train.write_text(TRAIN)

    def value(trial: Trial, seed: int) -> float:
        p = trial.parameters
        return score(p["drop_path.rate"], seed, p.get("drop_path.profile", "linear"), p.get("optim.lr", 1e-3))

    known = raced(proposed(trials, keys), rounds, values=value)
    folder.write_trials(known)
    lines = [
        {"time": "2026-11-25T20:00:00+00:00", "what": f"trial {t.number} is dropped", "why": t.reason} for t in known
    ]
    folder.decisions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final:
        winner = next(t for t in known if t.state == "winner")
        seeds = list(range(1000, 1000 + final))
        configs: list[tuple[Role, Trial]] = [("winner", winner)]
        for trial in known:
            if trial.origin == "zero" or trial.origin == "published":
                configs.append((trial.origin, trial))
        conclude(
            folder,
            [
                Contender(
                    role, t.parameters, t.digest, label(t), seeds,
                    [value(t, seed) - 1 for seed in seeds],
                )
                for role, t in configs
            ],
        )  # fmt: skip
        for _, trial in configs:
            for seed in seeds:
                unit = folder.unit(trial.digest, seed)
                unit.mkdir(parents=True, exist_ok=True)
                (unit / "summary.json").write_text(json.dumps({"steps": 480, "seconds": 12.5}))
        folder.best.write_text("# the best\nseed: 0\n")
    return folder


@pytest.fixture(scope="session")
def make_study() -> Callable[..., StudyFolder]:
    """Makes the folder of a study, complete unless told otherwise."""
    return _make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A complete study. Do not change it."""
    return _make_study(tmp_path_factory.mktemp("studies") / "rates")


@pytest.fixture(scope="session")
def html(study: StudyFolder) -> str:
    """The page of a complete study, drawn once."""
    return write_study_report(study.path).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def study_page() -> Callable[[StudyFolder], Any]:
    """Writes a study's page and takes it apart."""
    return lambda folder: Page(write_study_report(folder.path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Takes a page's text apart."""
    return Page
