"""A folder of images, and a watch over the global random states."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.parts import write_image


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Three classes, 5 training and 2 validation images each, of several sizes, modes and formats."""
    root = tmp_path / "flowers"
    for c, name in enumerate(["aster", "daisy", "tulip"]):
        for i in range(5):
            kind = {3: ("grey.jpg", "L"), 4: ("clear.png", "RGBA")}.get(i, ("plain.JPEG", "RGB"))
            write_image(
                root / "train" / name / f"{i}-{kind[0]}", size=(20 + 3 * i, 26 - c), seed=10 * c + i, mode=kind[1]
            )
        for i in range(2):
            write_image(root / "val" / name / "deeper" / f"{i}.jpg", seed=100 + 10 * c + i)
    (root / "train" / "aster" / "notes.txt").write_text("not an image")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    return root


def global_states() -> list[Any]:
    return [random.getstate(), *[str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()]


@pytest.fixture
def unmoved_random_states() -> Iterator[None]:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = global_states()
    yield
    assert global_states() == before
