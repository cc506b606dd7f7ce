"""Evaluates models on data: `python validate.py MODEL [MODEL ...] [key=value ...]`, the same under torchrun."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from files.errors import ConfigError, run_command
from files.outputs import is_same
from training.data.section import DataSection
from training.evaluating.block_tables import STUDY_FILES, describe_study, write_study
from training.evaluating.blocks import parse_wanted, study_blocks
from training.evaluating.corruptions import parse_corruptions
from training.evaluating.mc import MonteCarlo
from training.evaluating.options import add_compute_options, add_weights_options, choice_of, compute_of, split_words
from training.evaluating.part import WantedData
from training.evaluating.results import (
    DETAILS,
    ResultsFile,
    check_folder,
    describe,
    folder_in,
    folder_of,
    folders_of,
    write_details,
)
from training.evaluating.validation import Request, files_given, validate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of validate.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("words", nargs="+", metavar="MODEL|key=value", help="runs, weights or names; keys of data")
    add_weights_options(parser)
    data = parser.add_argument_group("data; default: those of the model's run")
    data.add_argument("--config", type=Path, metavar="FILE", help="a training config whose data to take")
    data.add_argument("--images", type=Path, metavar="FOLDER", help="instead: a folder of CLASS/*.jpg, taken whole")
    data.add_argument("--split", choices=("val", "test", "train"), default="val", help="which part; default: val")
    data.add_argument(
        "--flip", action="store_true", help="mean of the probabilities of each image and its mirror image"
    )
    data.add_argument(
        "--corrupt", action="append", default=[], metavar="NAME[:1-5]", help="make the images worse; or all"
    )
    depth = parser.add_argument_group("depth afterwards")
    depth.add_argument(
        "--drop-blocks", metavar="one|greedy[:N]|LIST", help="instead: accuracy and latency without residual blocks"
    )
    depth.add_argument(
        "--mc", type=int, metavar="K", help="beside it the mean of K passes with drop path as in training"
    )
    depth.add_argument(
        "--mc-rate", type=float, metavar="P", help="its largest rate; default: the rates of the model's run"
    )
    add_compute_options(parser)
    told = parser.add_argument_group("results")
    told.add_argument("--output", type=Path, metavar="DIR", help="metrics, classes, confusion and mistakes, as files")
    told.add_argument("--results", type=Path, metavar="FILE.csv", help="add a row per evaluation, timm's columns first")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed while running, 2 a mistake in what was given."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for ours in ("models", "training"):
        logging.getLogger(ours).setLevel(logging.INFO)
    return run_command(lambda: evaluate(args))


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for.

    Raises:
        ConfigError: What can be known to be wrong without looking at a model or data.
    """
    models, overrides = split_words(args.words)
    if args.mc_rate is not None and args.mc is None:
        raise ConfigError("--mc-rate: is of --mc K, the number of passes; give both")
    return Request(
        models,
        choice_of(args),
        WantedData(args.config, overrides, args.images, args.split, args.batch_size, args.workers),
        compute_of(args),
        flip=args.flip,
        corruptions=parse_corruptions(args.corrupt),
        mc=None if args.mc is None else MonteCarlo(args.mc, args.mc_rate),
    )


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates, prints and writes."""
    request = request_of(args)
    if args.drop_blocks is not None:
        return drop_blocks(args, request)
    results = ResultsFile(args.results) if args.results else None
    alone = len(request.models) == 1 and len(request.corruptions) <= 1 and request.mc is None

    def check(sections: Sequence[DataSection]) -> None:
        kept = files_given(request, sections)
        if results is not None:
            results.check(kept)
        if args.output is not None:
            files = [folder / name for folder in folders_of(args.output, request, alone=alone) for name in DETAILS]
            if args.results is not None and any(is_same(args.results, file) for file in files):
                raise ConfigError(f"--results {args.results}: is one of the files of --output as well; name two places")
            check_folder(args.output, files, kept)

    for evaluation in validate(request, check=check):
        print(describe(evaluation), flush=True)
        if results is not None:
            results.add(evaluation)
        if args.output is not None:
            write_details(evaluation, folder_of(args.output, evaluation, alone=alone))
    return 0


def drop_blocks(args: argparse.Namespace, request: Request) -> int:
    """Measures without blocks, prints and writes."""
    if args.results is not None:
        raise ConfigError("--results: holds whole models; what --drop-blocks measures goes to --output")

    def folder_of_study(text: str) -> Path:
        return args.output if len(request.models) == 1 else folder_in(args.output, text)

    def check(sections: Sequence[DataSection]) -> None:
        if args.output is not None:
            files = [folder_of_study(text) / name for text in request.models for name in STUDY_FILES]
            check_folder(args.output, files, files_given(request, sections))

    for study in study_blocks(request, parse_wanted(args.drop_blocks), check=check):
        print(describe_study(study), flush=True)
        if args.output is not None:
            write_study(study, folder_of_study(study.text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
