"""Which data, and which part of them."""

from pathlib import Path

import pytest

from files.errors import ConfigError
from tests.training.data.parts import COLOUR, GREY
from training.config import TrainConfig, load_config
from training.evaluating.part import Part, WantedData, build_part, find_data

DIGITS = ["data.dataset=digits"]


@pytest.fixture
def trained(digits_run: Path) -> TrainConfig:
    return load_config(digits_run / "config.yaml")


def build(wanted: WantedData, run: TrainConfig | None = None, spec=GREY) -> Part:
    return build_part(wanted, find_data(wanted, run), spec)


def test_the_data_of_the_run_with_what_was_said_beside_it(trained: TrainConfig) -> None:
    data = find_data(WantedData(batch_size=7, workers=1, overrides=["data.batch_size=9"]), trained)
    assert (data.dataset, data.batch_size, data.eval_batch_size, data.workers) == ("digits", 9, 7, 1)
    assert data.class_names is None and data.image_size is None


def test_other_data_take_over_nothing_but_how_they_are_read(trained: TrainConfig, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"model: {{name: convformer_n4}}\ndata: {{dataset: folder, root: {tmp_path}, on_error: skip, workers: 3}}\n"
    )
    data = find_data(WantedData(config=tmp_path / "c.yaml"), trained)
    assert (data.dataset, data.on_error, data.workers) == ("folder", "skip", 3)
    data = find_data(WantedData(config=tmp_path / "c.yaml", overrides=DIGITS), None)
    assert (data.dataset, data.root, data.on_error, data.workers) == ("digits", None, "stop", 3)
    data = find_data(WantedData(images=photos, overrides=["data.on_error=skip"]), trained)
    assert (data.dataset, data.root, data.on_error, data.batch_size) == ("folder", str(photos), "skip", 256)


def test_parts(photos: Path) -> None:
    val, train = (build(WantedData(split=split, overrides=DIGITS)) for split in ("val", "train"))
    assert (val.name, len(val.source), train.name, len(train.source)) == ("val", 360, "train", 1437)
    assert type(train.dataset) is type(val.dataset), "nothing is augmented"
    whole = build(WantedData(images=photos), spec=COLOUR)
    assert (whole.name, whole.class_names, len(whole.source)) == ("all", ["aster", "daisy", "tulip"], 12)


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ({}, ["nothing says which data"]),
        ({"overrides": DIGITS, "split": "test"}, ["--split test: dataset 'digits' has no test part"]),
        ({"overrides": ["data.dataset=folder"]}, ["data.dataset=folder", "needs a root"]),
        ({"overrides": ["data.dataset=digit"]}, ["did you mean 'digits'?"]),
        ({"overrides": [*DIGITS, "data.wrokers=2"]}, ["data.wrokers=2: unknown key; did you mean 'data.workers'?"]),
        ({"overrides": [*DIGITS, "optim.lr=1"]}, ["only keys of data"]),
        ({"overrides": [*DIGITS, "data.image_size=9"]}, ["what --image-size is for"]),
        ({"overrides": [*DIGITS, "data.class_names=[a]"]}, ["compared with the model's"]),
        ({"overrides": [*DIGITS, "data.workers=many"]}, ["data.workers=many", "expected an integer"]),
        ({"config": Path("nowhere.yaml")}, ["nowhere.yaml: no such file"]),
        ({"images": Path("nowhere")}, ["--images: 'nowhere' is no folder"]),
        ({"images": Path("PHOTOS/aster")}, ["--images: ", "has no class folders"]),
        ({"images": Path("x"), "split": "train"}, ["--split train has no effect"]),
        ({"images": Path("x"), "config": Path("c.yaml")}, ["--config has no effect"]),
        ({"batch_size": 0}, ["--batch-size: must be at least 1, got 0"]),
        ({"workers": -1}, ["--workers: must be at least 0, got -1"]),
    ],
)
def test_mistakes(wanted: dict, parts: list[str], photos: Path) -> None:
    if str(wanted.get("images", "")).startswith("PHOTOS"):
        wanted = {"images": photos / "aster"}
    with pytest.raises(ConfigError) as caught:
        build(WantedData(**wanted))
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert len(str(caught.value).splitlines()) <= 3
