"""What saving costs: all sides are measured, and what is timed is really saved."""

import json
from pathlib import Path

import pytest

from benchmark import main
from benchmarks.saving import SIDES


@pytest.mark.slow
def test_steps_with_checkpoints_and_without(tmp_path: Path) -> None:
    output = tmp_path / "saving.json"
    sizes = ["--model", "convformer_n4", "--image-size", "16", "--batch-size", "2", "--every", "2", "--rounds", "3"]
    assert main(["saving", *sizes, "--threads", "1", "--output", str(output), "--runs", str(tmp_path)]) == 0
    told = json.loads(output.read_text())
    assert tuple(told["rows"]) == SIDES and told["rows"]["none"]["over_none"] == 1.0
    assert told["checkpoint_mb"] > 0.5, "weights, average and two moments of 0.1 M parameters"
    for side in SIDES:
        row = told["rows"][side]
        assert row["pause"] >= 0 and row["quartiles"][0] <= row["over_none"] <= row["quartiles"][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saving.json"], "the checkpoints are gone"
