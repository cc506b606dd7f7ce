"""Names of samples, and the two ways to a pipeline."""

import os
from pathlib import Path

import pytest

from tests.training.data.parts import damage, data_section, digits, folder
from training.data.build import class_names_of_data
from training.data.images import ImagePipeline
from training.data.small_images import SmallImagesPipeline
from training.data.source import Batched, Source, name_below, place


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_a_source_gives_each_sample_by_index(kind: str, image_root: Path) -> None:
    bundle = digits() if kind == "digits" else folder(image_root)
    for part in (bundle.train, bundle.val):
        source: Source = part.source
        names = [source.name(i) for i in range(len(source))]
        assert len(set(names)) == len(source) == len(source.targets)
        assert source.class_names == bundle.class_names and set(source.targets) == set(range(bundle.num_classes))
        for _ in range(2):  # the same at every call
            with source.open(1) as raw:
                assert raw is not None
    assert not {*names} & {bundle.train.source.name(i) for i in range(len(bundle.train))}
    section = data_section() if kind == "digits" else data_section(dataset="folder", root=str(image_root))
    assert class_names_of_data(section) == bundle.class_names


def test_a_source_with_a_pipeline_of_its_own_uses_it(image_root: Path) -> None:
    quick, other = digits().train, folder(image_root).train
    assert isinstance(quick.source, Batched) and isinstance(quick.pipeline, SmallImagesPipeline)
    assert not isinstance(other.source, Batched) and isinstance(other.pipeline, ImagePipeline)


def test_places_are_paths(image_root: Path) -> None:
    bundle = folder(image_root)
    assert damage(bundle.val, 2) == image_root / "val" / "daisy" / "deeper" / "0.jpg"
    assert place(bundle.val.source, 2) == str(image_root / "val" / "daisy" / "deeper" / "0.jpg")
    assert bundle.val.source.name(2) == "daisy/deeper/0.jpg"
    source = digits().val.source
    assert place(source, 3) == source.name(3), "in memory, there is no other place"


def test_a_name_is_what_lies_below_a_folder() -> None:
    path = os.path.join("data", "train", "aster", "0.jpg")
    assert name_below(path, "data") == name_below(path, Path("data/")) == "train/aster/0.jpg"
    assert name_below(path, Path(".")) == "data/train/aster/0.jpg"
    assert name_below("database/0.jpg", "data") == "database/0.jpg"
