"""Which process of a run is missing, when the others wait for it in vain.

While all goes well nothing is sent. A process that leaves with an error says so at the place where the processes met (the
store of torchrun, or of rank 0); one whose exchange with the others breaks or times out looks there who left, and why, and
who does not answer at all: that one hangs, or was killed.
"""

import datetime
import json
import os
import textwrap
import time

import torch.distributed as dist

from training.distributed import World

PATIENCE = 10.0
"""Seconds in which all processes that live have found out that one is missing."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that an exchange between processes failed, not that this process did something wrong."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def report(world: World, error: BaseException) -> None:
    """Says to the others that this process leaves, and why; nothing where it is alone or nobody can be told."""
    store = _store(world)
    if store is not None:
        cause = None if is_lost(error) else f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            store.set(_key(world.rank), json.dumps(cause and textwrap.shorten(cause, 300)))
        except RuntimeError:
            return


def describe_lost(world: World, error: BaseException, *, patience: float = PATIENCE) -> str:
    """What to say on a process whose exchange with the others failed, in one to two lines.

    Args:
        world: The processes.
        error: What the exchange raised, see `is_lost`.
        patience: Seconds to wait for the other processes to find out as well.
    """
    report(world, error)
    causes, silent = _survey(world, patience)
    told = [f"rank {rank} stopped: {cause}" for rank, cause in sorted(causes.items())]
    if silent and not told:
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        told = [f"{ranks} {'do' if len(silent) > 1 else 'does'} not answer: hanging, or killed"]
    what = "; ".join(told) or textwrap.shorten(f"the connection between the processes broke: {error}", 300)
    return f"rank {world.rank} waited for the others in vain: {what}"


def _survey(world: World, patience: float) -> tuple[dict[int, str], list[int]]:
    """Why other processes stopped, by rank, as soon as one has said so; and those not heard of until then."""
    deadline = time.monotonic() + patience
    causes: dict[int, str] = {}
    silent = [rank for rank in range(world.size) if rank != world.rank]
    store = _store(world)
    while store is not None:
        try:
            for rank in [rank for rank in silent if store.check([_key(rank)])]:
                silent.remove(rank)
                cause = json.loads(store.get(_key(rank)))
                if cause is not None:
                    causes[rank] = cause
        except RuntimeError:
            break  # the store went with the process that held it
        if causes or not silent or time.monotonic() > deadline:
            return causes, silent
        time.sleep(0.1)
    # Without torchrun the store is rank 0's: it is the one that is gone, and nobody can say more.
    return causes, [0] if world.rank != 0 else silent


def _store(world: World) -> dist.TCPStore | None:
    """A connection of its own to where the processes met; None where it is not there any more."""
    if world.size == 1 or not dist.is_initialized():
        return None
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
    except (RuntimeError, ValueError, KeyError):
        return None


def _key(rank: int) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart of the processes
    return f"drop-path-zoo/left/{attempt}/{rank}"
