"""How cost grows: the parts that take no long runs."""

from pathlib import Path

import pytest

from benchmarks.scale import image_tree, start_up, write_table


def test_a_tree_has_as_many_images_as_asked_for() -> None:
    with image_tree(100) as root:
        files = [path.relative_to(root).parts for path in root.rglob("*.JPEG")]
        assert sum(parts[0] == "train" for parts in files) == 100 and len({parts[1] for parts in files}) == 2
        lines = write_table(root, "train").read_text().splitlines()
        assert len(lines) == 101 and lines[1].startswith("train/n00000000/") and lines[1].endswith(",n00000000")
    assert not Path(root).exists()


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_start_up_is_measured_by_its_parts(kind: str) -> None:
    row = start_up(kind, 100)
    assert row["images"] == 200 and row["seconds"].keys() == {"data", "batch", "check"}
    assert row["peak_mb"] >= row["libraries_mb"] > 0
