"""What a script makes of an error: lines a person can act on, and an exit code."""

import io
import os
import sys

import pytest

from files.durable import CheckpointError
from files.errors import (
    ConfigError,
    Failure,
    LastingStream,
    is_out_of_memory,
    lasting_output,
    nearest,
    one_line,
    printable,
    run_command,
    wanted_memory,
)
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."),
         "4,000.0 GB were asked for at once"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
        (MemoryError(), "MemoryError"),
    ],
)  # fmt: skip
def test_a_machine_without_memory_costs_two_lines(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise error

    assert run_command(fails) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: out of memory: {told}" and said[1].startswith("use a smaller model") and len(said) == 2
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("memory")) and wanted_memory(error) == told


def test_ctrl_c_costs_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert tuple(capsys.readouterr()) == ("", "stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb \u00e9\u82b1", "a\nb \u00e9\u82b1"),
        ("\x1b[31m\x00\t", "\\x1b[31m\\x00\\t"),
        ("\udcff\u202e", "\\udcff\\u202e"),
    ],
)
def test_messages_hold_nothing_a_terminal_would_obey(text: str, shown: str) -> None:
    assert printable(text) == str(ConfigError(text)) == str(Failure(text)) == shown
    assert one_line(text) == shown.replace("\n", "\\n")
    shown.encode()


def test_a_stream_outlasts_its_reader() -> None:
    reading, writing = os.pipe()
    stream = LastingStream(os.fdopen(writing, "w", buffering=1))
    stream.write("heard\n")
    assert os.read(reading, 100) == b"heard\n"
    os.close(reading)
    for _ in range(3):
        assert stream.write("lost\n") == 5
        stream.flush()
    assert stream.writable() and not stream.isatty(), "all else is the stream's own"
    stream.close()


def test_a_stream_of_a_small_alphabet_escapes() -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="latin-1"))
    stream.write("\u00e9 \u82b1 \udcff\n")
    stream.flush()
    assert raw.getvalue() == b"\xe9 \\u82b1 \\udcff\n"


def test_output_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), lasting_output():
        assert isinstance(sys.stdout, LastingStream) and isinstance(sys.stderr, LastingStream)
        print("to nobody")
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
