"""Numbers and the words behind them."""

import pytest

from files.words import counted


@pytest.mark.parametrize(
    ("count", "noun", "told"),
    [(1, "epoch", "1 epoch"), (0, "epoch", "0 epochs"), (2, "class", "2 classes"), (1, "class", "1 class"),
     (5, "batch", "5 batches"), (3, "entry", "3 entries"), (2, "process", "2 processes"), (1.0, "epoch", "1 epoch"),
     (1.5, "epoch", "1.5 epochs"), (1437, "training image", "1,437 training images"), (21841, "class", "21,841 classes")],
)  # fmt: skip
def test_one_is_singular_and_all_else_plural(count: float, noun: str, told: str) -> None:
    assert counted(count, noun) == told
