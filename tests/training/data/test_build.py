"""The data sets that a config asks for."""

import csv
import math
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from configs import CONFIGS
from models.factory import create_model, saved_config
from models.weights import save_weights
from tests.training.data.parts import (
    COLOUR,
    CPU,
    EVERYTHING,
    GREY,
    augment_section,
    data_section,
    digits,
    fails,
    folder,
    train_loader,
    write_image,
)
from training.config import DataSection, TrainConfig, load_config
from training.data.build import build_datasets, class_names_of_data
from training.data.dataset import DataBundle
from training.data.images import check_images
from training.data.kinds import KINDS, DataKind
from training.data.skipping import SkipList
from training.data.transforms import ImageSpec
from training.distributed import World
from training.loop import train
from training.run_folder import RunFolder
from training.setup import build, describe


def a_teacher(config: TrainConfig, folder: Path) -> Path:
    """Weights of a model of the config's kind for the two classes, as a run would leave them."""
    model = create_model(config.model.name, num_classes=2, **config.model.overrides)
    save_weights(folder / "teacher", model.state_dict(), saved_config(model))
    return folder / "teacher"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_trains_three_steps_on_a_folder(path: Path, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for c in range(2):
            for i in range(count):
                write_image(tmp_path / "data" / split / f"class{c}" / f"{i}.jpg", size=(48, 40), seed=10 * c + i)
    (tmp_path / "data" / "val" / "class0" / "notes.txt").write_text("no image")
    overrides = ["data.dataset=folder", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.batch_size=4",
                 "data.workers=0", "optim.epochs=1", "optim.warmup_epochs=0", "runtime.device=cpu"]  # fmt: skip
    if load_config(path).distill.teacher is not None:  # another run, which is not there
        overrides.append(f"distill.teacher={a_teacher(load_config(path), tmp_path)}")
    if load_config(path).data.train_samples is not None:
        overrides.append("data.train_samples=null")
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


@pytest.fixture
def zip_root(image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images of `image_root` in two zip files, which a kind of data reads that this line of the table adds."""
    monkeypatch.setitem(KINDS, "zipped", DataKind("tests.training.data.zipped", "root/train.zip, val.zip"))
    root = tmp_path / "zips"
    for part in ("train", "val"):
        shutil.make_archive(str(root / part), "zip", image_root / part)
    return root


def zipped(root: Path, **data: Any) -> DataBundle:
    section = data_section(dataset="zipped", root=str(root), **data)
    return build_datasets(section, augment_section(**EVERYTHING), COLOUR, seed=0)


def test_a_new_kind_is_decoded_and_transformed_as_the_others(zip_root: Path, image_root: Path) -> None:
    new, old = zipped(zip_root), folder(image_root, **EVERYTHING)
    for index in range(15):
        (a, *labels), (b, *others) = new.train[1, index], old.train[1, index]
        assert torch.equal(a, b) and labels == others
    assert torch.equal(new.val[5][0], old.val[5][0]) and len(new.val) == len(old.val) == 6
    assert new.identity == {**old.identity, "dataset": "zipped"}
    section = data_section(dataset="zipped", root=str(zip_root))
    assert class_names_of_data(section) == new.class_names == ["aster", "daisy", "tulip"]
    check_images(new)


def test_a_new_kind_trains(zip_root: Path, tmp_path: Path) -> None:
    words = ["data.dataset=zipped", f"data.root={zip_root}", "data.batch_size=4", "data.workers=1", "optim.epochs=1",
             "optim.warmup_epochs=0", "runtime.device=cpu"]  # fmt: skip
    setup = build(load_config(None, words), World(rank=0, local_rank=0, size=1, device=CPU))
    run = RunFolder(tmp_path / "run")
    run.make(fresh=True)
    assert train(setup, run, None)["steps"] == 3
    assert load_config(run.config).data.dataset == "zipped"


def test_a_new_kind_is_checked_and_skipped_as_the_others(zip_root: Path, tmp_path: Path) -> None:
    with ZipFile(zip_root / "train.zip", "a") as file:
        file.writestr("daisy/9.png", b"no picture")
    place = zip_root / "train.zip" / "daisy" / "9.png"
    with fails("data.root: 1 of 22 images cannot be read", f"the first is '{place}'", "cannot identify image file"):
        check_images(zipped(zip_root))
    section = data_section(dataset="zipped", root=str(zip_root), on_error="skip", batch_size=16)
    skips = SkipList(section)
    skips.path = tmp_path / "skipped.csv"
    (batch,) = skips.read(train_loader(zipped(zip_root, on_error="skip"), batch_size=16))
    assert len(batch[0]) == 16 and skips.path.read_text().splitlines()[1].startswith("train,train.zip/daisy/9.png,")


def test_a_config_knows_what_the_table_says_of_a_new_kind(zip_root: Path) -> None:
    with fails("data.dataset", "expected 'digits' or 'folder' or ", "or 'zipped', got 'zip'; did you mean 'zipped'?"):
        load_config(None, ["data.dataset=zip"])
    with fails("data.dataset", "dataset 'zipped' needs a root"):
        load_config(None, ["data.dataset=zipped"])
