"""Runs that take no time, for tests of a study."""

import pytest
from tests.tuning.parts import Trained

from tuning import units


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Stands in the place of training."""
    made = Trained()
    monkeypatch.setattr(units, "run", made.run)
    return made
