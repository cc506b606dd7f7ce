"""What of a run changes with time, saved and restored."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from files.errors import ConfigError
from training.checkpoint import Checkpoint, random_states, save_checkpoint
from training.run_folder import RunFolder
from training.setup import Setup


@dataclass
class Progress:
    """Where a run is. Saved in every checkpoint.

    Attributes:
        epoch: Epochs done.
        step: Optimizer steps done.
        batch: Batches done in the current epoch, on each rank.
        best_top1: Best validation top-1 so far, in percent.
        loss_sum: Sum of this rank's losses over the samples of the current epoch.
        samples: This rank's samples in the current epoch.
        seconds: Training and validation time so far.
        epoch_seconds: Training time in the current epoch.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    best_top1: float = -1.0
    loss_sum: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0

    def advance(self, batches: list[Any], loss: float, seconds: float) -> None:
        """Notes an optimizer step over some batches and its mean loss."""
        count = sum(len(targets) for _, targets, _ in batches)
        self.step += 1
        self.batch += len(batches)
        self.samples += count
        self.loss_sum += loss * count
        self.seconds += seconds
        self.epoch_seconds += seconds


def save(setup: Setup, folder: RunFolder, progress: Progress) -> Path:
    """Writes a checkpoint of the whole state; every rank calls it."""
    own = asdict(progress)
    shared = {
        "model": setup.model.state_dict(),
        "ema": None if setup.ema is None else setup.ema.module.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "scaler": setup.scaler.state_dict(),
        "data": setup.data.identity,
    }
    return save_checkpoint(
        folder.checkpoints,
        progress.step,
        shared=shared,
        rank_state={"progress": own, "random": random_states()},
        keep=setup.config.checkpoint.keep,
        rank=setup.world.rank,
        world_size=setup.world.size,
        barrier=setup.world.barrier,
    )


def restore(setup: Setup, checkpoint: Checkpoint) -> Progress:
    """Puts a checkpoint's state into a freshly built run; random states are put back when training starts.

    Raises:
        ConfigError: It belongs to a run with another model or optimizer.
    """
    shared = checkpoint.shared
    try:
        setup.model.load_state_dict(shared["model"])
        if setup.ema is not None:
            setup.ema.module.load_state_dict(shared["ema"])
        setup.optimizer.load_state_dict(shared["optimizer"])
        setup.scaler.load_state_dict(shared["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{checkpoint.path}: does not fit this run's config: {reason}") from None
    progress = Progress(**checkpoint.rank_state["progress"])
    batches = setup.sampler.batches_per_epoch
    if progress.batch > batches:
        raise ConfigError(
            f"{checkpoint.path}: behind batch {progress.batch} of its epoch, which has only {batches} in this data"
        )
    # a checkpoint of the end of an epoch goes on with its evaluation, which notes the rates of that step
    setup.depth.set_step(max(0, progress.step - 1))
    return progress
