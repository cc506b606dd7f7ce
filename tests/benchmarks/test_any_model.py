"""The table of others' architectures."""

import argparse
from pathlib import Path

from benchmarks.any_model import any_model_table


def test_a_table_of_one_architecture_and_one_refusal(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ["convnext_atto", "no_such_model"]
    found, refused = any_model_table(argparse.Namespace(architectures=names, markdown=page))["rows"]
    assert (found["class"], found["branch"], found["block"], found["mask"]) == ("ConvNeXt", 12, 0, 0)
    assert found["rates"] == "equal" and not found["alarms"] and found["max_relative_deviation"] < 1e-5
    assert refused["refused"].startswith("RuntimeError: Unknown model")
    text = page.read_text()
    assert "1 architectures of 1 classes; 1 refused." in text and "| convnext_atto | ConvNeXt | 12 | 0 |" in text
