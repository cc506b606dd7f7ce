"""docs/contributing.md: its changes are made in a copy of the checkout, and a run uses all of them."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def change(folder: Path, diff: str) -> str:
    """Makes the changes of one block `+++ FILE`, whose parts are set apart by `@@`; returns the file's name."""
    head, _, body = diff.partition("\n")
    path = folder / head.removeprefix("+++ ")
    text = path.read_text()
    for part in body.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{path.name} holds {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    path.write_text(text)
    return head.removeprefix("+++ ")


def apply(folder: Path, section: str) -> list[str]:
    """Makes the changes of a section and writes its new files; returns the names of the files touched."""
    touched = [change(folder, diff) for diff in blocks("diff", section)]
    for text in blocks("python", section) + blocks("yaml", section):
        name = re.match(r"# ([\w/]+\.(?:py|yaml))", text)
        assert name is not None
        assert not (folder / name[1]).exists()
        (folder / name[1]).write_text(text)
        touched.append(name[1])
    return touched


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what trains."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("files", "layers", "stochastic_depth", "models", "training", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    return folder


def test_what_the_page_adds_is_trained_with(copy: Path) -> None:
    assert list(SECTIONS) == ["A token mixer", "A schedule", "A kind of data", "A metric", "All at once"]
    touched = {title: apply(copy, text) for title, text in SECTIONS.items()}
    assert [len(files) for files in touched.values()] == [2, 1, 2, 1, 0], "a token mixer: three files at most"

    (block,) = blocks("bash", SECTIONS["All at once"])
    python, *arguments = shlex.split(block.replace("\\\n", ""))
    assert python == "python"
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = copy / "runs" / "new"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["drop_path"]["schedule"]["kind"] == "hill" and config["data"]["class_names"] == [
        "horizontal",
        "vertical",
    ]
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 < float(row["val_brier"]) <= 2 for row in rows)
    assert "Brier score" in (run / "report.html").read_text() and "Brier score" in done.stdout
    assert "break_even" in config["drop_path"] and config["model"]["name"] == "shiftformer_n4"


def test_links() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
