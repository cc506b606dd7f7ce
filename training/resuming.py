"""What may be different when a run goes on, and what is said of it: more epochs, another number of processes."""

import torch
from torch import nn

from files.errors import ConfigError
from files.words import counted
from training.checkpoint import Checkpoint, has_checkpoints
from training.config import OptimSection, TrainConfig, build_schedule, load_config
from training.lr_schedule import build_scheduler
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress, dealt_anew


def check_epochs(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """A run may get more epochs, or fewer, but not fewer than it has begun.

    Raises:
        ConfigError: It has begun more.
    """
    progress = Progress(**checkpoint.rank_state["progress"])
    begun = progress.epoch + (progress.batch > 0)
    if config.optim.epochs < begun:
        raise ConfigError(
            f"--resume: optim.epochs is {config.optim.epochs}, but the run at {checkpoint.path} is in epoch {begun}; "
            f"give at least {begun}, or resume from an earlier checkpoint"
        )


def refuse_lost_checkpoints(folder: RunFolder) -> None:
    """Refuses to begin a run anew in a folder that has no checkpoint to go on from, but had one.

    A run that was killed before its first checkpoint may begin anew there, also with the rows of epochs before it; there may
    be no run yet. Nothing is read but names, config.yaml and metrics.csv.

    Raises:
        ConfigError: Its checkpoints are damaged or gone: its results would be overwritten.
    """
    if not folder.holds_run():
        return
    damaged = has_checkpoints(folder.checkpoints)
    if not damaged and not folder.summary.exists() and not _was_saved(folder):
        return
    kept = [path.name for path in (folder.summary, folder.metrics, folder.best) if path.exists()]
    results = f", only its results ({', '.join(kept)})" if kept else ""
    what = f"no checkpoint in {folder.checkpoints} is whole" if damaged else f"{folder.checkpoints} has no checkpoint"
    raise ConfigError(
        f"--resume: the run in {folder.path} cannot go on: {what}{results}\n"
        "bring a checkpoint back; or begin anew with another --output, or here once the folder is moved away or removed"
    )


def _was_saved(folder: RunFolder) -> bool:
    """Whether what is noted in metrics.csv comes behind a checkpoint: the first is on disk before its epoch is noted."""
    last = folder.last_noted()
    if last is None:  # best/ comes behind the first row, so that the rows were removed
        return folder.best.exists()
    epoch, step = last
    config = load_config(folder.config)
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    if epoch >= config.optim.epochs or (every_epochs is not None and epoch >= every_epochs):
        return True
    # at the end of an epoch nothing is saved by steps
    return every_steps is not None and step >= every_steps and every_steps % (step // epoch) != 0


def with_precision_of(folder: RunFolder, config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config in the precision that the run in the folder began with, where `auto` leaves it to the device.

    Another machine may be fast at another one, and a run must not change it on the way. There may be no run yet.
    """
    if config.runtime.precision != "auto" or not folder.holds_run():
        return config
    kept = load_config(folder.config).runtime.precision
    if kept == "auto" and device.type != "cuda":
        kept = "float32"  # which auto was there, when runs did not write down what it came to
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"precision": kept})})


def changes(folder: RunFolder, checkpoint: Checkpoint, setup: Setup) -> list[str]:
    """What is different from the run in the folder, and what is therefore not as in a run that nobody interrupted.

    Args:
        folder: Its config.yaml is still the one before.
        checkpoint: Where it goes on.
        setup: How it goes on.
    """
    told = []
    if folder.holds_run():
        told += _changed_epochs(load_config(folder.config), setup)
    if checkpoint.rank_states:
        told.append(_changed_processes(checkpoint, setup))
    done = Progress(**checkpoint.rank_state["progress"]).epoch
    noted = folder.count_metrics(done)
    if noted < done:
        told.append(f"{folder.metrics} tells of {noted} of the {counted(done, 'epoch')} done; the others are lost")
    return told


def same_total_batch(checkpoint: Checkpoint, setup: Setup) -> bool:
    """Whether an optimizer step covers as many samples, over all processes, as it did when the checkpoint was saved."""
    return checkpoint.shared.get("total_batch") == setup.total_batch


def _changed_epochs(before: TrainConfig, setup: Setup) -> list[str]:
    old, new, steps = before.optim.epochs, setup.config.optim.epochs, setup.steps_per_epoch
    if old == new:
        return []
    # a few steps of each epoch that both have, the last of all among them
    last = min(old, new) * steps - 1
    sample = [*range(0, last, max(1, steps // 4)), last]
    rates = [build_schedule(setup.config.drop_path, steps, epochs) for epochs in (old, new)]
    both = {
        "lr": (_learning_rates(config.optim, steps, sample) for config in (before, setup.config)),
        "drop-path": ([schedule(step) for step in sample] for schedule in rates),
    }
    moved = [what for what, (first, second) in both.items() if first != second]
    if not moved:
        return [f"optim.epochs was {old}, is now {new}; no schedule depends on it"]
    run = "schedule now runs" if len(moved) == 1 else "schedules now run"
    return [
        f"optim.epochs was {old}, is now {new}: {' and '.join(moved)} {run} to epoch {new}; the run is no longer that of "
        "the first config"
    ]


def _learning_rates(optim: OptimSection, steps_per_epoch: int, sample: list[int]) -> list[float]:
    """At those optimizer steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch)
    rates = []
    for step in sample:
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _changed_processes(checkpoint: Checkpoint, setup: Setup) -> str:
    """What a run loses that goes on with another number of processes."""
    world, sampler = setup.world, setup.sampler
    before, after = Progress(**checkpoint.rank_state["progress"]), dealt_anew(checkpoint, setup)
    mixed = "; mixup and cutmix draw by the new ranks" if setup.mixer.enabled else ""
    lines = [
        f"saved by {counted(checkpoint.world_size, 'process')}, goes on with {world.size}: the result will not be "
        "bit-equal to an uninterrupted run's",
        f"  drop path draws from new random states, seeded by (seed, step, rank){mixed}",
    ]
    seen = before.batch * sampler.batch_size * checkpoint.world_size
    position = after.batch * sampler.batch_size * world.size
    if 0 < after.batch < sampler.batches_per_epoch:
        left_out = f", of which {position - seen} are left out" if position != seen else ""
        lines.append(f"  epoch {after.epoch + 1} goes on behind its first {counted(position, 'sample')}{left_out}")
    if after.step != before.step:
        lines.append(f"  steps are counted anew: step {before.step} is step {after.step} of {setup.total_steps}")
    lines.append(f"  {_total_batch(checkpoint, setup)}")
    return "\n".join(lines)


def _total_batch(checkpoint: Checkpoint, setup: Setup) -> str:
    before, after = checkpoint.shared.get("total_batch"), setup.total_batch
    if before == after or not before:
        return f"the total batch stays {after}"
    per_pass = after // setup.config.optim.accumulate
    advice = f"; optim.accumulate={before // per_pass} keeps it" if before % per_pass == 0 else ""
    return f"the total batch was {before}, is now {after}{advice}"
