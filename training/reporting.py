"""The end of a run: what its report needs of the data is measured once, and the page is written.

The report tells of a run and can be made again at any time, so that its failure is not the run's.
"""

import shlex
import sys
from collections.abc import Callable

from files.durable import save_text
from files.strict_json import json_text
from training.console import StopSignals
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress


def write_report(setup: Setup, folder: RunFolder, progress: Progress, *, signals: StopSignals) -> bool:
    """evaluation.json and report.html, where the config wants them; every process calls it.

    A run that a signal ended has no time left: its page shows what is there.

    Returns:
        Whether the page was made, by this process.
    """
    if not setup.config.log.report:
        return False
    main = setup.world.is_main
    if not setup.world.any(signals.received is not None):
        _attempt(lambda: _measure(setup, folder, progress, signals), "the report shows no predictions", say=main)
    if main:
        again = f"; to make it: python -m training.report {shlex.quote(str(folder.path))}"
        return _attempt(lambda: _draw(folder), "no report", again)
    return False


def _measure(setup: Setup, folder: RunFolder, progress: Progress, signals: StopSignals) -> None:
    from training.evaluating.evidence import measure

    found = measure(setup, signals=signals)
    if found is not None and setup.world.is_main:
        save_text(folder.evaluation, json_text({"epoch": progress.epoch, **found}, indent=None))


def _draw(folder: RunFolder) -> None:
    from training.report.page import write_report  # matplotlib and jinja2, which nothing else of a run needs

    write_report(folder.path)


def _attempt(work: Callable[[], None], what: str, rest: str = "", *, say: bool = True) -> bool:
    """Does it, or says on the main process in a line why not; returns whether it was done."""
    try:
        work()
        return True
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if say:
            print(f"warning: {what}: {reason}{rest}", file=sys.stderr)
        return False
