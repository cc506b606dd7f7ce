"""benchmark.py as a user runs it: what it measures and writes, and what mistakes cost."""

import json
import os
from pathlib import Path

import pytest

from benchmark import main
from benchmarks.busy import busy_neighbour, train_apart

TINY = [
    "model.name=caformer_n4",
    "model.image_size=8",
    "model.depths=[1,1]",
    "model.dims=[16,32]",
    "data.batch_size=256",
]


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def seconds(pid: str) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_the_neighbour_computes_until_it_is_told_to_stop() -> None:
    before = children()
    with busy_neighbour():
        (pid,) = children() - before
        start = seconds(pid)
        while seconds(pid) == start:  # does not end where it does not compute
            pass
        assert len(os.listdir(f"/proc/{pid}/task")) >= 2, "two threads"
    assert children() == before


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: on the command line: optim\.lrr=1: unknown key"):
        train_apart(tmp_path / "run", ["optim.lrr=1"])


def test_an_output_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(SystemExit) as caught:
            main(["busy", "--output", str(output)])
        assert caught.value.code == 2 and f"--output {output}: " in capsys.readouterr().err


@pytest.mark.slow
def test_digits_over_seeds(tmp_path: Path) -> None:
    output, runs = tmp_path / "digits.json", ["--runs", str(tmp_path / "runs")]
    overrides = [*TINY, "optim.epochs=2"]
    assert main(["digits", "--seeds", "2", *runs, "--output", str(output), *overrides]) == 0
    told = json.loads(output.read_text())
    assert [row["seed"] for row in told["rows"]] == [0, 1] and ", 1 thread, " in told["machine"]
    tops = [row["final_top1"] for row in told["rows"]]
    assert told["mean"]["final_top1"] == pytest.approx(sum(tops) / 2, abs=1e-3)
    assert len({row["weights_sha256"] for row in told["rows"]}) == 2
    assert told["rbf_svm_c1"] > 95


@pytest.mark.slow
def test_throughput_beside_a_busy_process(tmp_path: Path, capsys) -> None:
    output = tmp_path / "busy.json"
    assert main(["busy", "--rounds", "1", "--epochs", "2", "--output", str(output), *TINY]) == 0
    told = json.loads(output.read_text())
    (row,) = told["rows"]
    assert row["ratio"] == pytest.approx(row["beside"] / row["alone"], abs=1e-3) and told["median"] == row
    assert ", 1 thread, " in told["machine"] and told["wanted"] == 0.4
    assert f"{row['ratio']:.2f} of the throughput alone" in capsys.readouterr().out
