"""What a process asks of the processor and of the C library: threads, fast paths, and, of scripts, memory that stays."""

import ctypes
import os
import sys

import torch
from torch import nn

from layers.fast import set_fast_paths
from models.fast_layers import use_fast_layers
from training.config import RuntimeSection
from training.threads import number_of_threads

# glibc's own numbers of mallopt's settings, and what they are set to.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_MALLOPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28}
# A user's own settings of the allocator.
_MALLOC = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def set_up_processor(runtime: RuntimeSection | None, *, processes: int = 1) -> None:
    """Sets this process up as a run's config says, before anything is computed.

    Args:
        runtime: Section of the run; `None`: its defaults.
        processes: Processes of the run on this machine.
    """
    threads = "auto" if runtime is None else runtime.threads
    torch.set_num_threads(number_of_threads(threads, processes=processes))
    set_fast_paths(runtime is None or runtime.fast_paths)


def speed_up(model: nn.Module, runtime: RuntimeSection | None, device: torch.device, *, compiled: bool = False) -> None:
    """Lets the layers of another library's model take the fast paths, if the run takes them and they can pay.

    Args:
        model: Any; in place.
        runtime: Section of the run; `None`: its defaults.
        device: Where the model will run; there are fast paths for CPUs and for NVIDIA's GPUs.
        compiled: Whether it runs as compiled code, which has none.
    """
    if device.type in ("cpu", "cuda") and not compiled and (runtime is None or runtime.fast_paths):
        use_fast_layers(model)


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory that is freed for what comes next, in this process and those it starts by fork.

    By its defaults glibc gives every large block back to the system when it is freed. Each step of training then fetches
    its activations anew, one page fault for 4 kB, which took more time than the additions done in them.
    The process holds the most it ever needed until it ends, and more where blocks of many sizes leave holes: for a process
    that trains one model, not for one that goes on to others.

    Returns:
        Whether it was done: not with another C library or allocator, nor where the environment sets this one up
        (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if sys.platform != "linux" or any(name.startswith(_MALLOC) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no such function, and no version either
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all([mallopt(setting, value) for setting, value in _MALLOPT.items()])
