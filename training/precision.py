"""The dtype of autocast: what `auto` means on a device, and in what a model is evaluated that was trained elsewhere."""

from typing import Any

import torch

from files.errors import ConfigError
from training.config import RuntimeSection
from training.distributed import World

_FAST_CPU = ("avx512_bf16", "amx_bf16")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and torch uses it.

    Of CPUs these are those of x86-64 with AVX512-BF16 or AMX, by what torch says of them and where it has oneDNN. With
    AVX512 alone oneDNN calls it supported too, but emulates it, which is slower than float32 (docs/training.md, Precision).
    Other architectures have not been measured.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot say it
    return any(told.get(name, False) for name in _FAST_CPU)


def autocast_dtype(wanted: str, device: torch.device, *, key: str) -> torch.dtype:
    """The dtype of autocast.

    Args:
        wanted: auto, float32, bfloat16 or float16.
        device: Where the model runs.
        key: What the user gave it by, for the message.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if wanted == "auto":
        if fast_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if wanted == "float16" and device.type == "cpu":
        raise ConfigError(f"{key} float16 needs a GPU; on a CPU use float32 or bfloat16")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def training_dtype(wanted: str, world: World) -> torch.dtype:
    """The dtype of autocast of a run, the same on all its processes; every process must call it.

    Args:
        wanted: `runtime.precision`. With auto all processes take bfloat16 if it is fast for each of them.
        world: They.

    Raises:
        ConfigError: See `autocast_dtype`.
    """
    own = autocast_dtype(wanted, world.device, key="runtime.precision:")
    if wanted == "auto" and world.any(own != torch.bfloat16):
        return torch.float16 if world.device.type == "cuda" else torch.float32
    return own


def evaluation_dtype(asked: str | None, runtime: RuntimeSection | None, device: torch.device) -> torch.dtype:
    """The dtype of autocast in which a model is evaluated.

    Args:
        asked: What the user asked for; None: that of the model's run where the device is fast at it, so that its figures
            are found again, else float32.
        runtime: Of the model's run; None: there is none, and float32 is meant.
        device: Where the model runs.

    Raises:
        ConfigError: See `autocast_dtype`.
    """
    if asked is not None:
        return autocast_dtype(asked, device, key="--precision")
    own = "float32" if runtime is None else runtime.precision
    # runs write down what `auto` came to; those that once did not had float32 on a CPU
    fast = device.type == "cuda" or (own == "bfloat16" and fast_bfloat16(device))
    return autocast_dtype(own if fast else "float32", device, key="runtime.precision:")
