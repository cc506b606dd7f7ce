"""The work of one process on a study: decide what is next, train it, tell; until nothing is left, or a signal.

A worker is any process that runs the same command on the same folder; `jobs: N` starts N of them here. They meet in two
locks. The study's is held for moments, while one of them decides; in that moment it takes the lock of the run folder of the
unit it will train, and holds that to the end of the run. So no unit is trained twice; and where a worker is killed, both are
free at once, and another goes on from the unit's last checkpoint. Where a process on another machine is to help, both must
see the same folder, on a file system whose locks hold between them, and `storage` names a database.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from files.errors import ConfigError, Failure
from files.lock import locked
from files.words import counted
from training.console import StopSignals
from training.threads import number_of_threads
from tuning.config import StudyConfig
from tuning.links import Finalist
from tuning.opening import Opened
from tuning.plan import Next, in_words
from tuning.race import Decision
from tuning.study import Trial
from tuning.units import Unit, make_unit_folder, read_failure, train_unit
from tuning.verdict import check_metric

POLL_SECONDS = 1.0
"""Between two looks at what the others do."""


class Console:
    """A line per unit, and where there is a terminal a bar over all of them.

    Args:
        bar: Whether there may be one.
    """

    def __init__(self, *, bar: bool = True) -> None:
        self.bar: Any = None
        if bar and sys.stderr.isatty():
            self.bar = tqdm(unit="run", dynamic_ncols=True, file=sys.stderr)
        self.done = 0
        self.waiting = ""

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def show(self, after: Next) -> None:
        """What is left, in the bar."""
        if self.bar is not None:
            self.bar.total = self.done + after.left
            self.bar.n = self.done
            self.bar.refresh()

    def wait(self, words: str) -> None:
        """Says what is waited for, once."""
        if words != self.waiting:
            self.waiting = words
            if words:
                self.write(words)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def work(opened: Opened, *, threads: int | None = None, bar: bool = True) -> str | None:
    """Trains units until none is left, or until a signal; the study can be gone on with at any time.

    Args:
        opened: The study.
        threads: Of a run whose config leaves their number to the machine.
        bar: Show a progress bar, where there is a terminal.

    Returns:
        None when nothing is left to train; the signal's name where one came.

    Raises:
        Failure: All trials failed, or the storage cannot be reached any more.
    """
    console = Console(bar=bar)
    try:
        with StopSignals() as signals:
            while signals.received is None:
                with contextlib.ExitStack() as claim:
                    with opened.alone():
                        after = opened.plan.update()
                        unit = _claim(opened, after, claim)
                    console.show(after)
                    if signals.received is not None:
                        break
                    if unit is None:
                        if not after.running and not after.now:
                            return None
                        console.wait(f"waiting for {counted(after.running, 'run')} of other processes")
                        time.sleep(POLL_SECONDS)
                        continue
                    console.wait("")
                    start = time.monotonic()
                    stopped = train_unit(unit, threads=threads)
                    if stopped is not None:
                        signals.ask(stopped)
                        break
                    verdict = opened.study.tune.verdict
                    if verdict is not None and unit.seed >= verdict.first_seed and read_failure(unit.folder) is None:
                        _score(opened, unit)
                console.done += 1
                line = _line(opened, unit, after, seconds=time.monotonic() - start)
                console.write(line)
            return signals.received
    except OSError as error:  # a disk that is full or gone
        where = f": {error.filename}" if error.filename else ""
        raise Failure(f"{error.strerror or error}{where}\nthe study is intact, start it again") from error
    finally:
        console.close()


def _claim(opened: Opened, after: Next, claim: contextlib.ExitStack) -> Unit | None:
    """The next unit, its folder locked; Optuna is asked for a trial where it is time. The study's lock is held."""
    while after.may_ask and not after.now:
        opened.plan.search.ask()
        renewed = opened.plan.update()
        vars(after).update(vars(renewed))
    for unit in [*after.now, *after.spare]:
        make_unit_folder(unit.folder)
        try:
            claim.enter_context(locked(unit.folder))
        except ConfigError:  # a run that was started there by hand
            continue
        return unit
    return None


def _score(opened: Opened, unit: Unit) -> float | None:
    """The score of a unit of the final, which is kept in its folder; None where it cannot be had."""
    verdict, metric = opened.study.tune.verdict, opened.study.tune.objective.metric
    assert verdict is not None
    try:
        return opened.links.score_unit(unit.folder, verdict.split, check_metric(metric))
    except (ConfigError, Failure) as error:
        print(f"warning: {unit.folder} cannot be scored: {error}", file=sys.stderr)
        return None


def _line(opened: Opened, unit: Unit, after: Next, *, seconds: float) -> str:
    """What became of a unit."""
    digest = unit.folder.parent.name
    trial = next((t for t in after.trials if t.digest == digest), None)
    fresh = opened.plan.verdict_seeds[:1]
    if fresh and unit.seed >= fresh[0]:
        roles = [f.role for f in after.finalists if f.digest == digest]
        who = f"final {'winner' if 'winner' in roles else '/'.join(roles)}"
    else:
        who = f"trial {trial.number}" if trial else digest
    words = in_words(trial.parameters) if trial else f"rate {unit.config.drop_path.rate or 0:.3g}"
    failure = read_failure(unit.folder)
    metric = opened.study.tune.objective.metric
    if failure is None:
        try:
            told = f"{metric} {unit.score(metric).value:.4g}"
        except Failure as error:
            failure = str(error)
            told = ""
    if failure is not None:
        told = f"failed: {failure.splitlines()[0]}"
    left = max(0, after.left - 1)
    return f"{who}  {words}  seed {unit.seed}  {told}  {seconds:.1f} s  {counted(left, 'run')} left"


