"""Signals are noted and given back, and what TensorBoard cannot write is said once."""

import contextlib
import errno
import signal
import threading
from pathlib import Path

import pytest

from tests.training.parts import WORLD
from training.console import Board, Stopped, StopSignals
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
    with Board(RunFolder(tmp_path), WORLD, Progress()) as board:
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
    with Board(RunFolder(tmp_path / "other"), WORLD, Progress()) as board:
        board.write({"lr": 0.5}, 1)
    assert "no curves for TensorBoard" in capsys.readouterr().err
