"""The options that validate.py and predict.py share."""

import argparse
from pathlib import Path

import pytest

from files.errors import ConfigError
from training.evaluating.options import add_compute_options, add_weights_options, choice_of, compute_of, split_words
from training.evaluating.subject import Choice
from training.evaluating.validation import Compute


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_weights_options(parser)
    add_compute_options(parser)
    return parser.parse_args(words)


def test_what_they_say() -> None:
    assert (choice_of(parsed()), compute_of(parsed())) == (Choice(), Compute())
    args = parsed("--no-ema", "--image-size", "32", "--crop-pct", "0.9", "--device", "cpu", "--precision", "bfloat16")
    assert choice_of(args) == Choice(ema=False, image_size=32, crop_pct=0.9)
    assert compute_of(args) == Compute("cpu", "bfloat16")
    assert choice_of(parsed("--checkpoint", "last", "--model", "m")) == Choice("last", model="m")
    assert choice_of(parsed("--pretrained")).pretrained


def test_models_and_keys(tmp_path: Path) -> None:
    odd = tmp_path / "lr=3"
    odd.mkdir()
    assert split_words(["a", "data.root=x", "b", str(odd)]) == (["a", "b", str(odd)], ["data.root=x"])
    for words, told in ((["data.root=x"], "which model"), (["a", "b", "a"], "a: is given twice")):
        with pytest.raises(ConfigError, match=told):
            split_words(words)
