"""What of a run changes with time, saved and restored over one table of named states."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from files.errors import ConfigError
from stochastic_depth.setting import StochasticDepth
from training.checkpoint import Checkpoint, random_states, save_checkpoint, set_random_states
from training.data.draws import RESEED, hash_words
from training.distributed import World
from training.run_folder import RunFolder
from training.setup import Setup, seed_everything
from training.sharding import Pieces, is_sharded


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
        best_metric: Best value of early stopping's metric so far.
        bad_epochs: Epochs in a row since then.
        train_seconds: Training time so far.
        data_seconds: Of it, this rank's time spent waiting for data (`training.prefetch`).
        epoch_data_seconds: The same of the current epoch.
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
    best_metric: float | None = None
    bad_epochs: int = 0
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    epoch_data_seconds: float = 0.0

    def advance(self, batches: list[Any], loss: float, seconds: float, *, waited: float = 0.0) -> None:
        """Notes an optimizer step over some batches and its mean loss; NaN: it was left out, and nothing was learned.

        It took `seconds`, of which `waited` for data.
        """
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
        self.train_seconds += seconds
        self.data_seconds += waited
        self.epoch_data_seconds += waited

    def next_epoch(self) -> None:
        """Notes the end of an epoch."""
        self.epoch += 1
        self.batch, self.samples, self.loss_sum, self.epoch_seconds, self.epoch_data_seconds = 0, 0, 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_names(state, asdict(self), "progress ")
        for name, value in state.items():
            setattr(self, name, value)


class RandomStates:
    """The global random generators. What is loaded takes effect later, in `put_back`: until then others may draw."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._seed: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_states()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {"mps"}  # a state for each that was there; the others are everywhere
        check_names(state.keys() | devices, self.state_dict().keys() | devices, "random state ")
        self._loaded = state

    def seed(self, seed: int) -> None:
        """In place of a state: the generators are seeded."""
        self._seed = seed

    def put_back(self) -> None:
        """Sets the generators to what was loaded, once; does nothing where nothing was."""
        if self._seed is not None:
            seed_everything(self._seed)
        elif self._loaded is not None:
            set_random_states(self._loaded)
        self._seed = self._loaded = None


