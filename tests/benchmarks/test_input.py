"""Images per second beside timm."""

import io
import json
from pathlib import Path

import pytest

from benchmark import main
from benchmarks.input import POLICY, photograph


def test_pictures_are_as_large_as_those_of_imagenet() -> None:
    file = io.BytesIO()
    image = photograph(0)
    image.save(file, "JPEG", quality=90)
    assert image.size == (500, 375) and 50_000 < len(file.getvalue()) < 110_000
    assert image != photograph(1)


@pytest.mark.slow
def test_every_side_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "input.json"
    options = ["--rounds", "2", "--images", "4", "--batch-size", "2", "--size", "32", "--output", str(output)]
    assert main(["input", *options]) == 0
    told = json.loads(output.read_text())
    for policy in ("none", POLICY):
        rows = told["results"][policy]
        assert list(rows) == ["timm", "timm without prefetcher", "ours, torchcodec", "ours, pillow"]
        assert rows["timm"]["over_timm"] == 1 and all(row["images_per_cpu_second"] > 0 for row in rows.values())
    assert told["machine"] and 50 < told["jpeg_kilobytes"] < 110
    assert "(wanted: 1.6)" in capsys.readouterr().out
