"""Each of `layers.fast_cuda`'s kernels beside torch's form of the same, forward and backward, on a GPU."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import paired_ratio, seconds_of, take_turns
from layers import fast_cuda
from layers.draw import Draw
from layers.fast import plain_paths, takes
from layers.fast_conv import star_relu_conv
from layers.mlp import StarReLU
from layers.norm import GroupNorm1, LayerNorm
from layers.token_mixers import Pooling

SHAPES = ((56, 56, 64), (14, 14, 320))
"""Images (H, W, C) of PoolFormer-S12's first and third stage."""

KEPT = 0.7
"""Share of the samples that a branch keeps."""

STEPS = 5
"""Times that a form runs between two waits for the device."""

Form = Callable[[Tensor], Tensor]


def measure_kernels(device: torch.device, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each form with the kernels and without, and how many times as fast it is with them.

    Args:
        device: Where there are no kernels both are torch's forms.
        batch: Samples.
        rounds: In turns.
    """
    return [
        _measure(name, form, shape, dtype, batch, device, rounds)
        for shape in SHAPES
        for dtype in (torch.bfloat16, torch.float32)
        for name, form in _forms(shape[-1], batch, device).items()
    ]


def _forms(channels: int, batch: int, device: torch.device) -> dict[str, Form]:
    """Functions of (B, H, W, C)."""
    draws = torch.rand(batch, device=device).argsort()
    kept = draws[: max(1, int(batch * KEPT))]
    draw = Draw(batch, torch.tensor(1.0 / KEPT), kept, order=draws)
    modules = {
        "layer norm": LayerNorm(channels),
        "group norm": GroupNorm1(channels),
        "pooling": Pooling(),
        "StarReLU": StarReLU(),
    }
    kernel = torch.randn(channels, 1, 7, 7, device=device, requires_grad=True)
    scale, shift = (torch.ones(1, device=device, requires_grad=True) for _ in range(2))

    def residual(x: Tensor) -> Tensor:
        taken, shortcut = draw.split(x)
        return draw.add(shortcut, taken)

    def depthwise(x: Tensor) -> Tensor:
        if takes(x):
            return star_relu_conv(x, scale, shift, kernel)
        image = fast_cuda.plain_star_relu(x, scale, shift).permute(0, 3, 1, 2)
        return F.conv2d(image, kernel.to(x.dtype), padding=3, groups=channels).permute(0, 2, 3, 1)

    return {
        "samples taken and added": residual,
        **{name: module.to(device) for name, module in modules.items()},
        "StarReLU and depthwise 7 x 7": depthwise,
    }


def _measure(
    name: str, form: Form, shape: tuple[int, ...], dtype: torch.dtype, batch: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    x = torch.randn(batch, *shape, device=device, dtype=dtype, requires_grad=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = form(x)
        y.backward(torch.ones_like(y))
        x.grad = None

    def plain() -> None:
        with plain_paths():
            step()

    def several(run: Callable[[], None]) -> float:
        return seconds_of(lambda: [run() for _ in range(STEPS)], device) / STEPS

    sides = {"plain": partial(several, plain), "kernels": partial(several, step)}
    times = take_turns(sides, rounds, warmup=2)
    faster, spread = paired_ratio(times["plain"], times["kernels"])
    return {
        "what": name,
        "shape": [batch, *shape],
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{side}_ms": round(1e3 * statistics.median(seconds), 4) for side, seconds in times.items()},
        "plain_over_kernels": faster,
        "spread": spread,
    }
