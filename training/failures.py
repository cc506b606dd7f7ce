"""What an error in mid-run means to the person who runs it: one to three lines that name it and what to do."""

import os
from pathlib import Path

from files.durable import CheckpointError
from files.errors import ConfigError, Failure, is_of_machine, is_out_of_memory, wanted_memory
from training.checkpoint import has_checkpoints
from training.data.dataset import ReadError
from training.data.skipping import lost_worker
from training.distributed import World
from training.lost_rank import describe_lost, is_lost, report

_ONE_VALUE = "Expected more than 1 value per channel when training"  # torch's words
GO_ON = "go on from the last checkpoint with --resume"


def way_on(folder: Path | None) -> str:
    """`GO_ON`, or nothing where there is no checkpoint yet, as of a dry run."""
    return GO_ON if folder is not None and has_checkpoints(folder / "checkpoints") else ""


def explain(error: Exception, world: World, folder: Path | None) -> Failure | ConfigError | None:
    """The failure, or the mistake in what was given, to raise in place of an error.

    None for one that says all itself, or is a mistake of ours.

    The other processes of the run are told either way, so that they can say why they cannot go on.

    Args:
        error: What ended the run.
        world: The processes.
        folder: That of the run; None where it is not made yet.
    """
    if is_lost(error) and world.size > 1:
        return Failure(f"{describe_lost(world, error)}\n{way_on(folder)}".rstrip())
    report(world, error)
    if isinstance(error, (OSError, CheckpointError)) and folder is not None and not folder.exists():
        return Failure(f"the run folder {folder} is gone: deleted or moved while the run went on")
    if isinstance(error, (ConfigError, Failure)):
        return None
    lost = lost_worker(error) if isinstance(error, RuntimeError) else None
    if lost is not None:
        return ReadError(lost)
    if is_out_of_memory(error):
        ways = ["lower data.batch_size (and raise optim.accumulate as much)", way_on(folder)]
        return Failure(f"out of memory on {world.device}: {wanted_memory(error)}\n{'; '.join(filter(None, ways))}")
    if isinstance(error, ValueError) and str(error).startswith(_ONE_VALUE):
        return ConfigError(
            "data.batch_size: too small for this model and image size: a batch norm has one value per channel, "
            "which has no variance; give a larger one, or larger images"
        )
    if isinstance(error, OSError) and (is_of_machine(error) or _is_below(error.filename, folder)):
        where = f": {error.filename}" if error.filename else ""
        return Failure(f"{error.strerror or error}{where}\n{way_on(folder)}".rstrip())
    return None


def _is_below(name: object, folder: Path | None) -> bool:
    if folder is None or not isinstance(name, (str, bytes, os.PathLike)):
        return False
    path, folder = Path(os.path.abspath(os.fsdecode(name))), Path(os.path.abspath(folder))
    return path == folder or folder in path.parents
