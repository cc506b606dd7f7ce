"""The classes of images: `python predict.py MODEL PATH [PATH ...]`; PATH is an image, a folder, or - for paths on stdin."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import logging
import sys
from pathlib import Path

from files.errors import run_command
from training.evaluating.options import add_compute_options, add_weights_options, choice_of, compute_of
from training.evaluating.output import Wanted, predict
from training.evaluating.prediction import PredictRequest
from training.evaluating.tables import FORMATS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of predict.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("subject", metavar="MODEL", help="a run, weights, or a model's name")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image, a folder of images, or - for stdin")
    add_weights_options(parser)
    told = parser.add_argument_group("predictions")
    told.add_argument("--topk", type=int, default=5, metavar="K", help="classes per image; default: 5")
    told.add_argument(
        "--flip", action="store_true", help="mean of the probabilities of each image and its mirror image"
    )
    told.add_argument("--format", choices=FORMATS, help="default: table, or what --output ends in")
    told.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    told.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="thumbnails with their classes, as pictures"
    )
    add_compute_options(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 an image was not read, 2 a mistake in what was given."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    return run_command(lambda: show(args))


def request_of(args: argparse.Namespace) -> PredictRequest:
    """What the command line asks for.

    Raises:
        ConfigError: What can be known to be wrong without looking at a model or images.
    """
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    return PredictRequest(
        args.subject, args.paths, choice_of(args), compute_of(args), topk=args.topk, flip=args.flip, **loading
    )


def show(args: argparse.Namespace) -> int:
    """Predicts, and prints or writes each row as it comes."""
    return predict(request_of(args), Wanted(args.format, args.output, args.contact_sheet))


if __name__ == "__main__":
    sys.exit(main())
