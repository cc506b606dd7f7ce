"""Signals are noted and given back."""

import signal

import pytest

from training.console import StopSignals


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


def test_a_stop_may_be_asked_for_without_a_signal() -> None:
    with StopSignals() as signals:
        signals.ask("a failed save")
        assert signals.received == "a failed save"
        signals.ask("another")
        assert signals.received == "a failed save", "the first reason"
