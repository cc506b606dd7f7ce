"""The data sets that a config asks for."""

import csv
import math
from pathlib import Path

import pytest

from configs import CONFIGS
from tests.training.data.parts import CPU, GREY, augment_section, data_section, digits, fails, folder, write_image
from training.config import DataSection, load_config
from training.data.build import build_datasets, class_names_of_data
from training.data.transforms import ImageSpec
from training.distributed import World
from training.loop import train
from training.run_folder import RunFolder
from training.setup import build, describe


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_trains_three_steps_on_a_folder(path: Path, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for c in range(2):
            for i in range(count):
                write_image(tmp_path / "data" / split / f"class{c}" / f"{i}.jpg", size=(48, 40), seed=10 * c + i)
    (tmp_path / "data" / "val" / "class0" / "notes.txt").write_text("no image")
    overrides = ["data.dataset=folder", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.batch_size=4",
                 "data.workers=0", "optim.epochs=1", "optim.warmup_epochs=0", "runtime.device=cpu"]  # fmt: skip
    if load_config(path).model.overrides.get("image_size"):
        overrides.remove("data.image_size=32")
    config = load_config(path, overrides)
    world = World(rank=0, local_rank=0, size=1, device=CPU)
    setup = build(config, world)
    assert "\nleft out  1 file (1 .txt)\n" in describe(setup)
    run = RunFolder(tmp_path / "run")
    run.make(fresh=True)
    summary = train(setup, run, None)
    assert summary["steps"] == setup.steps_per_epoch == 3
    (row,) = csv.DictReader(run.metrics.read_text().splitlines())
    assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["val_loss"]))


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (ImageSpec((4, 8, 8), (0.0,) * 4, (1.0,) * 4), "4 input channels"),
        (ImageSpec((3, 8, 8), (0.0,), (1.0,)), "one value for each of 3"),
        (ImageSpec((1, 8, 8), (0.0,), (1.0,), interpolation="cubic"), "'cubic' is not one of nearest"),
        (ImageSpec((1, 8, 8), (0.0,), (1.0,), crop_pct=0.0), "crop_pct 0.0"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused(spec: ImageSpec, problem: str) -> None:
    with fails(problem):
        digits(spec)


def test_an_unknown_data_set_is_refused() -> None:
    with fails("data.dataset: 'cifar'", "'digits', 'folder'"):
        build_datasets(DataSection.model_construct(dataset="cifar"), augment_section(), GREY, seed=0)


def test_a_setting_without_effect_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="crop_ratio has no effect"):
        digits(crop_ratio=[1.0, 1.0])


def test_class_names_without_building(image_root: Path) -> None:
    section = data_section(dataset="folder", root=str(image_root))
    assert class_names_of_data(section) == folder(image_root).class_names
    assert class_names_of_data(data_section()) == digits().class_names == [str(i) for i in range(10)]
