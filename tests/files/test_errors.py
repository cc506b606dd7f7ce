"""What a script makes of an error: lines a person can act on, and an exit code."""

import pytest

from files.durable import CheckpointError
from files.errors import ConfigError, Failure, nearest, run_command
from models.export import ExportError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("optim.lrr: unknown key"), 2),
        (Failure("the disk is gone"), 1),
        (CheckpointError("a was not saved"), 1),
        (ExportError("no"), 1),
    ],
)
def test_an_error_that_says_all_becomes_a_line_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert run_command(fail) == code
    assert tuple(capsys.readouterr()) == ("", f"error: {error}\n")


def test_a_command_without_errors_keeps_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run_command(lambda code=code: code) for code in (0, 3)] == [0, 3]
    assert tuple(capsys.readouterr()) == ("", "")


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_nearest() -> None:
    assert nearest("cosin", ["linear", "cosine"]) == "; did you mean 'cosine'?"
    assert nearest("zzz", ["linear", "cosine"]) == ""
