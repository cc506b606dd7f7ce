"""An error in mid-run becomes words where a person can do something about it, and stays what it is where it is ours."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from files.durable import CheckpointError
from files.errors import ConfigError, Failure
from tests.training.parts import WORLD
from training.data.dataset import ReadError
from training.failures import explain


def told(error: Exception, folder: Path | None = None) -> str:
    failure = explain(error, WORLD, folder)
    assert failure is not None
    assert 1 <= len(str(failure).splitlines()) <= 3
    return str(failure)


@pytest.mark.parametrize(
    "error",
    [ConfigError("a"), Failure("a"), ReadError("a"), ValueError("ours"), RuntimeError("ours"), KeyError("ours")],
)
def test_what_says_all_or_is_ours_stays(error: Exception, tmp_path: Path) -> None:
    assert explain(error, WORLD, tmp_path) is None and explain(error, WORLD, None) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EDQUOT])
def test_a_machine_that_fails(number: int) -> None:
    assert "a.csv" in told(OSError(number, "words of the system", "/elsewhere/a.csv"))
    assert told(OSError(number, "words of the system")) == "words of the system"


def test_only_where_there_is_a_checkpoint_it_is_said_to_go_on_from_it(tmp_path: Path) -> None:
    """A dry run has none, nor has a run in its first epoch."""
    full = OSError(errno.ENOSPC, "words of the system")
    for error in (full, MemoryError("wanted")):
        assert "--resume" not in told(error) and "--resume" not in told(error, tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert told(full, tmp_path) == "words of the system\ngo on from the last checkpoint with --resume"
    assert told(MemoryError("wanted"), tmp_path).endswith("; go on from the last checkpoint with --resume")


def test_another_process_says_to_go_on_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    other, lost = replace(WORLD, rank=1, size=2), dist.DistError("the connection broke")
    for error in (OSError(errno.ENOSPC, "words of the system"), MemoryError("wanted"), lost):
        for folder in (None, tmp_path):
            assert "--resume" not in str(explain(error, other, folder))
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    for error in (OSError(errno.ENOSPC, "words of the system"), MemoryError("wanted"), lost):
        assert str(explain(error, other, tmp_path)).endswith("go on from the last checkpoint with --resume")


def test_a_file_of_the_run_that_cannot_be_written(tmp_path: Path) -> None:
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "metrics.csv"))
    assert told(inside, tmp_path).startswith(f"Permission denied: {tmp_path / 'metrics.csv'}")
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/elsewhere"), WORLD, tmp_path) is None
    assert explain(PermissionError(errno.EACCES, "Permission denied", 3), WORLD, tmp_path) is None


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    for error in (
        CheckpointError("was not saved"),
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "a" / "b")),
    ):
        assert (
            told(error, tmp_path / "a")
            == f"the run folder {tmp_path / 'a'} is gone: deleted or moved while the run went on"
        )
        assert explain(error, WORLD, None) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nx"), MemoryError()])
def test_memory(error: Exception) -> None:
    assert "out of memory on cpu" in told(error) and "data.batch_size" in told(error)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert "out of memory on cpu" in told(caught.value)


def test_a_batch_norm_of_one_value() -> None:
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    found = explain(caught.value, WORLD, None)
    assert isinstance(found, ConfigError) and str(found).startswith("data.batch_size: too small")
    assert len(str(found).splitlines()) == 1


def test_a_lost_worker() -> None:
    failure = explain(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), WORLD, None)
    assert isinstance(failure, ReadError) and "data.workers" in str(failure)
