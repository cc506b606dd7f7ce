"""The GPU's benchmark: a trial of it on the CPU, its order, its budget, its goals."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmark import main, parse_args
from benchmarks import gpu
from benchmarks.gpu import (
    BRANCH_RATES,
    MODELS,
    BudgetOver,
    Row,
    build,
    crossing,
    empty_batches,
    judge,
    measure_row,
    plan,
    time_limit,
)
from benchmarks.roofline import Peak
from benchmarks.sides import check_rates, our_rates, their_rates
from files.errors import Failure
from layers.drop_path import BREAK_EVEN
from stochastic_depth.setting import set_drop_path
from tests.training.parts import CUDA

TRIAL = ["--device", "cpu", "--batch", "2", "--image-size", "32", "--rounds", "2", "--steps", "1", "--threads", "1"]
TRIAL += ["--no-kernels"]
PEAK = Peak(1.0, 0.1, "measured")


@pytest.fixture(autouse=True)
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BRANCH_RATES", (0.4, 0.8))


def trial(output: Path, *more: str) -> dict[str, Any]:
    assert main(["gpu", *TRIAL, *more, "--out", str(output)]) == 0
    return json.loads(output.read_text())


def test_kernels_that_fail_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(gpu, "measure_kernels", fail)
    monkeypatch.setattr(gpu, "peaks", lambda _: (Peak(1.0, 1.0, "data sheet"), {}))
    monkeypatch.setattr(gpu, "plan", lambda *_: ["pooling"])
    monkeypatch.setattr(gpu, "measure_branch", lambda *_: {"kind": "pooling"})
    monkeypatch.setattr(gpu, "in_words", lambda *_: "pooling")
    told = trial(tmp_path / "new.json", "--kernels")
    assert told["errors"] == [{"what": "kernels", "error": "RuntimeError: no kernel today"}]
    assert told["break_even"] == [{"kind": "pooling"}] and "kernels" not in told
    assert "no kernel today" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = "timm/test_vit"
    tasks = [Row(model, 0.4, "constant", "eager"), "pooling", Row(model, 0.0, "linear", "eager")]
    monkeypatch.setattr(gpu, "plan", lambda *_: tasks)
    written: list[int] = []
    monkeypatch.setattr(gpu, "in_words", lambda task, done: written.append(len(told_so_far())) or str(task))

    def told_so_far() -> list[Any]:
        return json.loads((tmp_path / "new.json").read_text())["rows"]

    told = trial(tmp_path / "new.json", "--kernels")
    assert {row["plain_over_kernels"] > 0 for row in told["kernels"]} == {True}
    assert set(told["empty_batches"].values()) == {"ok"} and told["peak"]["used"] == "measured"
    assert written == [0, 1, 1], "the file holds what is done before the next begins"
    for row in told["rows"]:
        assert list(row["sides"]) == ["timm", "masked", "skipping"] and row["batch"] == 2
        assert row["sides"]["timm"]["timm_over_it"] == 1.0 and row["limit_ms"] > 0
    kept, full = (row["work"] for row in told["rows"])
    assert kept["skipping"]["flops"] < full["skipping"]["flops"] == pytest.approx(full["timm"]["flops"], rel=0.01)
    assert kept["timm"]["flops"] == full["timm"]["flops"], "timm computes what it drops"
    assert (
        told["left"] == []
        and len(told["goals"]) == 1
        and set(told["break_even"][0]["mask_over_skip"]) == {"0.4", "0.8"}
    )
    assert "goal 1.5" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_trial_of_compiled_sides(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "plan", lambda *_: [Row("vit_tiny_patch16_224", 0.4, "linear", "compiled")])
    (row,) = trial(tmp_path / "a.json", "--compile", how)["rows"]
    assert row["sides"]["timm compiled"]["compiled"] == "whole" and row["sides"]["skipping compiled"]["compiled"] == how
    assert row["sides"]["skipping compiled"]["graphs"] == 1, "its blocks share one"
    assert row["sides"]["skipping compiled"]["graph_breaks"] == row["recompiled_while_timed"] == 0


def test_rows_of_the_goals_come_first() -> None:
    tasks = plan(MODELS, ["eager", "compiled"], list(BREAK_EVEN))
    assert len(tasks) == len(set(tasks)) == 2 * 4 * len(MODELS) + len(BREAK_EVEN)
    first = [task for task in tasks[: 2 * len(MODELS) + len(BREAK_EVEN)] if isinstance(task, Row)]
    assert {(task.rate, task.profile) for task in first} == {(0.4, "linear")} and len(first) == 2 * len(MODELS)
    assert [task.form for task in first] == ["eager"] * len(MODELS) + ["compiled"] * len(MODELS)


def test_it_ends_within_its_budget_and_names_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"kind": "mlp", "break_even": 0.1, "mask_over_skip": {}}
    monkeypatch.setattr(gpu, "measure_branch", lambda kind, *_: done if kind == "mlp" else time.sleep(30))
    monkeypatch.setattr(gpu, "peaks", lambda device: (PEAK, {}))
    monkeypatch.setattr(gpu, "empty_batches", lambda device: {})
    start = time.monotonic()
    told = trial(
        tmp_path / "a.json", "--budget", "2.2", "--models", "a", "--branches", "mlp", "pooling", "--forms", "eager"
    )
    assert time.monotonic() - start < 20 and told["break_even"] == [done]
    assert told["left"] == ["a 0.4 linear eager", "pooling", "a 0.4 constant eager", "a 0.1 linear eager", "a 0 eager"]


def test_time_is_over_again_where_something_swallows_it() -> None:
    swallowed = []
    with pytest.raises(BudgetOver), time_limit(0.05, again=0.05):
        try:
            time.sleep(30)
        except BudgetOver as error:
            swallowed.append(error)
        time.sleep(30)
    assert len(swallowed) == 1
    time.sleep(0.1)  # nothing rings behind it


def test_a_row_that_fails_costs_that_row_alone(tmp_path: Path) -> None:
    told = trial(tmp_path / "a.json", "--models", "timm/no_such", "--branches", "pooling", "--forms", "eager")
    assert (
        len(told["errors"]) == 4 and "no_such" in told["errors"][0]["error"] and told["break_even"] and not told["left"]
    )


def test_a_row_that_does_not_fit_into_memory_has_half_the_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step, batches = gpu.Side.step, []

    def small(self: gpu.Side) -> None:
        batches.append(len(self.images))
        if len(self.images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(gpu.Side, "step", small)
    args = parse_args(["gpu", *TRIAL, "--batch", "4", "--output", str(tmp_path / "a.json")])
    row = measure_row(Row("timm/test_vit", 0.4, "linear", "eager"), args, torch.device("cpu"), PEAK)
    assert row["batch"] == 1 and row["note"] == "batch 4 does not fit into memory" and batches[:3] == [4, 2, 1]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "poolformer_s12", "timm/convnext_atto"])
@pytest.mark.parametrize(("rate", "profile"), [(0.4, "linear"), (0.4, "constant"), (0.0, "linear")])
def test_sides_are_the_same_network_at_the_same_rates(name: str, rate: float, profile: Any) -> None:
    with torch.device("cpu"):
        theirs, ours = (build(Row(name, rate, profile, "eager"), side, 32) for side in ("timm", "skipping"))
    check_rates(name, our_rates(ours), their_rates(theirs))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    set_drop_path(ours, 0.3, input_size=(3, 32, 32))
    with pytest.raises(Failure, match="rates"):
        check_rates(name, our_rates(ours), their_rates(theirs))


@pytest.mark.parametrize(
    ("speedups", "rate"),
    [
        ({0.1: 0.8, 0.2: 1.2, 0.4: 1.5}, 0.15),
        ({0.1: 1.1, 0.2: 0.9, 0.4: 1.1}, 0.3),
        ({0.1: 1.01, 0.2: 1.2}, 0.1),
        ({0.1: 0.8, 0.2: 0.9}, None),
        ({0.1: 1.1, 0.2: 0.9}, None),
    ],
)
def test_the_rate_from_which_skipping_pays(speedups: dict[float, float], rate: float | None) -> None:
    assert crossing(speedups) == (None if rate is None else pytest.approx(rate))
    assert list(BRANCH_RATES) == sorted(BRANCH_RATES)


def test_goals_are_met_from_their_value_on() -> None:
    row = {"model": "a", "rate": 0.4, "profile": "linear", "form": "eager"}
    sides = {"skipping": {"timm_over_it": 1.5}}
    assert judge([{**row, "sides": sides}])[0]["met"] is True
    sides = {"skipping compiled": {"timm compiled_over_it": 1.2, "graph_breaks": 1}}
    ratio, breaks = judge([{**row, "form": "compiled", "sides": sides, "recompiled_while_timed": 0}])
    assert (ratio["met"], ratio["goal"], breaks["met"]) == (False, 1.25, False)
    assert judge([{**row, "rate": 0.1, "sides": {}}]) == [], "goals are about 0.4"


def test_an_operation_that_takes_no_empty_batch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "group_norm", lambda *_: (_ for _ in ()).throw(RuntimeError("no rows")))
    found = empty_batches(torch.device("cpu"))
    assert found["group norm"] == "RuntimeError: no rows" and found["linear"] == "ok"


@CUDA
def test_a_trial_on_cuda(tmp_path: Path) -> None:
    more = ["--models", "vit_tiny_patch16_224", "--batch", "8", "--image-size", "32", "--rounds", "2", "--steps", "1"]
    output = tmp_path / "a.json"
    assert main(["gpu", *more, "--out", str(output)]) == 0
    told = json.loads(output.read_text())
    assert set(told["empty_batches"].values()) == {"ok"} and not told["left"] and "errors" not in told
    assert all(side["peak_mb"] > 0 for row in told["rows"] for side in row["sides"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_a_mistake(tmp_path: Path, capsys) -> None:
    assert main(["gpu", "--output", str(tmp_path / "a.json")]) == 2
    assert "--device cuda: no GPU is there" in capsys.readouterr().err
