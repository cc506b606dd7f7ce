"""What the command lines of `validate.py` and `predict.py` have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from files.errors import ConfigError
from training.evaluating.subject import Choice
from training.evaluating.validation import PRECISIONS, Compute


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, and the size of images."""
    group = parser.add_argument_group("weights; MODEL is a run, a folder or file of weights, or a model's name")
    group.add_argument(
        "--checkpoint", choices=("best", "last"), help="of a run: its best epoch (default), or its newest"
    )
    group.add_argument("--no-ema", action="store_true", help="of a run: the raw weights of the newest checkpoint")
    group.add_argument("--pretrained", action="store_true", help="of a model's name: its published weights")
    group.add_argument("--model", metavar="NAME|YAML", help="of weights that do not say it: the model they are of")
    group.add_argument("--image-size", type=int, metavar="N", help="pixels; default: the model's")
    group.add_argument(
        "--crop-pct", type=float, metavar="F", help="share kept by the centre crop; default: the model's"
    )


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """How images are read, and where the model runs."""
    group = parser.add_argument_group("speed")
    group.add_argument("--batch-size", type=int, metavar="N", help="images at a time, per process")
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images; results do not depend on it"
    )
    group.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="default: that of the run where the device is fast at it, else float32"
    )


def choice_of(args: argparse.Namespace) -> Choice:
    """What the options of `add_weights_options` say."""
    return Choice(args.checkpoint, not args.no_ema, args.pretrained, args.model, args.image_size, args.crop_pct)


def compute_of(args: argparse.Namespace) -> Compute:
    """What the options of `add_compute_options` say of device and precision."""
    return Compute(args.device, args.precision)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What was given without an option: models, and KEY=VALUE. What is there as a file or folder is a model.

    Raises:
        ConfigError: There is no model, or one is given twice.
    """
    models = [word for word in words if "=" not in word or os.path.exists(word)]
    if not models:
        raise ConfigError("which model? give a run folder, weights, or a model's name")
    if len(set(models)) < len(models):
        raise ConfigError(f"{next(m for m in models if models.count(m) > 1)}: is given twice")
    return models, [word for word in words if word not in models]
