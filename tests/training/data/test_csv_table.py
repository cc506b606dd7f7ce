"""Tables of images: columns, labels, separators, and every mistake by its line."""

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.parts import COLOUR, augment_section, data_section, fails, paths, refused, write_image
from tests.training.parts import TINY
from training.config import load_config
from training.data.build import build_datasets, class_names_of_data
from training.data.dataset import DataBundle
from training.data.images import check_images
from training.run import run


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Ten images each of cats and dogs, and the tables train.csv and val.csv beside them."""
    root = tmp_path / "pets"
    for kind in ("cat", "dog"):
        for i in range(10):
            write_image(root / "images" / f"{kind}{i}.png", size=(9, 8), seed=i)
    write(root / "train.csv", *[f"images/{kind}{i}.png,{kind}" for kind in ("dog", "cat") for i in range(8)])
    write(root / "val.csv", *[f"images/{kind}{i}.png,{kind}" for kind in ("dog", "cat") for i in (8, 9)])
    return root


def write(file: Path, *rows: str, header: str = "path,label", end: str = "\n") -> Path:
    file.write_bytes("".join(row + end for row in (header, *rows)).encode())
    return file


def table(at: Path, *, val: str | None = "val.csv", **data: Any) -> DataBundle:
    data = {"train_file": str(at / "train.csv"), "val_file": None if val is None else str(at / val), **data}
    return build_datasets(data_section(dataset="csv", **data), augment_section(), COLOUR, seed=0)


def test_tables_are_read_in_their_order(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bundle = table(pets)
    assert bundle.class_names == ["cat", "dog"] and bundle.train.targets == [1] * 8 + [0] * 8
    assert paths(bundle.val) == [str(pets / "images" / f"{name}.png") for name in ("dog8", "dog9", "cat8", "cat9")]
    assert bundle.train[0, 3][0].shape == (3, 16, 16) and bundle.test is None
    assert caplog.messages == [f"table     paths in column 'path', labels in column 'label' of '{pets / 'train.csv'}'"]
    section = data_section(dataset="csv", train_file=str(pets / "train.csv"), val_file=str(pets / "val.csv"))
    assert class_names_of_data(section) == bundle.class_names
    check_images(bundle)


def test_data_are_known_wherever_the_tables_lie(pets: Path, tmp_path: Path) -> None:
    before = table(pets).identity
    for name in ("train", "val"):  # elsewhere, with paths from the root
        (pets / f"{name}.csv").rename(tmp_path / f"{name}.csv")
    assert table(tmp_path, root=str(pets)).identity == before
    rows = (tmp_path / "train.csv").read_text().splitlines()[1:]
    write(tmp_path / "train.csv", *[f"{pets}/./{row}" for row in rows])
    assert table(tmp_path, root=str(pets)).identity == before, "whole paths below the root are the same names"
    assert table(tmp_path, val=None, val_fraction=0.25).train.source.location == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bom.csv", "\ufeffpath,label\nimages/cat1.png,cat\nimages/dog1.png,dog\n"),
        ("windows.csv", "path,label\r\nimages/cat1.png,cat\r\nimages/dog1.png,dog\r\n"),
        ("mac.csv", "path,label\rimages/cat1.png,cat\rimages/dog1.png,dog\r"),
        ("no-end.csv", "path,label\nimages/cat1.png,cat\nimages/dog1.png,dog"),
        ("quotes.csv", '"path","label"\n"images/cat1.png","cat"\nimages/dog1.png,"dog"\n'),
        ("spaces.csv", 'path, label \n images/cat1.png , cat\n\n   ,\nimages/dog1.png, "dog"\n'),
        ("tabs.tsv", "path\tlabel\nimages/cat1.png\tcat\nimages/dog1.png\tdog\n"),
        ("tabs.csv", "path\tlabel\nimages/cat1.png\tcat\nimages/dog1.png\tdog\n"),
        ("semicolons.csv", "path;label\nimages/cat1.png;cat\nimages/dog1.png;dog\n"),
        ("below.csv", "\n ;\npath;label\nimages/cat1.png;cat\nimages/dog1.png;dog\n"),
        ("more.csv", "id,label,path\n1,cat,images/cat1.png\n2,dog,images/dog1.png\n"),
        ("usual.csv", "filename,class\nimages/cat1.png,cat\nimages/dog1.png,dog\n"),
        ("both.csv", "file,path,label\nx,images/cat1.png,cat\nx,images/dog1.png,dog\n"),
        ("dots.csv", "path,label\n./images/cat1.png,cat\nimages/../images/dog1.png,dog\n"),
    ],
)
def test_how_tables_are_written(pets: Path, name: str, text: str) -> None:
    (pets / name).write_bytes(text.encode())
    bundle = table(pets, val=None, train_file=str(pets / name), val_file=str(pets / "val.csv"))
    assert [bundle.train.source.name(i) for i in range(2)] == ["images/cat1.png", "images/dog1.png"]
    assert bundle.train.targets == [0, 1] and len(bundle.train) == 2


def test_cells_may_hold_separators_and_line_ends(pets: Path) -> None:
    write_image(pets / "a,b.png")
    write(pets / "train.csv", '"a,b.png","cat, black"', '"images/dog1.png","two\nlines"', "images/gone.png,cat")
    with fails("train.csv', line 5: ", "gone.png' does not exist"):
        table(pets, val=None, val_fraction=0.5)
    write(pets / "train.csv", '"a,b.png","cat, black"', '"images/dog1.png","two\nlines"')
    assert class_names_of_data(data_section(dataset="csv", train_file=str(pets / "train.csv"))) == [
        "cat, black",
        "two\nlines",
    ]


def test_columns_by_name(pets: Path) -> None:
    write(pets / "train.csv", "images/cat1.png,x,cat", "images/dog1.png,x,dog", header="where,label,what is it")
    columns = {"path_column": "where", "label_column": "what is it"}
    write(pets / "val.csv", "images/cat2.png,x,cat", header="where,label,what is it")
    assert table(pets, **columns).class_names == ["cat", "dog"]
    with fails("data.label_column: ", "train.csv' has no column 'what is this'; did you mean 'what is it'?"):
        table(pets, **{**columns, "label_column": "what is this"})
    with fails("expected a column 'path', found none; say which by data.path_column", "columns: 'where', 'label', "):
        table(pets)
    write(pets / "train.csv", "a,b,cat", header="file,image,label")
    with fails("found several columns that may be meant, 'file', 'image'; say which by data.path_column"):
        table(pets)
    write(pets / "train.csv", "a,b,cat", header="path,Class,CLASS")
    with fails("found several columns that may be meant, 'Class', 'CLASS'; say which by data.label_column"):
        table(pets)
    write(pets / "train.csv", "images/cat1.png,cat,1", "images/dog1.png,dog,1", header="path,label,Label")
    train = {"dataset": "csv", "train_file": str(pets / "train.csv")}
    assert class_names_of_data(data_section(**train)) == ["cat", "dog"], "not of the last one"
    write(pets / "train.csv", "a,b,cat", header="path,path,label")
    with fails("train.csv' has two columns 'path'"):
        table(pets)


def test_numbers_are_sorted_as_numbers(pets: Path) -> None:
    rows = [f"images/cat{i}.png,{label}" for i, label in enumerate([10, 9, -1, 9])]
    write(pets / "train.csv", *rows)
    write(pets / "val.csv", "images/cat9.png,9")
    bundle = table(pets)
    assert (
        bundle.class_names == ["-1", "9", "10"] and bundle.train.targets == [2, 1, 0, 1] and bundle.val.targets == [1]
    )
    write(pets / "train.csv", *rows, "images/cat7.png,09")
    with fails("data.train_file", "labels '09' and '9' are one number"):
        table(pets)
    write(pets / "train.csv", *rows, "images/cat7.png,x")
    assert table(pets).class_names == ["-1", "10", "9", "x"], "texts, where one is none"
    write(pets / "train.csv", "images/cat1.png,1_2", "images/cat2.png,12", "images/cat3.png,2")
    write(pets / "val.csv", "images/cat9.png,12")
    assert table(pets).class_names == ["12", "1_2", "2"], "texts, though Python reads 1_2 as 12"


MISTAKES: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["train.csv' is empty; expected a line of column names"]),
    "a header alone": ("path,label\n", ["train.csv' has no rows below its column names"]),
    "an empty label": ("path,label\nimages/cat1.png,cat\nimages/dog1.png, \n", ["line 3: column 'label' is empty"]),
    "an empty path": ("path,label\n,cat\n", ["line 2: column 'path' is empty"]),
    "a short row": ("path,label\nimages/cat1.png\n", ["line 2: 1 cell, but 2 columns"]),
    "a long row": ("path,label\na,b.png,cat\n", ["line 2: 3 cells, but 2 columns", "quote what holds a separator"]),
    "two labels": ("path,label\nimages/cat1.png,cat\nimages/dog1.png,dog\n./images/cat1.png,dog\n",
                   ["'./images/cat1.png' has two labels, 'cat' in line 2 and 'dog' in line 4"]),
    "two labels above a short row": ("path,label\na,cat\na,dog\nb\n",
                                     ["'a' has two labels, 'cat' in line 2 and 'dog' in line 3"]),
    "two labels below a short row": ("path,label\na,cat\nb\na,dog\n", ["line 3: 1 cell, but 2 columns"]),
    "two pairs of labels": ("path,label\na,cat\nb,cat\n./b,dog\na,dog\n",
                            ["'./b' has two labels, 'cat' in line 3 and 'dog' in line 4"]),
    "a missing file": ("path,label\nimages/cat1.png,cat\nimages/dgo1.png,dog\nnone.png,dog\n",
                       ["line 3: ", "dgo1.png' does not exist (and 1 more of 3 rows)", "data.root"]),
    "a folder": ("path,label\nimages/cat1.png,cat\nimages,dog\n", ["line 3: ", "images' is a folder"]),
    "back slashes": ("path,label\nimages\\cat1.png,cat\nimages/dog1.png,dog\n", ["line 2: ", "separated by / here"]),
    "one class": ("path,label\nimages/cat1.png,cat\n", ["has one class, 'cat'; at least two are needed"]),
    "an open quote": ('path,label\n"images/cat1.png,cat\n', ["no valid CSV: unexpected end of data"]),
    "a quote amid": ('path,label\nimages/cat1.png,"cat"x\n', ["line 2: no valid CSV"]),
    "no column names": ("images/cat1.png,cat\nimages/dog1.png,dog\n", ["expected a column 'path', found none"]),
    "a null": ("path,label\nimages/cat1.png,c\0at\n", ["line 2: has a null character"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_table(pets: Path, name: str) -> None:
    text, words = MISTAKES[name]
    (pets / "train.csv").write_text(text, newline="")
    with fails("data.train_file: ", *words):
        table(pets)


def test_a_table_that_cannot_be_read(pets: Path) -> None:
    with fails("data.train_file: ", "trian.csv' does not exist; did you mean 'train.csv'?"):
        table(pets, train_file=str(pets / "trian.csv"))
    with fails("data.val_file: ", "none.csv' does not exist"):
        table(pets, val="none.csv")
    with fails("data.train_file: ", "images' cannot be read: Is a directory"):
        table(pets, train_file=str(pets / "images"))
    with fails("data.root: ", "nowhere' is no folder"):
        table(pets, root=str(pets / "nowhere"))
    (pets / "train.csv").write_text("path,label\nimages/cat1.png,größer\n", encoding="utf-16")
    with fails("train.csv' is not in UTF-8 (byte 0)"):
        table(pets)


def test_a_label_that_training_does_not_know(pets: Path) -> None:
    for key in ("val_file", "test_file"):
        write(pets / "other.csv", "images/cat8.png,cat", "images/dog8.png,dgo")
        with fails(f"data.{key}: ", "other.csv', line 3: label 'dgo' is none", "2 classes; did you mean 'dog'?"):
            table(pets, **{key: str(pets / "other.csv")})


def test_rows_may_be_doubled_and_stay_on_one_side(pets: Path) -> None:
    rows = [f"images/{kind}{i}.png,{kind}" for kind in ("dog", "cat") for i in range(8)]
    write(pets / "train.csv", *rows, *rows[3:9])
    bundle = table(pets, val=None, val_fraction=0.25)
    assert len(bundle.train) + len(bundle.val) == 22 and not {*paths(bundle.train)} & {*paths(bundle.val)}


def test_paths_of_one_hash_are_told_apart(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table(pets).identity
    monkeypatch.setattr("training.data.csv_table.hash", lambda path: 7, raising=False)
    assert table(pets).identity == before
    write(pets / "train.csv", "images/cat1.png,cat", "images/dog1.png,dog", "images/cat1.png,dog")
    with fails("'images/cat1.png' has two labels, 'cat' in line 2 and 'dog' in line 4"):
        table(pets)


def test_training_images_that_are_validated_on_are_told(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(pets / "val.csv", "images/cat1.png,cat", "images/dog9.png,dog")
    table(pets)
    told = "warning: data.val_file: 1 of its 2 images are training images"
    assert caplog.messages.count(told) == 1
    (pets / "images" / "val.csv").write_text("path,label\ncat1.png,cat\ndog9.png,dog\n")  # relative to another folder
    table(pets, val="images/val.csv")
    assert caplog.messages.count(told) == 2


def test_parts_of_tables(pets: Path) -> None:
    bundle = table(pets, test_file=str(pets / "val.csv"), val=None, val_fraction=0.25)
    assert (len(bundle.train), len(bundle.val), bundle.test and len(bundle.test)) == (12, 4, 4)
    with fails("data.val_fraction: has no effect"):
        table(pets, val_fraction=0.25)
    assert "needs a train_file, for example data.train_file=/path/to/train.csv" in refused(dataset="csv")
    assert "has no effect with dataset 'digits'" in refused(dataset="digits", train_file="x.csv")
    assert "has no effect with dataset 'folder'" in refused(dataset="folder", root="x", path_column="x")


def test_a_missing_file_is_skipped_where_the_config_says_so(pets: Path) -> None:
    (pets / "images" / "cat3.png").unlink()
    with fails("line 13: ", "cat3.png' does not exist"):
        table(pets)
    bundle = table(pets, on_error="skip")
    check_images(bundle, allowed=1)
    assert len(bundle.train.__getitems__([(0, 11)])) == 2, "a sample in its place, and what was wrong with it"


def words_for(pets: Path, split: str) -> list[str]:
    return [
        f"data={{dataset: csv, train_file: {pets / 'train.csv'}, batch_size: 2, workers: 2, {split}}}",
        "model={name: caformer_n4, in_chans: 3, image_size: 16, depths: [1, 1], dims: [16, 32]}",
        "augment={hflip: 0.5, auto_augment: rand-m9-mstd0.5, mixup: 0.2}",
        "checkpoint={every_steps: 1, keep: 20}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val_file: VAL", "val_fraction: 0.25, train_samples: 9"])
def test_a_run_goes_on_with_workers_as_if_it_had_not_stopped(pets: Path, tmp_path: Path, split: str) -> None:
    words = words_for(pets, split.replace("VAL", str(pets / "val.csv")))
    config = load_config(None, [*TINY, *words])
    whole = run(config, tmp_path / "whole")
    steps = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(steps) >= 6
    again = run(config, None, resume=steps[2])
    assert again["weights_sha256"] == whole["weights_sha256"] and again["steps"] == whole["steps"]
    other = run(load_config(None, [*TINY, *words, "seed=1"]), tmp_path / "other")
    assert other["weights_sha256"] != whole["weights_sha256"]
