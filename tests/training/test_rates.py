"""rates.csv: rates asked for over an epoch, and the counts of what was dropped."""

import pytest

from tests.training.parts import build_tiny, first_batches, step
from training.rates import RATE_COLUMNS, rates_row


def test_a_row_is_of_the_epoch_and_its_counts_of_the_run() -> None:
    setup = build_tiny("drop_path.schedule={kind: late, cutoff_epochs: 1}")
    batches = first_batches(setup)
    step(setup, batches, number=0)
    first = rates_row(setup.depth, epoch=0, steps_per_epoch=5)
    assert tuple(first) == RATE_COLUMNS
    assert first == {"epoch": 1, "nominal_rate": 0, "drawn": 4 * 256, "dropped": 0, "computed": 4 * 256}
    step(setup, batches, number=5)
    second = rates_row(setup.depth, epoch=1, steps_per_epoch=5)
    assert second["nominal_rate"] == pytest.approx(0.2), "of two blocks at 0 and 0.4"
    assert second["drawn"] == 8 * 256 and abs(second["dropped"] - 2 * 0.4 * 256) < 2
    assert second["computed"] == second["drawn"] - second["dropped"], "mode skip"


def test_the_rate_asked_for_is_the_mean_over_the_steps_of_the_epoch() -> None:
    setup = build_tiny("drop_path.schedule={kind: piecewise, points: [[0, 0], [1, 1], [2, 1]]}")
    asked = [rates_row(setup.depth, epoch=epoch, steps_per_epoch=5)["nominal_rate"] for epoch in (0, 1)]
    assert asked == pytest.approx([0.2 * 0.4, 0.2]), "steps 0 to 4 of 5 on the way up"


def test_reading_draws_nothing() -> None:
    import torch

    setup = build_tiny()
    step(setup, first_batches(setup))
    before = torch.random.get_rng_state()
    first, again = (rates_row(setup.depth, epoch=0, steps_per_epoch=5) for _ in range(2))
    assert first == again and torch.equal(before, torch.random.get_rng_state())


def test_a_model_without_stochastic_depth_has_rows_of_zeros() -> None:
    from stochastic_depth.setting import StochasticDepth

    row = rates_row(StochasticDepth([], []), epoch=2, steps_per_epoch=5)
    assert row == {"epoch": 3, "nominal_rate": 0, "drawn": 0, "dropped": 0, "computed": 0}