class DropPathCounts:
    """How often which branch was dropped, for drop_path.csv."""

    def __init__(self, depth: StochasticDepth) -> None:
        self._modules = [module for block in depth.blocks for module in block.drop_paths.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"counts": [(m.samples_seen, m.samples_dropped, m.samples_computed) for m in self._modules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for module, counts in zip(self._modules, state["counts"], strict=True):
            module.set_counts(*counts)


@dataclass(frozen=True)
class Snapshot:
    """The states of a run at one step. Its tensors may be those of the run itself, which the next step changes.

    Attributes:
        step: Optimizer steps done.
        shared: What is the same for all processes, by name.
        own: What belongs to this process, by name.
        keep: Checkpoints to keep.
    """

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]
    keep: int

    def write(self, folder: RunFolder, world: World) -> Path:
        """Writes it as a checkpoint; every rank calls it, and `world` is where they meet."""
        return save_checkpoint(
            folder.checkpoints,
            self.step,
            shared=self.shared,
            rank_state=self.own,
            keep=self.keep,
            rank=world.rank,
            world_size=world.size,
            barrier=world.barrier,
        )


class RunState:
    """All that a checkpoint of a run holds. A name in `table` is all that a further state needs.

    Attributes:
        progress: Where the run is.
        random: The generators.
        table: Every state by its name in the checkpoint.
        per_rank: What each process saves for itself; the rest is the same for all, and the main process saves it.
    """

    FACTS = ("data", "total_batch", "teacher")
    """What a checkpoint tells of the run beside its states: compared where a run goes on, never loaded."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.progress = Progress()
        self.random = RandomStates()
        self.per_rank: tuple[str, ...] = ("progress", "random", "drop_path")
        self.table: dict[str, Stateful] = {
            "model": setup.model,
            **({} if setup.ema is None else {"ema": setup.ema.module}),
            "optimizer": setup.optimizer,
            "scaler": setup.scaler,
            "progress": self.progress,
            "random": self.random,
            "drop_path": DropPathCounts(setup.depth),
        }
        if is_sharded(setup.model):
            self.table |= {"model": Pieces(setup.model, setup.model), "optimizer": Pieces(setup.optimizer, setup.model)}
            if setup.ema is not None:
                self.table["ema"] = Pieces(setup.ema.module, setup.ema.module)
            self.per_rank = (*self.per_rank, *(name for name in ("model", "ema", "optimizer") if name in self.table))

    def snapshot(self) -> Snapshot:
        """The states as they are."""
        states = {name: state.state_dict() for name, state in self.table.items()}
        own = {name: states.pop(name) for name in self.per_rank}
        facts = {
            "data": self.setup.data.identity,
            "total_batch": self.setup.total_batch,
            "teacher": self.setup.distillation.identity,
        }
        return Snapshot(
            step=self.progress.step,
            shared=states | facts,
            own=own,
            keep=self.setup.config.checkpoint.keep,
        )

    def save(self, folder: RunFolder) -> Path:
        """Writes a checkpoint and waits for it; every rank calls it. `training.saving` lets training go on meanwhile."""
        return self.snapshot().write(folder, self.setup.world)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's state into a freshly built run; random states follow with `random.put_back`.

        Where another number of processes saved it, positions and sums are dealt out anew (`dealt_anew`), and the
        generators are seeded by (seed, step, rank).

        Raises:
            ConfigError: It belongs to a run with another model or optimizer, lacks a state or has one that is not known.
        """
        _check_same_teacher(checkpoint, self.setup.distillation.identity)
        setup, world = self.setup, self.setup.world
        saved = checkpoint.shared | checkpoint.rank_state
        try:
            check_names(saved.keys() - set(self.FACTS), self.table, "state ")
            for name, state in self.table.items():
                state.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{checkpoint.path}: does not fit this run's config: {reason}") from None
        if checkpoint.rank_states:
            self.progress.load_state_dict(asdict(dealt_anew(checkpoint, setup)))
            self.random.seed(int(hash_words(setup.config.seed, RESEED, checkpoint.step, world.rank)[0]))
        batches = setup.sampler.batches_per_epoch
        if self.progress.batch > batches:
            raise ConfigError(
                f"{checkpoint.path}: behind batch {self.progress.batch} of its epoch, which has only {batches} in this data"
            )
        # a checkpoint of the end of an epoch goes on with its evaluation, which notes the rates of that step
        setup.depth.set_step(max(0, self.progress.step - 1))


def check_names(found: Iterable[str], known: Iterable[str], what: str) -> None:
    """Nothing of a checkpoint is dropped in silence, and nothing that it lacks is left as a new run has it.

    Raises:
        ValueError: Naming what is too few or too many.
    """
    found, known = set(found), set(known)
    if known - found:
        raise ValueError(f"it lacks the {what}{', '.join(map(repr, sorted(known - found)))}")
    if found - known:
        raise ValueError(f"it holds the {what}{', '.join(map(repr, sorted(found - known)))}, which would be dropped")


def dealt_anew(checkpoint: Checkpoint, setup: Setup) -> Progress:
    """Where a run is that another number of processes saved.

    An epoch goes on at the next optimizer step of the new number of processes: no sample is seen twice, and fewer than one
    step's are left out. Steps are counted anew, since the schedules are functions of the step: after so many epochs they
    are where they would be in a run of this number of processes. Sums over all processes are the first one's.
    """
    sampler, world, accumulate = setup.sampler, setup.world, setup.config.optim.accumulate
    parts = [Progress(**state["progress"]) for state in checkpoint.rank_states]
    progress, batches = replace(parts[0]), sampler.batches_per_epoch
    before = sampler.length // (sampler.batch_size * checkpoint.world_size)  # batches per epoch
    if progress.batch < before:
        steps = math.ceil(progress.batch * checkpoint.world_size / (world.size * accumulate))
        progress.batch = min(steps * accumulate, batches)
    else:
        progress.batch = batches
    progress.step = progress.epoch * setup.steps_per_epoch + math.ceil(progress.batch / accumulate)
    progress.loss_sum = sum(part.loss_sum for part in parts) if world.is_main else 0.0
    progress.samples = sum(part.samples for part in parts) if world.is_main else 0
    return progress


def _check_same_teacher(checkpoint: Checkpoint, now: dict[str, Any] | None) -> None:
    """Refuses to go on with another teacher, whatever it is called.

    Raises:
        ConfigError: Naming both.
    """
    before = checkpoint.shared.get("teacher")
    if (before or {}).get("weights_sha256") != (now or {}).get("weights_sha256"):
        told = [f"{t['name']} with weights {t['weights_sha256'][:12]}" if t else "none" for t in (before, now)]
        raise ConfigError(
            f"--resume: distill.teacher was {told[0]}, is now {told[1]}; go on with the same, or start a new run from the "
            "weights of this one (model.checkpoint)"
        )
