"""What tests of studies share: a unit that was really trained, once."""

from pathlib import Path

import pytest

from tests.training.parts import TINY
from training.config import TrainConfig, load_config
from training.run import run

SMALL = [
    *TINY,
    "optim={lr: 3e-3, epochs: 1, warmup_epochs: 0}",
    "log={report: false}",
    "runtime={device: cpu, precision: float32, threads: 1}",
]


@pytest.fixture(scope="session")
def unit_config() -> TrainConfig:
    """Of `unit`."""
    return load_config(None, SMALL)


@pytest.fixture(scope="session")
def unit(tmp_path_factory: pytest.TempPathFactory, unit_config: TrainConfig) -> Path:
    """The run folder of a unit: digits, one epoch. Do not change it."""
    folder = tmp_path_factory.mktemp("units") / "seed-1000"
    run(unit_config, folder)
    return folder
