"""The CPU threads of a process: how many compute, and what those that wait do. Imports nothing heavy, so that scripts can
call it before torch loads."""

import os
import warnings
from typing import Literal

# What a user may have set of it: OpenMP's own variable, GNU's and Intel's.
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def wait_passively() -> None:
    """Lets OpenMP threads that wait for others sleep instead of spinning, unless the environment says how they wait.

    A spinning thread keeps a core from the very thread it waits for as soon as another process computes there, and a
    run then comes nearly to a stop. OpenMP reads this once, while torch loads: call it before the first `import torch`.
    Processes that this one starts inherit it.
    """
    if not _WAITING & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def number_of_threads(setting: int | Literal["auto"], *, processes: int = 1) -> int:
    """Threads that one process computes with.

    Args:
        setting: The number, or "auto": `OMP_NUM_THREADS` where it is set, else the physical cores that this process
            may use (containers and affinity counted), shared out between the processes.
        processes: Processes of the run on this machine. torchrun sets `OMP_NUM_THREADS` to 1 for several where the
            user did not set it, so that this 1 is nobody's wish and is not obeyed.

    Returns:
        At least 1.
    """
    if setting != "auto":
        return setting
    # one number, or for nested regions several: the first is that of the outermost
    wished = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wished.isdecimal() and int(wished) >= 1 and (processes == 1 or int(wished) > 1):
        return int(wished)
    import joblib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it can only count logical cores, which will do
        cores = joblib.cpu_count(only_physical_cores=True)
    return max(1, cores // processes)
