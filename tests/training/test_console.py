"""Signals are noted and given back; logs have plain lines; what TensorBoard cannot write is said once."""

import contextlib
import errno
import signal
import threading
from pathlib import Path

import pytest

from tests.training.parts import build_tiny
from training import console
from training.console import Board, PlainLines, ProgressBar, Stopped, StopSignals
from training.run_folder import RunFolder
from training.state import Progress


def test_signals_are_noted_and_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    for number in numbers:
        with StopSignals() as signals:
            assert signals.received is None
            signal.raise_signal(number)
            assert signals.received == number.name
    assert [signal.getsignal(n) for n in numbers] == before
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in numbers] == before, "after an error as well"


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0, 10, 29, 30, 45, 62])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    lines = PlainLines(total=100, initial=10, disable=False, mininterval=30)
    lines.set_description("epoch 1/4", refresh=False)
    for step in range(5):
        lines.set_postfix_str(f"loss {step}", refresh=False)
        lines.update()
    lines.write("of an epoch")
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "epoch 1/4  step 13/100  loss 2  00:30 passed, 14:30 left",
        "epoch 1/4  step 15/100  loss 4  01:02 passed, 17:34 left",
    ]
    assert out == "of an epoch\n"


def test_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build_tiny()
    for terminal in (True, False):
        monkeypatch.setattr(console.sys.stderr, "isatty", lambda t=terminal: t)
        with ProgressBar(setup, Progress()) as bar:
            assert isinstance(bar.bar, PlainLines) is not terminal
            bar.step(Progress(samples=3, epoch_seconds=1.0), 0.5)


def test_a_stop_may_be_asked_for_without_a_signal() -> None:
    with StopSignals() as signals:
        signals.ask("a failed save")
        assert signals.received == "a failed save"
        signals.ask("another")
        assert signals.received == "a failed save", "the first reason"


def test_a_signal_before_the_first_step_stops_at_once() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals(early=True):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("no handler of errors gets it")
    with StopSignals(early=True) as signals:
        signals.finish_steps()
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM", "noted, from then on"
    with StopSignals(early=True) as signals, pytest.raises(Stopped, match="SIGUSR1"):
        with contextlib.suppress(Stopped):  # as a destructor would lose it
            signal.raise_signal(signal.SIGUSR1)
        signals.finish_steps()


def test_work_that_can_be_done_again_ends_behind_the_batch_at_hand() -> None:
    with StopSignals() as signals:
        assert list(signals.until_told(range(4))) == [0, 1, 2, 3]
        seen = []
        for number in signals.until_told(range(4)):
            seen.append(number)
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
        assert seen == [0, 1]
        assert list(signals.until_told(range(4))) == [0], "one at least: there is no measure of none"


def test_another_thread_takes_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as signals:
            seen.extend([signals.received, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]


def test_curves_that_cannot_be_written_are_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    hook = threading.excepthook
    with Board(build_tiny(), RunFolder(tmp_path), Progress()) as board:
        board.write({"epoch": 1, "lr": 0.5}, 3)
        assert board.writer is not None

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(board.writer, "add_scalar", full)
        for step in (4, 5):
            board.write({"epoch": 1, "lr": 0.5}, step)
    assert (
        capsys.readouterr().err.count("warning: no curves for TensorBoard from here on: No space left on device") == 1
    )
    assert threading.excepthook is hook
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("a file in its place")
    with Board(build_tiny(), RunFolder(tmp_path / "other"), Progress()) as board:
        board.write({"lr": 0.5}, 1)
    assert "no curves for TensorBoard" in capsys.readouterr().err
