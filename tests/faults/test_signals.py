"""Signals in each phase of a run: it ends with exit code 0, and a run that goes on from there ends as one without them."""

import signal
from pathlib import Path

import pytest

from tests.faults.parts import TINY, Zygote, read_metrics, same_result, steps, summary

pytestmark = pytest.mark.slow

# What makes a hook send SIGTERM to its own process as a phase begins.
PHASES = {
    "building": "before('training.run', 'build')",
    "checking": "before('training.setup', 'check_images')",
    "first files": "before('training.loop', '_start_files')",
    "first step": "at_step(0)",
    "mid-epoch": "at_step(7)",
    "last step": "at_step(14)",
    "validation": "before('training.loop', 'evaluate')",
    "save": "before('training.checkpoint', '_write_manifest')",
    "report": "before('training.report.page', 'write_report')",
}
TELL = """
import importlib, os, signal
told = []
SIGNALS = [signal.SIGTERM]
def tell():
    if not told:
        told.append(1)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
def before(module, name):
    module = importlib.import_module(module)
    real = getattr(module, name)
    setattr(module, name, lambda *a, **k: (tell(), real(*a, **k))[1])
def at_step(number):
    from training import loop as m
    real = m.train_step
    def step(setup, trained, batches, progress, **options):
        if progress.step == number:
            tell()
        return real(setup, trained, batches, progress, **options)
    m.train_step = step
"""


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm(phase: str, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = zygote.run(
        *TINY, "--output", folder, cwd=tmp_path, hook=TELL + PHASES[phase], report=phase == "report"
    ).fine()
    if phase in ("building", "checking"):
        assert "SIGTERM: stopped before the first step" in done.out and not (folder / "config.yaml").exists()
    elif phase == "report":
        assert "report" in done.out
        same_result(folder, whole)
    else:
        assert "SIGTERM: saved" in done.out and steps(folder), done.out
        expected = {"first files": 1, "first step": 1, "mid-epoch": 8, "last step": 15, "validation": 5, "save": 5}
        stopped = summary(folder)["steps"]
        # a save goes on beside the training, which on a busy machine may be a step ahead when the signal comes
        assert stopped == expected[phase] or (phase == "save" and stopped == 6)
    if phase == "validation":
        assert not (folder / "metrics.csv").exists(), "what was not measured is not noted"
    zygote.run(*TINY, "--output", folder, "--resume", "auto", cwd=tmp_path).fine()
    same_result(folder, whole)


def test_a_second_signal_during_the_save(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*TINY, "checkpoint.every_epochs=null"]
    # the first in the step, two more while it is saved for that
    again = TELL.replace("told", "again").replace("tell", "tell_again").replace("[signal", "[signal.SIGUSR1, signal")
    hook = TELL + "at_step(6)\n" + again + PHASES["save"]
    done = zygote.run(*settings, "--output", folder, cwd=tmp_path, hook=hook).fine()
    assert "saved" in done.out and steps(folder) == [7]
    zygote.run("--resume", folder, cwd=tmp_path).fine()
    same_result(folder, whole)


def test_ctrl_c_twice(zygote: Zygote, tmp_path: Path) -> None:
    """The second one does not wait for the step; it costs a line and no traceback."""
    hook = TELL.replace("[signal.SIGTERM]", "[signal.SIGINT, signal.SIGINT]") + "at_step(6)"
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    assert done.code == 130 and done.err.endswith("stopped by Ctrl-C\n")
    done.check()
    assert steps(tmp_path / "run") == [5]


def test_sigterm_to_a_dry_run(zygote: Zygote, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    done = zygote.run(
        *TINY, "--dry-run", "--output", tmp_path / "run", cwd=tmp_path, hook=TELL + PHASES["checking"]
    ).fine()
    assert done.out.endswith("SIGTERM: stopped\n") and set(tmp_path.iterdir()) == before


def test_sigterm_to_a_run_that_is_done(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A kill in the last validation of a run that is gone on with leaves one row per epoch."""
    folder = tmp_path / "run"
    zygote.run(*TINY, "--output", folder, cwd=tmp_path, hook=TELL + "at_step(14)").fine()
    assert len(read_metrics(folder)) == 2
    done = zygote.run("--resume", folder, cwd=tmp_path, hook=TELL + PHASES["validation"]).fine()
    assert "SIGTERM: saved" in done.out and len(read_metrics(folder)) == 2
    zygote.run("--resume", folder, cwd=tmp_path).fine()
    same_result(folder, whole)


def test_sigusr1_stops_as_sigterm_does(zygote: Zygote, tmp_path: Path) -> None:
    run = zygote.start(*TINY, "optim.epochs=100", "--output", tmp_path / "run", cwd=tmp_path)
    run.until(lambda: steps(tmp_path / "run"))
    run.send(signal.SIGUSR1)
    assert "SIGUSR1: saved" in run.wait().fine().out
