"""Signals are noted and given back; logs have plain lines."""

import signal

import pytest

from tests.training.parts import build_tiny
from training import console
from training.console import PlainLines, ProgressBar, StopSignals
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
