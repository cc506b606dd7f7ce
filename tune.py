"""Finds the drop-path rate of a training config: `python tune.py --config FILE [key=value ...]`. The same command goes on
with a study that was stopped, and helps one that runs."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import json
import os
import sys
from pathlib import Path

from files.errors import ConfigError, run_command
from files.words import counted
from tuning import advice_command
from tuning.config import MOST_JOBS, StudyConfig, dump_study, json_schema, load_study
from tuning.opening import check_base, check_folder, default_folder, describe_study, open_study, warn
from tuning.units import forget_failures
from tuning.worker import end_helpers, finish, share_of_threads, start_helpers, stop_with, work


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of tune.py, but for `tune.py advise`."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, epilog="python tune.py advise --help: a rate without a search"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the study, or of its training config")
    parser.add_argument("--config", type=Path, help="a YAML of configs/tune; default: the handwritten digits")
    parser.add_argument("--output", type=Path, help="the study's folder; default: runs/tune-NAME; one there goes on")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes on this machine; default: the config's")
    parser.add_argument("--print-config", action="store_true", help="print the whole config of the study and stop")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema of a study and stop")
    parser.add_argument("--dry-run", action="store_true", help="check all, print the plan, leave nothing behind")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one that --jobs started
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # by which process
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done or saved, 1 failed while running, 2 a mistake in what was given."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["advise"]:
        return advice_command.main(argv[1:])
    args = parse_args(argv)
    # of a study the folder holds what came of it: a log that cannot be written does not make it fail
    return run_command(lambda: tune(args), printed=args.print_config or args.json_schema or args.dry_run)


def tune(args: argparse.Namespace) -> int:
    """Prints the config, its schema or the plan, or works on the study."""
    if args.json_schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    study = load_study(args.config, args.overrides)
    jobs = study.tune.jobs if args.jobs is None else args.jobs
    if not 1 <= jobs <= MOST_JOBS:
        raise ConfigError(f"--jobs: must be from 1 to {MOST_JOBS}, got {jobs}")
    folder = args.output or default_folder(study)
    if args.print_config:
        print(dump_study(study.tune), end="")
        return 0
    if args.dry_run:
        check_folder(study, folder)
        print(describe_study(study, folder, check_base(study)))
        return 0
    return search(study, folder, jobs, args)


def search(study: StudyConfig, folder: Path, jobs: int, args: argparse.Namespace) -> int:
    """Works on the study to its end, or until a signal."""
    if not args.worker:
        check_folder(study, folder)
        setup = check_base(study)
        plan = describe_study(study, folder, setup)
        del setup
    opened = open_study(study, folder)
    if args.worker:
        if args.parent is not None:
            stop_with(args.parent)
        work(opened, bar=False)
        return 0
    print(plan, flush=True)
    cores = os.cpu_count() or 1
    if jobs > cores:
        warn(f"{jobs} processes share {counted(cores, 'core')}; more than one per core gain nothing")
    if again := forget_failures(opened.folder.units):
        print(f"trying again {counted(again, 'run')} that failed")
    threads = share_of_threads(study, jobs)
    given = [*(["--config", str(args.config)] if args.config else []), *args.overrides]
    own = ["--jobs", "1", "--worker", "--parent", str(os.getpid())]
    command = [sys.executable, __file__, *given, "--output", str(folder), *own]
    helpers = start_helpers(command, jobs - 1, threads=threads)
    stopped = "an error"
    try:
        stopped = work(opened, threads=threads)
    finally:
        failed = end_helpers(helpers, stop=stopped is not None)
    if stopped is not None:
        print(f"{stopped}: the study is saved in {folder}; the same command goes on")
        return 0
    if failed:
        warn(f"{failed} of the processes ended with an error, see above")
    print(finish(opened))
    return 0


if __name__ == "__main__":
    sys.exit(main())
