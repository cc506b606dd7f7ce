"""The default run beside a busy process."""

import json
import os
from pathlib import Path

import pytest

from benchmark import main
from benchmarks.busy import busy_neighbour, train_apart
from files.errors import Failure


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


@pytest.mark.slow
def test_throughput_beside_a_busy_process(tmp_path: Path, tiny: list[str], capsys) -> None:
    output = tmp_path / "busy.json"
    assert main(["busy", "--rounds", "1", "--epochs", "2", "--output", str(output), *tiny]) == 0
    told = json.loads(output.read_text())
    (row,) = told["rows"]
    assert row["ratio"] == pytest.approx(row["beside"] / row["alone"], abs=1e-3) and told["median"] == row
    assert ", 1 thread, " in told["machine"] and told["wanted"] == 0.4
    assert f"{row['ratio']:.2f} of the throughput alone" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"^on the command line: optim\.lrr=1: unknown key"):
        train_apart(tmp_path / "run", ["optim.lrr=1"])
