"""What of a run changes with time, saved and restored over one table of named states."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from files.errors import ConfigError
from training.checkpoint import Checkpoint, random_states, save_checkpoint, set_random_states
from training.run_folder import RunFolder
from training.setup import Setup


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: Epochs done.
        step: Optimizer steps done.
        batch: Batches done in the current epoch, on each rank.
        best_top1: Best validation top-1 so far, in percent.
        loss_sum: Sum of this rank's losses over the samples of the current epoch.
        samples: This rank's samples in the current epoch.
        seconds: Training and validation time so far.
        epoch_seconds: Training time in the current epoch.
        non_finite: Steps left out because their loss or gradient was not finite (`training.non_finite`).
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    best_top1: float = -1.0
    loss_sum: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    non_finite: int = 0

    def advance(self, batches: list[Any], loss: float, seconds: float) -> None:
        """Notes an optimizer step over some batches and its mean loss; NaN: it was left out, and nothing was learned."""
        count = sum(len(targets) for _, targets, _ in batches)
        self.step += 1
        self.batch += len(batches)
        if math.isnan(loss):
            self.non_finite += 1
        else:
            self.samples += count
            self.loss_sum += loss * count
        self.seconds += seconds
        self.epoch_seconds += seconds

    def next_epoch(self) -> None:
        """Notes the end of an epoch."""
        self.epoch += 1
        self.batch, self.samples, self.loss_sum, self.epoch_seconds = 0, 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in asdict(Progress(**state)).items():
            setattr(self, name, value)


class RandomStates:
    """The global random generators. What is loaded takes effect later, in `put_back`: until then others may draw."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_states()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def put_back(self) -> None:
        """Sets the generators to what was loaded, once; does nothing where nothing was."""
        if self._loaded is not None:
            set_random_states(self._loaded)
            self._loaded = None


class RunState:
    """All that a checkpoint of a run holds. A name in `table` is all that a further state needs.

    Attributes:
        progress: Where the run is.
        random: The generators.
        table: Every state by its name in the checkpoint.
    """

    PER_RANK = ("progress", "random")
    """What each process saves for itself; the rest is the same for all, and the main process saves it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.progress = Progress()
        self.random = RandomStates()
        self.table: dict[str, Stateful] = {
            "model": setup.model,
            **({} if setup.ema is None else {"ema": setup.ema.module}),
            "optimizer": setup.optimizer,
            "scaler": setup.scaler,
            "progress": self.progress,
            "random": self.random,
        }

    def save(self, folder: RunFolder) -> Path:
        """Writes a checkpoint; every rank calls it."""
        world = self.setup.world
        states = {name: state.state_dict() for name, state in self.table.items()}
        own = {name: states.pop(name) for name in self.PER_RANK}
        return save_checkpoint(
            folder.checkpoints,
            self.progress.step,
            shared=states | {"data": self.setup.data.identity},  # compared before a run is built, never loaded
            rank_state=own,
            keep=self.setup.config.checkpoint.keep,
            rank=world.rank,
            world_size=world.size,
            barrier=world.barrier,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's state into a freshly built run; random states follow with `random.put_back`.

        Raises:
            ConfigError: It belongs to a run with another model or optimizer.
        """
        saved = checkpoint.shared | checkpoint.rank_state
        try:
            for name, state in self.table.items():
                state.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{checkpoint.path}: does not fit this run's config: {reason}") from None
        batches = self.setup.sampler.batches_per_epoch
        if self.progress.batch > batches:
            raise ConfigError(
                f"{checkpoint.path}: behind batch {self.progress.batch} of its epoch, which has only {batches} in this data"
            )
        # a checkpoint of the end of an epoch goes on with its evaluation, which notes the rates of that step
        self.setup.depth.set_step(max(0, self.progress.step - 1))
