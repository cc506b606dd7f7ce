"""Faster ways of the same on an NVIDIA GPU in eager code: in one or two passes over memory, where torch takes many.

Measured on an H200, batch 256, 56 x 56 x 64, bytes that must be moved over time, of 4.2 TB/s that a copy reaches: torch adds
kept samples to their batch at 0.8 (bfloat16) and puts them into zeros at 0.5 TB/s, normalises layers of 64 channels at 0.2
to 0.3, groups at 0.3, and pools at 0.17.

The kernels are Triton's, which comes with torch for CUDA on Linux (`layers.gpu_kernels`). Who may take them, and how they are
turned off, is said in `layers.fast`; where Triton or a C compiler is missing, and on GPUs before NVIDIA's Ampere, everything
has torch's forms. Compiled code fuses these passes itself.
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.fast import are_plain, autocast_dtype, plain_gradients, run, takes, wants_plain_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FEWEST = 2**18
"""Numbers from which a kernel pays: to start one of Triton's takes the CPU longer than one of torch's."""

MOST_CHANNELS = 2**13
"""Channels up to which a row is normalised at once."""

MOST_SAMPLES = 2**16 - 1
"""The most that a launch takes in its second dimension."""

TILE = 4096
"""Numbers that one program works on at a time."""

PROGRAMS = 1024
"""Programs that share a reduction over all rows of a batch."""

PARTS = 16
"""Parts that a sample's statistics are taken of."""


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: large enough, without gaps, on a GPU where they work.

    Args:
        tensors: The first, of `FEWEST` numbers at least and `MOST_SAMPLES` at most, says how large; `None` is passed over.
    """
    x = tensors[0]
    return (
        x is not None
        and x.device.type == "cuda"
        and x.numel() >= FEWEST
        and len(x) <= MOST_SAMPLES
        and all(t is None or (t.dtype in DTYPES and t.is_contiguous() and t.device == x.device) for t in tensors)
        and _work(x.device)
    )


class DeviceWarning(UserWarning):
    """This process's GPU does not run the kernels."""

    concerns = "process"  # so that a command says it of each


@functools.cache
def _work(device: torch.device) -> bool:
    """Whether a kernel runs on a GPU: tried once."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        x, order = torch.arange(4.0, device=device).view(2, 2), torch.tensor([1, 0], device=device)
        result = torch.empty_like(x)
        put_rows(x, order, None, result, 2.0)
        return result.tolist() == [[4.0, 6.0], [0.0, 2.0]]
    except Exception as error:  # whatever is missing, torch's forms are there
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        warnings.warn(
            f"Triton's kernels do not work on {device}, so training is slower there ({reason})",
            DeviceWarning,
            stacklevel=2,
        )
        return False


def _launch(kernel: str, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel of `layers.gpu_kernels` on the device of its first argument."""
    from layers import gpu_kernels

    start: Any = getattr(gpu_kernels, kernel)
    with torch.cuda.device_of(args[0]):
        start[grid](*args, **constants, num_warps=8)


# ---- samples ------------------------------------------------------------------------------------------------------------


