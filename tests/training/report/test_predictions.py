"""evaluation.json: read, refused, and what follows from its counts."""

import json
import math
from pathlib import Path

import pytest

from training.report.predictions import Confused, Evidence, read_evidence

COUNTS = {
    "epoch": 3,
    "samples": 20,
    "classes": ["cat", "dog", "hen", "unseen"],
    "pairs": [[0, 0, 8], [0, 1, 2], [1, 1, 4], [1, 2, 2], [2, 0, 1], [2, 3, 3]],
    "bins": [[0, 0, 0], [8, 3, 4.0], [12, 9, 10.5]],
}


def test_what_follows_from_the_counts() -> None:
    told = Evidence.model_validate(COUNTS)
    assert [(each.name, each.samples, each.hits) for each in told.per_class()] == [
        ("cat", 10, 8),
        ("dog", 6, 4),
        ("hen", 4, 0),
    ]
    assert [each.recall for each in told.per_class()] == pytest.approx([80, 200 / 3, 0])
    assert [each.name for each in told.weakest(2)] == ["hen", "dog"]
    assert told.wrong == 8
    assert told.worst_pairs(2) == [Confused("hen", "unseen", 3, 0.75), Confused("dog", "hen", 2, 1 / 3)]
    assert [pair.count for pair in told.worst_pairs(9)] == [3, 2, 2, 1]
    assert told.calibration() == pytest.approx((100 * (1.0 + 1.5) / 20, 72.5, 60))


def test_what_has_no_prediction_is_wrong() -> None:
    told = Evidence.model_validate(COUNTS | {"samples": 25})
    assert told.wrong == 13


def test_without_samples() -> None:
    told = Evidence.model_validate(COUNTS | {"pairs": [], "bins": [], "samples": 0})
    assert told.per_class() == told.worst_pairs(3) == told.weakest(3) == [] and told.wrong == 0
    assert all(map(math.isnan, told.calibration()))


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": [[0, 4, 1]]},
        {"pairs": [[0, -1, 1]]},
        {"classes": 3},
        {"batch": [{"image": "https://example.org/a.png", "labels": []}]},
        {"batch": [{"image": 'data:image/png;base64,AA" onerror="x', "labels": []}]},
    ],
)
def test_what_is_damaged_is_left_out_and_said(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    notes: list[str] = []
    assert read_evidence(path, notes) is None and notes == []
    path.write_text(json.dumps(COUNTS))
    assert read_evidence(path, notes) is not None and notes == []
    path.write_text(json.dumps(COUNTS | change))
    assert read_evidence(path, notes) is None
    assert notes == ["evaluation.json is damaged and was left out."]


@pytest.mark.parametrize("text", [b"", b'{"epoch": 3', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_no_json_is_left_out_and_said(text: bytes, tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "evaluation.json").write_bytes(text)
    assert read_evidence(tmp_path / "evaluation.json", notes) is None and len(notes) == 1
