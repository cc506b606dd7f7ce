"""The zygote, and a run that nothing happens to."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.parts import TINY, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of TINY, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    zygote.run(*TINY, "checkpoint.keep=9", "--output", folder, cwd=folder.parent).fine()
    return folder