def put_rows(rows: Tensor, order: Tensor, base: Tensor | None, result: Tensor, factor: float) -> None:
    """Samples times a factor in their places, on a base or on zeros; all tensors contiguous, each in a dtype of its own.

    Args:
        rows: The samples, (B', ...).
        order: Indices (B,) of all samples of the batch, first those of rows.
        base: What they are added to, (B, ...); `None`: zeros.
        result: Where the sum is written, (B, ...).
        factor: Of the samples.
    """
    size = result[0].numel()
    _launch(
        "put_rows",
        (-(-size // TILE), len(order)),
        rows,
        order,
        rows if base is None else base,
        result,
        len(rows),
        factor,
        size,
        BLOCK=TILE,
        ON_BASE=base is not None,
    )


def take_rows(x: Tensor, kept: Tensor, result: Tensor, factor: float = 1.0) -> None:
    """Samples of a batch times a factor; all tensors contiguous, x and the result each in a dtype of its own.

    Args:
        x: The batch, (B, ...).
        kept: Indices (B',).
        result: Where they are written, (B', ...).
        factor: Of the samples.
    """
    if factor == 1.0 and result.dtype == x.dtype:
        torch.index_select(x, 0, kept, out=result)
    elif len(kept):
        size = x[0].numel()
        _launch("take_rows", (-(-size // TILE), len(kept)), x, kept, result, factor, size, BLOCK=TILE)


# ---- norms --------------------------------------------------------------------------------------------------------------


def takes_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `layer_norm` and `group_norm` take an input, (..., C), and a weight and bias (C,)."""
    return (
        takes(x)
        and are_plain(weight, bias)
        and x.shape[-1] <= MOST_CHANNELS
        and all(t is None or t.shape == x.shape[-1:] for t in (weight, bias))
        and (autocast_dtype(x) is not None or all(t is None or t.dtype == x.dtype for t in (weight, bias)))
        and has_kernels(x, weight, bias)
    )


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """As `F.layer_norm` over the last dimension of (..., C), with `takes_norm`; keeps x only.

    Args:
        x: Input.
        weight: (C,) or `None`.
        bias: (C,) or `None`.
        eps: Added to the variance.
        dtype: Of the result; default torch's, which under autocast is float32.
    """
    return run(_LayerNorm, x, weight, bias, eps, dtype or _norm_dtype(x))


def group_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Group norm with one group of (B, ..., C), otherwise as `layer_norm`."""
    return run(_GroupNorm, x, weight, bias, eps, dtype or _norm_dtype(x))


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if autocast_dtype(x) is not None else x.dtype


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps, ctx.dtype = eps, dtype
        return layer_norm_forward(x, weight, bias, eps, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        eps, dtype = ctx.eps, ctx.dtype
        if wants_plain_gradients(grads[0]):
            plain = lambda x, *affine: _plain_layer_norm(x, *affine, eps=eps, dtype=dtype)  # noqa: E731
            return *plain_gradients(plain, ctx, (x, weight, bias), grads[0]), None, None
        of_x, of_weight, of_bias = layer_norm_gradients(grads[0].contiguous(), x, weight, eps)
        return of_x, as_gradient(of_weight, weight), as_gradient(of_bias, bias), None, None


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """`layer_norm` without autograd."""
    channels = x.shape[-1]
    rows, width, height = x.numel() // channels, _power(channels), _rows_of_a_tile(channels)
    y = torch.empty_like(x, dtype=dtype)
    _launch(
        "layer_norm",
        (-(-rows // height),),
        x,
        weight if weight is not None else x,
        bias if bias is not None else x,
        y,
        rows,
        channels,
        eps,
        ROWS=height,
        CHANNELS=width,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
    )
    return y


def layer_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, (..., C), in its dtype, and of weight and bias, (C,), in float32."""
    channels = x.shape[-1]
    # half a tile: sums over all tiles stand in registers beside it
    rows, height = x.numel() // channels, _rows_of_a_tile(2 * channels)
    all_tiles = -(-rows // height)
    tiles = -(-all_tiles // PROGRAMS)
    programs = -(-all_tiles // tiles)
    of_x = torch.empty_like(x)
    sums = torch.empty(2, programs, channels, dtype=torch.float32, device=x.device)
    _launch(
        "layer_norm_backward",
        (programs,),
        grad,
        x,
        weight if weight is not None else x,
        of_x,
        sums[0],
        sums[1],
        rows,
        channels,
        eps,
        tiles,
        ROWS=height,
        CHANNELS=_power(channels),
        WEIGHT=weight is not None,
    )
    of_weight, of_bias = sums.sum(1)
    return of_x, of_weight, of_bias


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        sums = group_norm_moments(x)
        ctx.save_for_backward(x, weight, bias, sums)
        ctx.eps, ctx.dtype = eps, dtype
        return group_norm_forward(x, sums, weight, bias, eps, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, sums = ctx.saved_tensors
        eps, dtype = ctx.eps, ctx.dtype
        if wants_plain_gradients(grads[0]):
            plain = lambda x, *affine: _plain_group_norm(x, *affine, eps=eps, dtype=dtype)  # noqa: E731
            return *plain_gradients(plain, ctx, (x, weight, bias), grads[0]), None, None
        of_x, of_weight, of_bias = group_norm_gradients(grads[0].contiguous(), x, sums, weight, eps)
        return of_x, as_gradient(of_weight, weight), as_gradient(of_bias, bias), None, None


def group_norm_moments(x: Tensor) -> Tensor:
    """Sums that mean and variance of each sample, (B, ...), follow from: (B, parts, 2)."""
    size = x[0].numel()
    sums = torch.empty(len(x), PARTS, 2, dtype=torch.float32, device=x.device)
    _launch("moments", (PARTS, len(x)), x, sums, size, -(-size // (PARTS * TILE)), BLOCK=TILE)
    return sums


def group_norm_forward(
    x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """`group_norm` without autograd, with `group_norm_moments`."""
    y, channels = torch.empty_like(x, dtype=dtype), x.shape[-1]
    positions = x.numel() // (len(x) * channels)
    grid, tile = _tiles(x)
    _launch(
        "group_norm",
        grid,
        x,
        sums,
        weight,
        weight if bias is None else bias,
        y,
        positions,
        channels,
        eps,
        **tile,
        PARTS=PARTS,
        BIAS=bias is not None,
    )
    return y


def group_norm_gradients(
    grad: Tensor, x: Tensor, sums: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, (B, ..., C), in its dtype, and of weight and bias, (C,), in float32."""
    size, channels, height = x[0].numel(), x.shape[-1], _rows_of_a_tile(x.shape[-1])
    tiles = -(-size // (channels * height * PARTS))
    by_part = torch.empty(2, len(x) * PARTS, channels, dtype=torch.float32, device=x.device)
    along, of_x = torch.empty_like(sums), torch.empty_like(x)
    _launch(
        "group_norm_sums",
        (PARTS, len(x)),
        grad,
        x,
        sums,
        weight,
        by_part[0],
        by_part[1],
        along,
        size,
        channels,
        eps,
        tiles,
        ROWS=height,
        CHANNELS=_power(channels),
        PARTS=PARTS,
    )
    grid, tile = _tiles(x)
    _launch(
        "group_norm_backward",
        grid,
        grad,
        x,
        sums,
        weight,
        along,
        of_x,
        size // channels,
        channels,
        eps,
        **tile,
        PARTS=PARTS,
    )
    of_weight, of_bias = by_part.sum(1)
    return of_x, of_weight, of_bias


def as_gradient(gradient: Tensor, of: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of what it is of; `None` where there is no such thing."""
    return None if of is None else gradient.to(of.dtype)


def _plain_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)


def _plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.float().movedim(-1, 1)
    return F.group_norm(y, 1, weight.float(), None if bias is None else bias.float(), eps).movedim(1, -1).to(dtype)


# ---- pooling, StarReLU --------------------------------------------------------------------------------------------------


def mean_minus_self(x: Tensor, size: int) -> Tensor:
    """As `layers.fast.mean_minus_self`, (B, H, W, C) to the same, with `has_kernels(x)`; keeps nothing."""
    return run(_MeanMinusSelf, x, size)


class _MeanMinusSelf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size, ctx.shape = size, x.shape
        return pooled(x, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        size = ctx.size
        if wants_plain_gradients(grads[0]):
            # linear: its gradient at any x is the one at 0
            x = torch.zeros(ctx.shape, dtype=grads[0].dtype, device=grads[0].device, requires_grad=True)
            return *plain_gradients(lambda x: plain_mean_minus_self(x, size), ctx, (x,), grads[0]), None
        return pooled(grads[0].contiguous(), size, backward=True), None


def pooled(x: Tensor, size: int, *, backward: bool = False) -> Tensor:
    """`mean_minus_self` without autograd, or the gradient of its input."""
    height, width, channels = x.shape[1:]
    y = torch.empty_like(x)
    grid, tile = _tiles(x, TILE // 4)
    _launch("mean_minus_self", grid, x, y, height, width, channels, **tile, REACH=size // 2, BACKWARD=backward)
    return y


def plain_mean_minus_self(x: Tensor, size: int) -> Tensor:
    """torch's form of `mean_minus_self`."""
    return average_pool(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1) - x


def average_pool(image: Tensor, size: int) -> Tensor:
    """Means over the image's part of windows with stride 1, (B, C, H, W) to the same, by torch.

    Args:
        image: In eager code on a GPU it is put in channels-first order of memory: in channels-last order torch's gradients of
            a padded average are wrong there, without a word (torch 2.11; https://github.com/pytorch/pytorch/issues/188344).
        size: Of the windows, odd.
    """
    if not torch.jit.is_scripting() and _is_pooled_wrongly(image):
        image = image.contiguous()
    return F.avg_pool2d(image, size, stride=1, padding=size // 2, count_include_pad=False)


@torch.jit.unused
def _is_pooled_wrongly(image: Tensor) -> bool:
    return image.device.type == "cuda" and not torch.compiler.is_compiling()


def star_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * relu(x)^2 + shift, (...) to the same in x's dtype, with `has_kernels(x)`; scale and shift are (1,). Keeps x."""
    return run(_StarRelu, x, scale, shift)


class _StarRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        return star_relu_forward(x, scale, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, shift = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(plain_star_relu, ctx, (x, scale, shift), grads[0])
        of_x, of_scale, of_shift = star_relu_gradients(grads[0].contiguous(), x, scale)
        return of_x, of_scale.to(scale.dtype), of_shift.to(shift.dtype)


def star_relu_forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`star_relu` without autograd."""
    y = torch.empty_like(x)
    _launch("star_relu", (-(-x.numel() // TILE),), x, scale, shift, y, x.numel(), BLOCK=TILE)
    return y


def star_relu_gradients(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, and of scale and shift, (1,), in float32."""
    programs, of_x = -(-x.numel() // TILE), torch.empty_like(x)
    sums = torch.empty(programs, 2, dtype=torch.float32, device=x.device)
    _launch("star_relu_backward", (programs,), grad, x, scale, of_x, sums, x.numel(), BLOCK=TILE)
    of_scale, of_shift = sums.sum(0).split(1)
    return of_x, of_scale, of_shift


def plain_star_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """torch's form of `star_relu`."""
    relu = F.relu(x)
    return scale.to(x.dtype) * (relu * relu) + shift.to(x.dtype)


def _tiles(x: Tensor, numbers: int | None = None) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs for tiles of each sample, (B, ..., C), and the size of a tile, whose channels are a power of two.

    Args:
        x: The samples.
        numbers: In a tile; default `TILE`.
    """
    numbers = numbers or TILE
    channels = x.shape[-1]
    positions = x.numel() // (len(x) * channels)
    width = channels & -channels  # the largest that divides them
    width = min(width if width >= 16 else _power(channels), 512, numbers)
    height = numbers // width
    return (-(-positions // height) * -(-channels // width), len(x)), {"ROWS": height, "CHANNELS": width}


def _rows_of_a_tile(channels: int) -> int:
    return max(1, TILE // _power(channels))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
