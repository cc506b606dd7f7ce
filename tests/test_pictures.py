"""pictures.py: what is drawn is true, and the same bytes each time."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

import pictures
from layers.rates import drop_path_rates
from models.__main__ import find
from pictures import draw_zoo, families

ROOT = Path(__file__).resolve().parents[1]


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "deep" / "second"
    assert pictures.main([str(first)]) == 0
    torch.rand(3)  # the draws must not depend on the state around them
    assert pictures.main([str(second)]) == 0
    names = [
        "drop_path_rates.svg",
        "drop_path_batch.svg",
        "drop_path_schedules.svg",
        "tuning.svg",
        "depth.svg",
        *(["step.svg"] if pictures.STEP.exists() else []),
        "zoo.svg",
    ]
    assert capsys.readouterr().out.split() == [str(folder / name) for folder in (first, second) for name in names]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        svg = (first / name).read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        assert "<text" not in svg  # text as paths: the same on every machine
        assert not re.search(r"\d\d:\d\d|matplotlib v", svg, flags=re.IGNORECASE)
        assert len(svg) < 300_000


def test_picture_of_rates_has_every_bar() -> None:
    figure = pictures.draw_rates()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.containers}
    assert list(panels) == ["linear", "linear_from_first", "constant", "stagewise", "cosine", "reversed"]
    for profile, axes in panels.items():
        heights = [bar.get_height() for bar in axes.containers[0]]
        assert heights == pytest.approx(drop_path_rates(0.3, [4, 4, 12, 4], profile))  # type: ignore[arg-type]


def test_step_holds_what_the_branches_really_saw() -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    computed = pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert computed.shape == (16, 24)
    for kept, rate in zip(computed.sum(0).tolist(), drop_path_rates(0.4, (4, 4, 12, 4)), strict=True):
        assert abs(kept - 16 * (1 - rate)) < 1  # rounded up or down, never further: mode skip's fixed count
    assert computed[:, 0].all()
    assert len({tuple(row) for row in computed.tolist()}) == 16  # each sample takes its own path
    assert not torch.equal(computed, pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=1))


def test_picture_of_a_batch_draws_the_step() -> None:
    computed = pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=0)
    grid, shares = pictures.draw_batch().axes
    boxes = [c for c in grid.collections if isinstance(c, PolyCollection)]
    lines = [c for c in grid.collections if isinstance(c, LineCollection)]
    assert [len(c.get_paths()) for c in boxes] == computed.sum(1).tolist()
    assert [len(c.get_segments()) for c in lines] == (~computed).sum(1).tolist()
    assert len(grid.images) == 16
    assert [bar.get_height() for bar in shares.containers[1]] == pytest.approx(computed.float().mean(0).tolist())


def test_picture_of_schedules_has_every_kind() -> None:
    panels = [axes.get_title(loc="left").partition(":")[0] for axes in pictures.draw_schedules().axes if axes.images]
    assert panels == ["constant", "early", "late", "ramp", "cosine", "piecewise"]


def test_picture_of_depth_holds_what_was_measured() -> None:
    result = json.loads(pictures.DEPTH.read_text())
    curves, nll, ece = pictures.draw_depth(result).axes
    drawn = [np.asarray(line.get_ydata()).tolist() for line in curves.lines]
    assert len(drawn) == len(result["rows"]) + 2
    for row in (*result["rows"], *result["summary"]):
        assert row["top1"] in drawn
    for key, axes in (("nll", nll), ("ece", ece)):
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == [each[kind][key] for each in result["summary"] for kind in ("plain", "mc")]


def test_picture_of_tuning_holds_what_was_measured() -> None:
    result = json.loads(pictures.TUNING.read_text())
    for axes, found in zip(pictures.draw_tuning(result).axes, result["studies"].values(), strict=True):
        curves = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
        for profile in ("linear", "constant"):
            rows = [row for row in found["grid"]["trials"] if row["profile"] == profile or row["rate"] == 0]
            assert curves[f"grid, {profile}"] == [row["mean"] for row in rows] and len(rows) > 2
        rings = sum(len(np.asarray(collection.get_offsets())) for collection in axes.collections)
        assert rings == sum(bool(row["scores"]) for row in found["tuner"]["trials"])


def test_picture_of_a_step_holds_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(model: str, precision: str, rate: float, *sides: str) -> dict[str, Any]:
        over = {side: {"median": 1.5 + rate + i, "quartiles": [1.4, 1.6]} for i, side in enumerate(sides)}
        return {"model": model, "precision": precision, "rate": rate, "profile": "linear", "batch": 8,
                "over_limit": {**over, "timm": {"median": 9.0, "quartiles": [8.0, 10.0]}}}  # fmt: skip

    sides = ("timm channels_last", "masked", "skipping")
    rows = [
        row("poolformer_s12", precision, rate, *sides) for precision in ("float32", "bfloat16") for rate in (0, 0.4)
    ]
    rows.append(row("timm/convnext_tiny", "float32", 0.4, "timm channels_last", "skipping"))
    result = {"rows": rows, "machine": "a machine"}
    for axes, precision in zip(pictures.draw_speed(result).axes, ("float32", "bfloat16"), strict=True):
        assert axes.get_title(loc="left") == precision
        drawn = sorted(bar.get_width() for bars in axes.containers for bar in bars)
        own = [each["over_limit"] for each in rows if each["precision"] == precision]
        assert drawn == sorted(found[side]["median"] for found in own for side in sides if side in found)
        lines = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
        assert lines[-2:] == [[1.0, 1.0], [1.15, 1.15]], "the limit, and the goal"
    words = [label.get_text() for label in pictures.draw_speed(result).axes[0].get_yticklabels()]
    assert words == ["poolformer_s12  0", "poolformer_s12  0.4 linear", "convnext_tiny  0.4 linear"]
    for name in ("draw_rates", "draw_batch", "draw_schedules", "draw_tuning", "draw_depth"):
        monkeypatch.setattr(pictures, name, lambda *_: Figure())
    monkeypatch.setattr(pictures, "draw_zoo", lambda _: "")
    monkeypatch.setattr(pictures, "STEP", tmp_path / "step.json")
    assert tmp_path / "step.svg" not in pictures.write_pictures(tmp_path), "not measured"
    pictures.STEP.write_text(json.dumps(result))
    assert tmp_path / "step.svg" in pictures.write_pictures(tmp_path)


def test_families() -> None:
    found = families(find([]))
    assert found["caformer"] == [(4.1, 83.6), (8.0, 84.5), (13.2, 85.2), (23.2, 85.5)]
    best = [max(top1 for _, top1 in points) for points in found.values()]
    assert best == sorted(best, reverse=True) and len(best) >= 6


def test_the_picture_in_the_docs_is_up_to_date() -> None:
    # what is drawn, not the bytes: those change with matplotlib
    drawn = draw_zoo(find([])).count("<use ")
    assert (ROOT / "docs/pictures/zoo.svg").read_text().count("<use ") == drawn, "make pictures"


def test_make_pictures_draws_them() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\npictures:")[2].partition("\n\n")[0]
    assert "python pictures.py" in recipe


def test_fewer_models_make_another_picture() -> None:
    svg = draw_zoo(find(["caformer_*", "poolformer_*"]))
    ElementTree.fromstring(svg)
    assert svg.count("<use ") < draw_zoo(find([])).count("<use ")


@pytest.mark.parametrize(("folder", "message"), [("file", "not a folder"), ("file/deeper", "cannot be made")])
def test_a_folder_that_is_none(tmp_path: Path, folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert pictures.main([str(tmp_path / folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {tmp_path / folder}: {message}") and printed.err.count("\n") == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == [tmp_path / "file"]
