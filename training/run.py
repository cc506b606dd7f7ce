"""A run is a callable, `run`; with all that decides which run goes on, from where, and whether it may."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from files.errors import ConfigError
from files.lock import locked, refuse_locked
from files.notices import is_main_process
from training import loop
from training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from training.config import TrainConfig, load_config
from training.console import Stopped, StopSignals
from training.data.build import class_names_of_data
from training.data.loading import end_workers
from training.distributed import World, close_world, init_world, leave_words_to_main
from training.failures import explain
from training.resuming import changes, check_epochs, refuse_lost_checkpoints, same_total_batch, with_precision_of
from training.run_folder import RunFolder, changed_environment, latest_run, new_run_path
from training.setup import Setup, build, describe, on_main

Resume = None | Literal["auto"] | Path
"""None: a new run. "auto": go on with the folder, or else with the newest run of the name; begin where there is none. A
path: go on with that run folder, from its newest checkpoint, or from that checkpoint in one."""

COMPARED = tuple(name for name in TrainConfig.model_fields if name not in ("checkpoint", "log"))
"""Sections that must be as they were when a run goes on."""

# Keys that may change when a run goes on, by section: they change nothing that is learned. The data themselves are compared
# by `build`, and of another number of threads or another decoder `changed_environment` warns.
FREE_TO_CHANGE = {
    # where the data lie is free: that they are the same, their identity says
    "data": {"workers", "root", "eval_batch_size", "class_names", "on_error", "max_skipped", "decoder"}
    | {"train_file", "val_file", "test_file", "download", "train_shards", "val_shards", "cache"},
    "runtime": {"threads", "timeout_minutes", "keep_memory"},
    "optim": {"epochs", "on_non_finite", "max_non_finite"},  # epochs as far as `check_epochs` allows
    "distill": {"teacher", "pretrained", "checkpoint"},  # compared by the weights themselves
    "early_stopping": {"patience"},  # a run that was stopped may be given more
}
# and where the number of processes is another, or the total batch is by that what it was
FREE_WITH_OTHER_PROCESSES = {"optim": {"accumulate"}}


def run(
    config: TrainConfig, folder: Path | None, *, resume: Resume = None, name: str = "run", claimed: bool = False
) -> dict[str, Any]:
    """Trains a config to its end, or until a signal; alone, or as one of the processes that torchrun started.

    Args:
        config: Of a resumed run, that of the run itself (`find_config`), or one that differs in what is free to change.
        folder: Where the run is written; None: runs/NAME-TIME, or with `resume` where that says.
        resume: Whether and from where to go on.
        name: Of the folder where none is given.
        claimed: The caller holds the lock of `folder`, which is there; `resume` must be given then.

    Returns:
        The content of summary.json, `folder`, the path, and `report_made`, whether its page was made; with `stopped_by`
        instead of that where a signal ended the run early, and nothing else where that was before the first step. Empty on
        all processes but the main one.

    Raises:
        ConfigError: Whatever was given that cannot work, or another run is going on in the folder; nothing has been
            written then.
        NonFiniteError, ReadError, CheckpointError, Failure: What went wrong while running.
    """
    try:
        prepared = _prepared(config, folder, resume, name, claimed=claimed)
        with prepared as (setup, run_folder, checkpoint, claim, signals):
            world = setup.world
            on_main(world, lambda: claim.make(run_folder, fresh=resume is None))
            claim.folder = run_folder.path  # on the other processes as well, which say from where to go on
            if world.is_main:
                print(describe(setup))
                start = "" if checkpoint is None else f", going on from step {checkpoint.step}"
                print(f"run       {run_folder.path}{start}")
            signals.finish_steps()
            summary = loop.train(setup, run_folder, checkpoint, signals)
            return {**summary, "folder": run_folder.path} if world.is_main else {}
    except Stopped as stopped:
        if is_main_process():
            print(f"{stopped}: stopped before the first step; nothing is lost, start it again")
        return {"stopped_by": str(stopped)}


def dry_run(config: TrainConfig, folder: Path | None, *, resume: Resume = None, name: str = "run") -> str:
    """Builds all of a run and takes one step; leaves nothing behind. Arguments and errors as of `run`.

    Returns:
        The plan and what came of the step; empty on all processes but the main one.
    """
    try:
        with _prepared(config, folder, resume, name, writes=False) as (setup, run_folder, *_):
            on_main(setup.world, lambda: refuse_locked(run_folder.path))
            on_main(setup.world, lambda: run_folder.probe(fresh=resume is None))
            plan = describe(setup)
            result = loop.dry_run(setup)
            return f"{plan}\n{result}" if setup.world.is_main else ""
    except Stopped as stopped:
        return f"{stopped}: stopped"


class _Claim(contextlib.ExitStack):
    """The lock of the run's folder, on the main process; taken once the folder is there and held until the end.

    Attributes:
        folder: The run's, on every process, from when it is there; for a run that only looks at it, None.
    """

    folder: Path | None = None

    def take(self, folder: Path) -> None:
        if self.folder is None:
            self.enter_context(locked(folder))
            self.folder = folder

    def make(self, run_folder: RunFolder, *, fresh: bool) -> None:
        """Makes and takes the folder."""
        if self.folder is None:
            refuse_locked(run_folder.path)  # before anything else is found there
        run_folder.make(fresh=fresh)
        self.take(run_folder.path)
        if fresh and run_folder.holds_run():
            run_folder.make(fresh=True)  # another came between, and is done


class _Prepared(NamedTuple):
    setup: Setup
    folder: RunFolder
    checkpoint: Checkpoint | None
    claim: _Claim
    signals: StopSignals


@contextlib.contextmanager
def _prepared(
    config: TrainConfig, folder: Path | None, resume: Resume, name: str, *, writes: bool = True, claimed: bool = False
) -> Iterator[_Prepared]:
    """The run built, its checkpoint read and its folder found and compared with it; leaves the other processes at the end."""
    leave_words_to_main()
    path = find_folder(folder, resume=resume, name=name)
    world = init_world(config.runtime.device, timeout=timedelta(minutes=config.runtime.timeout_minutes))
    with StopSignals(early=True) as signals, _Claim() as claim, _in_words(world, claim):
        if claimed:
            claim.folder = path
        if writes and resume is not None and path is not None and path.is_dir():
            on_main(world, lambda: claim.take(path))  # a checkpoint is read when nobody writes it
            claim.folder = path
        if world.is_main and resume == "auto" and path is None:
            print(f"--resume auto: no run runs/{name}-* yet; starting one")
        checkpoint = same_data = None
        if resume is not None and path is not None:
            checkpoint = _find_checkpoint(RunFolder(path), resume, world)
            if not world.any(checkpoint is not None):
                on_main(world, lambda: refuse_lost_checkpoints(RunFolder(path)))
            same_data = checkpoint.shared.get("data") if checkpoint is not None else RunFolder(path).read_data()
            config = with_precision_of(RunFolder(path), config, world.device)
        setup = build(config, world, load_checkpoint=checkpoint is None, same_data=same_data)
        if checkpoint is not None and path is not None and world.is_main:
            for change in changed_environment(RunFolder(path), world, decoder=setup.data.decoder):
                warn(f"{change}; the result will not be bit-equal to an uninterrupted run's")
        run_folder = RunFolder(path or new_run_path(name, world))
        if resume is not None:
            other = checkpoint is not None and (checkpoint.rank_states or same_total_batch(checkpoint, setup))
            check_same_run(run_folder, setup.config, FREE_WITH_OTHER_PROCESSES if other else {})
        if checkpoint is not None:
            run_folder.check_metrics()
            check_epochs(checkpoint, setup.config)
            if world.is_main:
                for change in changes(run_folder, checkpoint, setup):
                    warn(change)
        try:
            yield _Prepared(setup, run_folder, checkpoint, claim, signals)
        finally:
            for loader in (setup.train_loader, setup.val_loader):
                end_workers(loader)
        world.barrier()  # gloo may abort a process that leaves while another still receives from it


@contextlib.contextmanager
def _in_words(world: World, claim: _Claim) -> Iterator[None]:
    """Says in words what ends a run that is not to blame for it, and leaves the other processes."""
    try:
        yield
    except Exception as error:
        failure = explain(error, world, claim.folder)
        if failure is None:
            raise
        raise failure from error
    finally:
        close_world(world)


def find_folder(folder: Path | None, *, resume: Resume, name: str) -> Path | None:
    """The folder of the run to write or to go on with; None for a new one still to be named. Arguments as of `run`.

    Raises:
        ConfigError: `resume` names no run, or another than `folder`.
    """
    if resume is None or (resume == "auto" and folder is not None):
        return folder
    if resume == "auto":
        return latest_run(name)
    path = resume.parent.parent if _is_checkpoint(resume) else resume
    if not RunFolder(path).holds_run():
        raise ConfigError(f"--resume {resume}: not a run folder, nor a checkpoint in one")
    if folder is not None and folder.resolve() != path.resolve():
        raise ConfigError(f"--resume {resume} and --output {folder} name two folders; leave --output out")
    return path


def find_config(file: Path | None, overrides: Sequence[str], folder: Path | None, *, resume: Resume) -> TrainConfig:
    """The config of a file; where a run goes on without one, the run's own.

    Args:
        file: None: the run's own, or the default.
        overrides: KEY=VALUE, on top of either.
        folder: As `find_folder` found it.
        resume: As of `run`.

    Raises:
        ConfigError: See `load_config`.
    """
    if file is None and resume is not None and folder is not None and RunFolder(folder).holds_run():
        file = RunFolder(folder).config
    return load_config(file, overrides)


def with_class_names(config: TrainConfig) -> TrainConfig:
    """The config with the names of its data's classes; as it is, with a warning, where they cannot be had."""
    if config.data.class_names is not None:
        return config
    try:
        names = class_names_of_data(config.data)
    except ConfigError as error:
        warn(f"data.class_names is not known: {error}")
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"class_names": names})})


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints"


