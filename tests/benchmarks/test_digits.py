"""The default run over seeds."""

import json
from pathlib import Path

import pytest

from benchmark import main


@pytest.mark.slow
def test_digits_over_seeds(tmp_path: Path, tiny: list[str]) -> None:
    output, runs = tmp_path / "digits.json", ["--runs", str(tmp_path / "runs")]
    overrides = [*tiny, "optim.epochs=2"]
    assert main(["digits", "--seeds", "2", *runs, "--output", str(output), *overrides]) == 0
    told = json.loads(output.read_text())
    assert [row["seed"] for row in told["rows"]] == [0, 1] and ", 1 thread, " in told["machine"]
    tops = [row["final_top1"] for row in told["rows"]]
    assert told["mean"]["final_top1"] == pytest.approx(sum(tops) / 2, abs=1e-3)
    assert len({row["weights_sha256"] for row in told["rows"]}) == 2
    assert told["rbf_svm_c1"] > 95
