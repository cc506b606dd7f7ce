"""The report's command line.

python -m training.report RUN                                  writes RUN/report.html again
python -m training.report --compare RUN1 RUN2 --output FILE    overlays runs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from files.errors import run_command
from training.report.page import write_comparison, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description="Pages of runs, from their folders.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run folder whose report.html is written again")
    what.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="run folders to overlay; needs --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page that --compare writes")
    given = parser.parse_args(arguments)
    if (given.compare is None) != (given.output is None):
        parser.error("--compare and --output go together")

    def write() -> int:
        print(write_report(given.run) if given.compare is None else write_comparison(given.compare, given.output))
        return 0

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
