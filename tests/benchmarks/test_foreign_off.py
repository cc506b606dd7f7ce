"""Foreign models where stochastic depth is off, over untouched ones."""

import json
from pathlib import Path

import pytest
import torch

from benchmark import main
from benchmarks.foreign_off import compare, sides
from stochastic_depth.graft import grafted


def test_all_sides_compute_alike_and_only_the_set_ones_are_grafted() -> None:
    models, images = sides("convnext_atto", 32), torch.randn(2, 3, 32, 32)
    outputs = [model.train()(images) for model in models.values()]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert [bool(list(grafted(model))) for model in models.values()] == [False, False, True, True]
    assert any(module.skips for module in grafted(models["skip"]))


def test_models_are_compared_with_the_first_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, torch.nn.Module] = {"untouched": torch.nn.Linear(2, 2), "slow": torch.nn.Linear(2, 2)}
    seconds = {id(models["untouched"]): 0.25, id(models["slow"]): 0.5}
    monkeypatch.setattr("benchmarks.foreign_off.pass_time", lambda model, images: seconds[id(model)])
    row = compare(models, torch.randn(2, 2), training=False, seconds=0.0)
    assert row == {"milliseconds": 250.0, "rounds": 11, "slow": [2.0, 2.0, 2.0]}


def test_what_is_written(tmp_path: Path, capsys) -> None:
    output = tmp_path / "off.json"
    command = ["foreign-off", "--models", "convnext_atto", "--large", "convnext_atto", "--sizes", "small"]
    assert main([*command, "--seconds", "0", "--threads", "1", "--output", str(output)]) == 0
    told = json.loads(output.read_text())
    assert [row["what"] for row in told["rows"]] == ["training", "evaluation"]
    assert len(told["rows"][0]["skip"]) == 3 and told["set_drop_path"]["convnext_atto"]["first"] > 0
