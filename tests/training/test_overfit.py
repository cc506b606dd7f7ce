"""One batch by heart: the loss falls where a model can learn it, and a warning where not."""

import itertools

import pytest
import torch

from tests.training.parts import build_tiny, weights
from training import overfit as tested
from training.overfit import STEPS, overfit


def test_the_loss_of_one_batch_falls_and_the_run_is_left_as_it_is() -> None:
    setup = build_tiny("augment.random_erasing=1", "model.drop_rate=0.5", "drop_path.rate=0.9")
    setup.model.train()
    before, mode = weights(setup), {key: m.training for key, m in setup.model.named_modules()}
    told = overfit(setup)
    assert f"in {STEPS} steps: it can be learned" in told and told.startswith("one batch of 64: loss 2.")
    assert float(told.split(" to ")[1].split()[0]) < 0.5, "nothing is dropped or erased"
    assert weights(setup) == before and mode == {key: m.training for key, m in setup.model.named_modules()}
    assert not setup.optimizer.state and setup.drop_path_rate == 0.9
    assert all(p.grad is None for p in setup.model.parameters())


@pytest.mark.parametrize("lr", ["1e-12", "1e9"])
def test_a_loss_that_does_not_fall_is_warned_about(lr: str) -> None:
    told = overfit(build_tiny(f"optim.lr={lr}"))
    assert "warning: the loss of a single batch does not fall; look at optim.lr" in told


def test_frozen_parts_stay_frozen() -> None:
    setup = build_tiny("freeze.epochs=1")
    setup.model.train()
    setup.freezing.set_epoch(0)
    found = overfit(setup)
    assert "in 40 steps" in found
    assert float(found.split(" to ")[1].split()[0]) > 0.5, "the classifier alone"


def test_slow_steps_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=20)
    monkeypatch.setattr(tested.time, "perf_counter", lambda: next(clock))
    assert "in 1 step; too few to tell anything" in overfit(build_tiny())


def test_no_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tested, "_train", full)
    assert "does not hold a copy" in overfit(build_tiny())
