"""A folder of images to run on."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """12 training and 6 validation images of two classes; what makes a run on them, 3 epochs of 3 steps."""
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                path = tmp_path / "images" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * label + 9 * i).save(path)
    return [f"data={{dataset: folder, root: {tmp_path / 'images'}, batch_size: 4, workers: 0}}", "optim.epochs=3",
            "augment.random_erasing=0.5"]  # fmt: skip
