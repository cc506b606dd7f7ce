"""What tests of reports share: a run folder as training leaves it, and a page taken apart."""

import csv
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training.rates import RATE_COLUMNS
from training.report.page import write_report
from training.run_folder import COLUMNS

CONFIG = """seed: 0
model: {name: poolformer_s12, num_classes: 10}
drop_path: {rate: 0.3, profile: linear, rate_is: max, mode: skip, break_even: {mlp: 0.05},
  schedule: {kind: ramp, start: 0.0}}
data: {dataset: digits}
optim: {epochs: 4}
"""
TOP1 = (20.0, 91.5, 98.75, 97.25)


class Page(HTMLParser):
    """Visible text, tags and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self._hidden = 0
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else f" {data}"


def _write_csv(path: Path, header: tuple[str, ...], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNkAAAAAgABc3UBGAAAAABJRU5ErkJggg=="
)


def _evidence(classes: list[str], *, per_class: int = 36, epoch: int = 4) -> dict[str, Any]:
    """evaluation.json: of each class one sample in `per_class` is taken for the next class."""
    count = len(classes)
    wrong = [[i, (i + 1) % count, 1] for i in range(count)] if count > 1 else []
    pairs = [[i, i, per_class - bool(wrong)] for i in range(count)] + wrong
    samples, hits = per_class * count, sum(n for i, j, n in pairs if i == j)
    shown = [
        {"image": PIXEL, "name": f"{j}.png", "label": classes[i], "prediction": classes[j], "probability": 0.875}
        for i, j, _ in wrong[:24]
    ]
    batch = [{"image": PIXEL, "labels": [[classes[0], 0.62], [classes[-1], 0.38]]}] * 16
    bins = [[0.0, 0.0, 0.0]] * 13 + [[samples // 4, samples // 4 - len(wrong), 0.9 * (samples // 4)]]
    bins.append([samples - samples // 4, hits - samples // 4 + len(wrong), 0.97 * (samples - samples // 4)])
    told = {"epoch": epoch, "samples": samples, "classes": classes, "pairs": sorted(pairs), "bins": bins}
    return {**told, "mistakes": shown, "batch": batch, "notes": []}


def _make_run(
    path: Path,
    *,
    top1: tuple[float, ...] = TOP1,
    mode: str = "skip",
    config: str = CONFIG,
    classes: list[str] | None = None,
) -> Path:
    """A run folder as training leaves it: four epochs, three blocks; `classes`: their names, instead of ten digits."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    environment = {
        "command": "python train.py 'model.name=a b'",
        "started": "2025-11-23T22:00:00+00:00",
        "commit": None,
        "device": "cpu",
        "cpu_count": 8,
        "torch": "2.14.1",
        "cuda": None,
    }
    (path / "environment.json").write_text(json.dumps(environment))
    rows = [
        [i, 11 * i, 2 / i, 1.5 / i, v, 100.0, v - 1, v - 2, 3.5, 1e-3, 0.1 * i, 500.0, 2.5 * i]
        for i, v in enumerate(top1, start=1)
    ]
    _write_csv(path / "metrics.csv", COLUMNS, rows)
    blocks = [[i, f"stages.0.blocks.{i}", 0.15 * i, mode, 0.12 * i, 0.3, 0.025 * i] for i in range(3)]
    header = ("block", "name", "nominal_rate", "mode", "realised_rate", "compute_share", "saved_share")
    _write_csv(path / "drop_path.csv", header, blocks)
    rates = [[i, 0.04 * i, 1000 * i, 20 * i * (i + 1), 980 * i] for i in range(1, len(top1) + 1)]
    _write_csv(path / "rates.csv", RATE_COLUMNS, rates)
    names = classes or [str(i) for i in range(10)]
    per_class = {"samples": 36 * len(names), "samples_per_class": [36] * len(names)}
    (path / "data.json").write_text(json.dumps({"class_names": names, "val": per_class}))
    (path / "evaluation.json").write_text(json.dumps(_evidence(names, epoch=len(top1))))
    summary = {
        "best_top1": max(top1),
        "final_top1": top1[-1],
        "epochs": len(top1),
        "steps": 11 * len(top1),
        "seconds": 10.25,
        "train_seconds": 8.2,
        "data_share": 0.25,
        "images_per_second": 1234.4,
        "peak_memory_mb": 812.4,
        "weights_sha256": "ab12",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="session")
def config_text() -> str:
    """config.yaml of `make_run`."""
    return CONFIG


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Takes a page's text apart."""
    return Page


@pytest.fixture(scope="session")
def write_csv() -> Callable[..., None]:
    """Writes a CSV file from its header and rows."""
    return _write_csv


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Makes a run folder, complete unless told otherwise."""
    return _make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run folder."""
    return _make_run(tmp_path / "digits-1")


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an untouched run, drawn once."""
    run = _make_run(tmp_path_factory.mktemp("runs") / "digits-1")
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page_of() -> Callable[[Path], Page]:
    """Writes a run's report and takes it apart."""
    return lambda run: Page(write_report(run).read_text(encoding="utf-8"))
