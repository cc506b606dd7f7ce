"""Counter-based draws."""

import numpy as np

from training.data import draws as draws_module


def test_draws_are_spread_evenly_and_differ_between_samples() -> None:
    streams = draws_module.hash_words(0, 2, [0] * 20000, np.arange(20000))
    assert len(set(streams.tolist())) == 20000
    draws = draws_module.uniform(streams, 9)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=4 * 12**-0.5 / 20000**0.5)
    assert np.abs(np.corrcoef(draws.T) - np.eye(9)).max() < 4.5 / 20000**0.5
