"""The benchmark of the inference form."""

import argparse

import pytest

from benchmarks import fold
from models.registry import is_model


def test_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "compare_speed", lambda model, folded, batch, rounds: (10.0, 12.5))
    (row,) = fold.fold_benchmark(argparse.Namespace(models=["caformer_n4"], batch=1, rounds=1))["rows"]
    assert row["model"] == "caformer_n4" and row["speedup"] == 1.25
    assert 0 <= row["largest_relative_error"] < 1e-4
    assert all(map(is_model, fold.FOLDED))
