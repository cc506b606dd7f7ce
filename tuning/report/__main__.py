"""The command line of a study's report.

python -m tuning.report STUDY    writes STUDY/report.html again
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from files.errors import run_command
from tuning.report.page import write_study_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.report", description="The page of a study, from its folder."
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="folder whose report.html is written again")
    given = parser.parse_args(arguments)

    def write() -> int:
        print(write_study_report(given.study))
        return 0

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
