"""The report's command line.

python -m training.report RUN            writes RUN/report.html again
python -m training.report RUN RUN ...    sets runs side by side, in comparison.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from files.errors import ConfigError, run_command
from files.outputs import refuse_overwriting
from training.report.page import write_comparison, write_report
from training.run_folder import RunFolder

COMPARISON = Path("comparison.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description="Pages of runs, from their folders.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are set side by side")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page; default: report.html in the run folder, or {COMPARISON} here for several runs. What is there "
        "is replaced",
    )
    given = parser.parse_args(arguments)

    def write() -> int:
        _refuse_to_overwrite(given.output, given.runs)
        if len(given.runs) == 1:
            print(write_report(given.runs[0], given.output))
        else:
            _check_different(given.runs)
            print(write_comparison(given.runs, given.output or COMPARISON))
        return 0

    return run_command(write)


def _refuse_to_overwrite(output: Path | None, runs: Sequence[Path]) -> None:
    """Refuses a page in the place of a file that a run is made of; its old page may be replaced.

    Raises:
        ConfigError: Naming it.
    """
    if output is not None:
        folders = [RunFolder(run) for run in runs]
        kept = [
            (file, f"is the run's own file, of {f.path}") for f in folders for file in f.own_files() if file != f.report
        ]
        refuse_overwriting(f"--output {output}", output, kept)


def _check_different(runs: Sequence[Path]) -> None:
    """Refuses a run that is named twice.

    Raises:
        ConfigError: Naming it.
    """
    seen = set()
    for run in runs:
        if run.resolve() in seen:
            raise ConfigError(f"run {str(run)!r}: given twice; name each run once")
        seen.add(run.resolve())


if __name__ == "__main__":
    sys.exit(main())
