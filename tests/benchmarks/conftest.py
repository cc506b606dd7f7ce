"""What tests of benchmarks share."""

import pytest


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that make of the digits' run one of seconds."""
    return [
        "model.name=caformer_n4",
        "model.image_size=8",
        "model.depths=[1,1]",
        "model.dims=[16,32]",
        "data.batch_size=256",
    ]