# ---- the end ------------------------------------------------------------------------------------------------------


def finish(opened: Opened) -> str:
    """Verdict, best.yaml and report of a study whose units are all done; what to print.

    Raises:
        Failure: No trial, or no winner's run on fresh seeds, came to its end.
    """
    tune = opened.study.tune
    with opened.alone():
        after = opened.plan.update()
        if after.now or after.may_ask or after.winner is None:  # another start gave it more to do
            return "the study has more to do: start it again"
        winner = next(p for p in opened.plan.search.proposals() if p.number == after.winner)
        config = opened.plan.config_of(winner)
        sentence = "No final was run: the winner of the search is the best of what was tried, by luck or not."
        if tune.verdict is not None:
            scores = {trial.number: trial.scores for trial in after.trials if trial.state != "failed"}
            finalists = _scored(opened, opened.plan.finalists_of(winner, scores))
            if not any(f.role == "winner" and f.scores for f in finalists):
                raise Failure(
                    f"the winner, trial {winner.number}, failed on all fresh seeds; "
                    f"see {opened.folder.unit(winner.digest, 0).parent}"
                )
            metric = check_metric(tune.objective.metric)
            verdict = opened.links.conclude(opened.folder, finalists, metric, tune.verdict.split)
            sentence = str(verdict["sentence"])
            role = str(verdict.get("recommended", "winner"))
            config = next((f.config for f in finalists if f.role == role), config)
        opened.plan.note([Decision("the study is at its end", sentence)])
        opened.links.write_best(opened.folder, config, sentence)
        opened.links.write_report(opened.folder.path)
    report = opened.folder.report
    lines = [
        table(after.trials, tune.objective.metric),
        *([sentence] if tune.verdict is not None else []),
        f"best: {opened.folder.best}" + (f"; report: {report}" if report.exists() else ""),
    ]
    return "\n".join(lines)


def _scored(opened: Opened, finalists: Sequence[Finalist]) -> list[Finalist]:
    """The finalists with the scores of all units that did not fail, and how many did."""
    scored = []
    for one in finalists:
        scores = {}
        for seed in opened.plan.verdict_seeds:
            unit = opened.plan.unit(one.config, one.digest, seed)
            value = _score(opened, unit) if unit.state == "done" else None
            if value is not None:
                scores[seed] = value
        failed = len(opened.plan.verdict_seeds) - len(scores)
        scored.append(replace(one, scores=scores, failed=failed))
        if failed:
            what = f"{failed} of {failed + len(scores)} runs of the final failed: {one.role}"
            opened.plan.note([Decision(what, "they are not counted, and the verdict says so")])
    return scored


def table(trials: Sequence[Trial], metric: str) -> str:
    """The race as a table, the winner first, then those who came furthest."""
    rank = {"winner": 0, "racing": 1, "dropped": 2, "waiting": 3, "failed": 4}

    def order(trial: Trial) -> tuple[int, int, int]:
        return rank[trial.state], -len(trial.scores), trial.number

    head = ("trial", "seeds", metric, "state", "from", "parameters")
    rows = [
        (
            str(trial.number),
            str(len(trial.scores)),
            f"{trial.mean:.4g}" if trial.scores else "-",
            trial.state,
            trial.origin,
            in_words(trial.parameters),
        )
        for trial in sorted(trials, key=order)
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows])
    return "\n".join(line.rstrip() for line in lines)


# ---- several processes --------------------------------------------------------------------------------------------


def share_of_threads(study: StudyConfig, jobs: int) -> int | None:
    """Threads of each of so many processes; None for one alone, or where the config or the environment says."""
    if jobs == 1 or os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, number_of_threads("auto") // jobs)


def start_helpers(command: Sequence[str], count: int, *, threads: int | None) -> list[subprocess.Popen[bytes]]:
    """Further processes that work on the same study.

    Args:
        command: Of one of them.
        count: How many.
        threads: Of each.
    """
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    return [subprocess.Popen(command, env=environment) for _ in range(count)]


def stop_with(parent: int) -> None:
    """In a helper: it is told to stop, and saves what it does, when the process that started it is gone.

    One that is killed ends nobody, and its helpers would work on, which who starts the study again does not expect.

    Args:
        parent: Its id.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="parent", daemon=True).start()


def end_helpers(helpers: Sequence[subprocess.Popen[bytes]], *, stop: bool) -> int:
    """Waits for the others, who save what they do where they are told to stop; returns how many failed."""
    failed = 0
    if stop:
        for helper in helpers:
            with contextlib.suppress(ProcessLookupError):
                helper.send_signal(signal.SIGTERM)
    for helper in helpers:
        failed += helper.wait() != 0
    return failed
