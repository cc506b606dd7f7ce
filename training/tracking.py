"""Weights & Biases, by extra: the scalars of each epoch in a project of wandb, besides TensorBoard's.

Where it writes, and whether at all, wandb's own environment says: WANDB_MODE=offline keeps a run in its folder,
WANDB_MODE=disabled turns it off; WANDB_ENTITY, WANDB_API_KEY and the rest as in its documentation.
"""

import json
import secrets
from typing import Any

from files.errors import ConfigError, Failure
from training.config import TrainConfig
from training.data.draws import global_generators_kept
from training.distributed import World
from training.recipe import LogSection
from training.run_folder import RunFolder


class NoTracker:
    """Writes nothing."""

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Nothing."""

    def finish(self, failed: bool) -> None:
        """Nothing."""


class WandbTracker:
    """A run of wandb, which goes on with the run folder: its id is the folder's.

    Args:
        config: The run's, logged as a whole; `log.wandb` is the project.
        folder: Where the id stands; its name is the run's.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        wandb = _import_wandb()
        known = _known_id(folder)
        run_id = known or secrets.token_hex(4)
        if known is None:  # before wandb has it: a run that is killed in between goes on with this id
            folder.write_json(folder.wandb, {"id": run_id})
        with global_generators_kept():  # whatever wandb draws, the run does not
            self.run: Any = wandb.init(
                project=config.log.wandb,
                name=folder.path.resolve().name,
                id=run_id,
                resume="allow",
                config=config.model_dump(),
                dir=str(folder.path),
            )

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Logs an epoch. What a resumed run repeats, wandb has already and passes over: the values are the same."""
        with global_generators_kept():
            self.run.log(scalars, step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def open_tracker(config: TrainConfig, folder: RunFolder, world: World) -> WandbTracker | NoTracker:
    """What the config asks for, on the main process; every process calls it.

    Raises:
        Failure: On every process, where wandb cannot start: no key, no network.
    """
    if config.log.wandb is None:
        return NoTracker()
    tracker, problem = NoTracker(), ""
    if world.is_main:
        try:
            tracker = WandbTracker(config, folder)
        except Exception as error:  # wandb and the network may raise anything
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if world.any(bool(problem)):
        raise Failure(
            f"log.wandb: cannot start ({problem[:300] or 'see rank 0'})\n"
            "log in with `wandb login`, or keep it in the run folder with WANDB_MODE=offline, or leave log.wandb out"
        )
    return tracker


def check_log(section: LogSection) -> None:
    """Finds out before a run whether what it is to write to is installed.

    Raises:
        ConfigError: Naming the extra.
    """
    if section.wandb is not None:
        _import_wandb()


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"log.wandb: needs the package wandb ({error}): pip install -e '.[wandb]'") from None
    return wandb


def _known_id(folder: RunFolder) -> str | None:
    """The id under which wandb knows the run of a folder, or None."""
    try:
        known = json.loads(folder.wandb.read_bytes()).get("id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return known if isinstance(known, str) and known else None