def _find_checkpoint(folder: RunFolder, resume: Literal["auto"] | Path, world: World) -> Checkpoint | None:
    """The checkpoint named, or the newest that is whole; None where the run has none yet."""
    if resume != "auto" and _is_checkpoint(resume):
        return load_checkpoint(resume, rank=world.rank, world_size=world.size)
    return latest_checkpoint(folder.checkpoints, rank=world.rank, world_size=world.size, warn=warn)


def check_same_run(folder: RunFolder, config: TrainConfig, more: Mapping[str, set[str]] = MappingProxyType({})) -> None:
    """Refuses to go on with a run under settings that would make it another run; there may be none yet.

    Args:
        folder: Of the run.
        config: To go on with.
        more: Keys that may change beside `FREE_TO_CHANGE`, by section.

    Raises:
        ConfigError: Naming the first key that differs.
    """
    if not folder.holds_run():
        return
    old, new = load_config(folder.config).model_dump(), config.model_dump()
    if old["runtime"]["precision"] == "auto":  # of an older version: `with_precision_of` has said what it means
        old["runtime"]["precision"] = new["runtime"]["precision"]
    for section in COMPARED:
        before, after = old[section], new[section]
        if section in FREE_TO_CHANGE:
            free = FREE_TO_CHANGE[section] | more.get(section, set())
            before, after = ({k: v for k, v in d.items() if k not in free} for d in (before, after))
        if before != after:
            keys = [k for k in after if before.get(k) != after[k]] if isinstance(after, dict) else []
            key = f"{section}.{keys[0]}" if keys else section
            values = (before[keys[0]], after[keys[0]]) if keys else (before, after)
            raise ConfigError(
                f"--resume: {key} is {values[1]!r}, but the run in {folder.path} has {values[0]!r}; "
                "leave it as it was, or start a new run from its weights (model.checkpoint)"
            )


def describe_result(summary: dict[str, Any]) -> str:
    """What `run` returned in a line or two; empty where the run was stopped or another process says it."""
    if not summary or "stopped_by" in summary:
        return ""
    folder = RunFolder(summary["folder"])
    told = f"report: {folder.report}" if summary.get("report_made") else f"run: {folder.path}"
    if not summary.get("report_made") and folder.report.exists():
        told += f", whose {folder.report.name} is of an earlier time"
    final, best, seconds = (summary[key] for key in ("final_top1", "best_top1", "seconds"))
    final, best = ("unknown" if top1 is None else f"{top1:.2f}" for top1 in (final, best))
    lines = [f"final top-1 {final}, best {best}, {seconds:.1f} s; {told}"]
    skipped = summary["skipped_images"]
    if any(skipped.values()):
        lines.append(
            f"images that could not be read: {skipped['train']} for training, replaced, and {skipped['val']} for "
            f"validation, left out of its figures: {folder.skipped}"
        )
    if summary["non_finite_steps"]:
        lines.append(f"steps left out as not finite: {summary['non_finite_steps']}: {folder.non_finite}")
    return "\n".join(lines)


def warn(message: str) -> None:
    """Says something that stops nothing."""
    print(f"warning: {message}", file=sys.stderr)
