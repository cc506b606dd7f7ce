"""A short run on digits, whose best weights, newest average and raw weights differ; and images of several classes."""

from pathlib import Path

import pytest
import torch

from models.factory import create_model, saved_config
from models.weights import save_weights
from tests.training.data.parts import write_image
from tests.training.parts import TINY
from training.config import load_config
from training.report import page
from training.run import run

FLOWERS = ["aster", "daisy", "tulip"]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "digits"
    settings = ["ema={enabled: true, decay: 0.9, warmup: true}", "optim.epochs=3", "optim.lr=0.05"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda _: None)  # takes longer than all epochs
        run(load_config(None, [*TINY, *settings]), folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/*.jpg: noise of three classes, of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate(FLOWERS):
        for i in range(4):
            write_image(root / name / f"{i}.png", size=(40 + 7 * i, 61 - 5 * c), seed=10 * c + i)
    return root


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights of timm's smallest network, for the three classes of `photos`."""
    folder = tmp_path_factory.mktemp("weights") / "timm"
    with torch.random.fork_rng():  # a pixel that is read one level off counts for little with these weights
        torch.manual_seed(0)
        model = create_model("timm/test_resnet", num_classes=3, class_names=FLOWERS, image_size=32, crop_pct=0.8)
    save_weights(folder, model.state_dict(), saved_config(model))
    return folder
