"""What a script makes of an error: lines a person can act on, and an exit code."""

import errno
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
    assert nearest("resnet19", ["vgg19", "resnet18"], before="timm/") == "; did you mean 'timm/resnet18'?"
    assert nearest("", ["vgg19", "resnet18"], before="torchvision/") == ""


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOSPC])
def test_what_a_machine_runs_out_of_costs_a_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise OSError(number, os.strerror(number), "a\nb")

    assert run_command(fails) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: a\\nb\n"


def test_other_errors_of_the_system_are_mistakes_of_ours() -> None:
    with pytest.raises(FileNotFoundError):
        run_command(lambda: len(os.listdir("/nowhere/at/all")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("printed", "given", "code", "kind"),
    [(True, 0, 1, "error"), (True, 2, 2, "error"), (False, 0, 0, "warning")],
)
def test_a_disk_that_is_too_full_for_what_is_printed(
    printed: bool, given: int, code: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a table on a full disk must not look like a whole one."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command(lambda: print("a row") or given, printed=printed) == code
        print("dropped")  # the null device is in its place, so that closing it does not fail either
    said = f"{kind}: standard output cannot be written: {os.strerror(errno.ENOSPC)}; what stands there is not all\n"
    assert capsys.readouterr().err == said


def test_a_reader_that_leaves_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)

        def tell() -> int:
            print("a row", flush=True)
            return 0 if sys.stdout.deserted else 9  # type: ignore[attr-defined]

        assert run_command(tell) == 0
    assert capsys.readouterr().err == ""


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
