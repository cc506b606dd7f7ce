"""Faster ways of the same on a CPU in training: passes over memory in one, where torch takes several.

An activation with its gradient and that of the bias, StarReLU and its gradients, sums over rows, layer norm with its
gradients summed in float32, softmax of scores with their bias, pooling minus its input; the gradients of depthwise
convolutions' weights, and in bfloat16 these convolutions; attention over some hundred tokens, in bfloat16 where the
processor has its products (AVX512-BF16, AMX); and on matrix tiles (AMX) the gradients of linear layers' weights in bfloat16.
They are written in C (`cpu_*.c`), and `cpu_compiler` compiles them.

Who may take them, and how they are turned off, is said in `layers.fast`.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cpu_compiler import library

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}

FEWEST = 2**18
"""Numbers of a tensor from which a kernel pays."""

MULTIPLE = 16
"""What channels must be a multiple of, as in the source."""

BLOCK = 64
"""Rows that are summed at a time, as in the source."""

SUMMED = 16
"""Images whose gradients of a bias are summed at a time, as in the source."""

SIDE = 32
"""Channels on the side of a block of products on matrix tiles, as in the source."""

PANEL = 288
"""Blocks of a panel of products, which stands in a core's second cache."""

MOST_TOKENS = 1024
"""Tokens of attention up to which the products of a head stand in a core's second cache."""

MOST_WIDTH = 256
"""Channels of a head, likewise."""

MOST_POSITIONS = 256
"""Positions of a line up to which those that a depthwise convolution meets stand on the stack of a thread, too."""

MOST_LINE = 2**15
"""Numbers up to which a line of an image stands on the stack of a thread, which may have 256 kB of it."""


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors, (..., C): large enough, without gaps, on a CPU where they work.

    Args:
        tensors: The first, of `FEWEST` numbers at least, says how large, and how many channels; `None` is passed over.
    """
    x = tensors[0]
    return (
        x is not None
        and x.numel() >= FEWEST
        and x.shape[-1] % MULTIPLE == 0
        and all(t is None or _is_readable(t) for t in tensors)
        and library() is not None
    )


def has_softmax(scores: Tensor) -> bool:
    """Whether `softmax` takes scores, (S, N, M)."""
    return (
        scores.numel() >= FEWEST
        and MULTIPLE <= scores.shape[-1] <= MOST_LINE
        and _is_readable(scores)
        and library() is not None
    )


def has_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `attention` takes queries, keys and values, (B, heads, N, D), and a bias, (E, N, N).

    It pays from a quarter of `FEWEST` numbers of each on.
    """
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in TYPES
        and q.ndim == 4
        and q.shape == k.shape == v.shape
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and 0 < q.shape[2] <= MOST_TOKENS
        and q.shape[3] % MULTIPLE == 0
        and 0 < q.shape[3] <= MOST_WIDTH
        and q.numel() >= FEWEST // 4
        and all(map(_holds_numbers, (q, k, v)))
        and (bias is None or _fits(bias, q))
        and _has_kernel(f"attention_{TYPES[q.dtype]}")
    )


def _fits(bias: Tensor, q: Tensor) -> bool:
    """Whether attention takes a bias, (E, N, N), of queries (B, heads, N, D)."""
    batch, heads, n, _ = q.shape
    is_bias = bias.ndim == 3 and bias.shape[1:] == (n, n) and len(bias) > 0 and batch * heads % len(bias) == 0
    return is_bias and q.dtype == torch.bfloat16 and bias.is_floating_point() and bias.device.type == "cpu"


def _is_readable(x: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory one behind another."""
    return x.dtype in TYPES and x.is_contiguous() and _holds_numbers(x)


def _holds_numbers(x: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory as it says: none that is negated when it is read, or stands for zeros."""
    return x.device.type == "cpu" and not x.is_neg() and not x._is_zerotensor()  # type: ignore[attr-defined]


def _has_kernel(name: str) -> bool:
    """Whether there is a kernel, which some processors have no instructions for."""
    return hasattr(library(), name)


def has_activation(x: Tensor, act: str) -> bool:
    """Whether `activation` takes x, (..., C), and gains by it: gelu only in bfloat16 on processors with AVX-512."""
    short = act != "gelu" or (x.dtype == torch.bfloat16 and _has_kernel("has_short_gelu"))
    return short and has_kernels(x)


def activation(x: Tensor, act: str) -> Tensor:
    """gelu, relu, squared_relu or silu of x, (..., C), with `has_kernels(x)`."""
    y = torch.empty_like(x)
    _start(f"{act}_{TYPES[x.dtype]}", x.numel() // MULTIPLE, x, y)
    return y


def activation_backward_(x: Tensor, grad: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """An activation of its input again, and its gradient: grad becomes grad * act'(x).

    Args:
        x: (..., C), with `has_kernels(x, grad)`.
        grad: Gradient of the activation, in the same dtype and shape.
        act: gelu, relu, squared_relu or silu.

    Returns:
        act(x), and the sums of the new grad over all rows, (C,) in float32.
    """
    y, sums = torch.empty_like(x), _blocks(x)
    _start(f"{act}_backward_{TYPES[x.dtype]}", len(sums), x, grad, y, sums, *_rows(x))
    return y, sums.sum(0)


def star_relu(x: Tensor, scale: float, shift: float) -> Tensor:
    """scale * relu(x)^2 + shift of x, (..., C), with `has_kernels(x)`."""
    y = torch.empty_like(x)
    _start(f"star_relu_{TYPES[x.dtype]}", x.numel() // MULTIPLE, x, y, scale, shift)
    return y


def star_relu_backward_(x: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of `star_relu`: grad becomes that of x.

    Args:
        x: (..., C), with `has_kernels(x, grad)`.
        grad: Gradient of the result, in the same dtype and shape.
        scale: As given.

    Returns:
        Gradients of scale and shift, without dimensions, in float32.
    """
    n, d = _rows(x)
    sums = x.new_empty(-(-n // BLOCK), 2, dtype=torch.float32)
    _start(f"star_relu_backward_{TYPES[x.dtype]}", len(sums), x, grad, sums, n, d, scale)
    of_scale, of_shift = sums.sum(0).unbind(0)
    return of_scale, of_shift


def column_sums(x: Tensor) -> Tensor:
    """Sums over all rows of (..., C), with `has_kernels(x)`: (C,) in float32."""
    sums = _blocks(x)
    _start(f"column_sums_{TYPES[x.dtype]}", len(sums), x, sums, *_rows(x))
    return sums.sum(0)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.native_layer_norm` over the last dimension.

    Args:
        x: (..., C), with `has_kernels(x, weight, bias)`.
        weight: (C,) in float32, or `None`.
        bias: (C,) in float32, or `None`.
        eps: Added to the variance.
        dtype: Of the result.

    Returns:
        The result, and means and reciprocal standard deviations of the rows, (N,) in float32.
    """
    n, d = _rows(x)
    y, (mean, rstd) = torch.empty_like(x, dtype=dtype), x.new_empty(2, n, dtype=torch.float32)
    _start(f"layer_norm_{TYPES[x.dtype]}_{TYPES[dtype]}", n, x, weight, bias, y, mean, rstd, d, float(eps))
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *, of_input: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `layer_norm`.

    Args:
        grad: Of its result, without gaps.
        x: Its input.
        weight: Its weight.
        mean: Of the rows.
        rstd: Of the rows.
        of_input: Whether the gradient of x is wanted.

    Returns:
        Gradients of x, else `None`, of the weight and of the bias, the last two (C,) in float32.
    """
    of_x, sums = torch.empty_like(x) if of_input else None, _blocks(x, 2)
    kernel = f"layer_norm_backward_{TYPES[x.dtype]}_{TYPES[grad.dtype]}"
    _start(kernel, sums.shape[1], grad, x, weight, mean, rstd, of_x, sums, *_rows(x))
    of_weight, of_bias = sums.sum(1).unbind(0)
    return of_x, of_weight, of_bias


def softmax(scores: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * scores + bias) over the last dimension.

    Args:
        scores: (S, N, M) without gaps, M of `MULTIPLE` at least.
        bias: (B, N, M) in float32, B a divisor of S, or `None`.
        scale: A number.
        dtype: Of the result: that of the scores, or bfloat16.
    """
    y, period = torch.empty_like(scores, dtype=dtype), 1 if bias is None else bias.shape[0] * bias.shape[1]
    n = scores.shape[0] * scores.shape[1]
    _start(f"softmax_{TYPES[scores.dtype]}_{TYPES[dtype]}", n, scores, bias, y, scores.shape[2], period, float(scale))
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: Queries, (B, heads, N, D), with `has_attention(q, k, v)`.
        k: Keys.
        v: Values.
        bias: (E, N, N), with E a divisor of B * heads, entry i for heads i, i + E, ... of all samples; or `None`.

    Returns:
        The result, (B, heads, N, D) with the heads of a token side by side in memory, and for `attention_backward` the
        logarithms to base 2 of the sums of e^score, (B, heads, N).
    """
    batch, heads, n, d = q.shape
    out = q.new_empty_strided(q.shape, (n * heads * d, d, heads * d, 1))
    logs = q.new_empty(batch, heads, n, dtype=torch.float32)
    sizes, room = (n, heads, d, float(d**-0.5)), _room(f"attention_room_{TYPES[q.dtype]}", n, d)
    if q.dtype == torch.float32:
        numbers = (*sizes, *room, *_strides(q, k, v, out))
        _start("attention_float", batch * heads, q, k, v, out, logs, *numbers)
        return out, logs
    added, entries = (None, 1) if bias is None else (_exponents(bias), len(bias))
    numbers = (*sizes, entries, *room, *_strides(q, k, v, out))
    _start("attention_bfloat16", batch * heads, q, k, v, added, out, logs, *numbers)
    return out, logs


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    of_bias: bool = False,
) -> Tensor | None:
    """Writes the gradients of `attention`; that of the bias is returned, (E, N, N) in float32, if it is wanted.

    Args:
        grad: Of its result, in any layout.
        q: Queries.
        k: Keys.
        v: Values.
        out: Its result.
        logs: Likewise.
        into: Where the gradients of q, k and v are written: their shape, strides alike and, but for the last, multiples
            of `MULTIPLE`, beginning where an allocation does or a multiple of that behind.
        bias: As given.
        of_bias: Whether the gradient of the bias is wanted.
    """
    batch, heads, n, d = q.shape
    if grad.stride() != out.stride() or not _holds_numbers(grad):
        grad = torch.empty_like(out).copy_(grad)
    sizes, room = (n, heads, d, float(d**-0.5)), _room(f"attention_room_{TYPES[q.dtype]}", n, d)
    strides, units = _strides(q, k, v, out, into[0]), batch * heads
    if q.dtype == torch.float32:
        numbers = (*sizes, *room, *strides)
        _start("attention_backward_float", units, grad, q, k, v, out, logs, *into, *numbers)
        return None
    added, sums, entries, works = None, None, 1, units
    if bias is not None:
        entries = len(bias)
        added = _exponents(bias.mT)
        works = -(-units // (entries * SUMMED)) * entries
        sums = added.new_empty(works, *added.shape[1:]) if of_bias else None
    numbers = (*sizes, entries, *room, units, *strides)
    _start("attention_backward_bfloat16", works, grad, q, k, v, added, out, logs, *into, sums, *numbers)
    return None if sums is None else sums.unflatten(0, (-1, entries)).sum(0)[..., :n].mT


def _exponents(bias: Tensor) -> Tensor:
    """A bias of attention, (E, N, M), as its kernels add it: of powers of 2, and with rows of whole vectors."""
    return F.pad(bias.float() * math.log2(math.e), (0, -bias.shape[-1] % MULTIPLE)).contiguous()


def has_tiles() -> bool:
    """Whether the processor has matrix tiles for products in bfloat16."""
    return _has_kernel("has_products") and bool(library().has_products())  # type: ignore[union-attr]


def has_products(*tensors: Tensor) -> bool:
    """Whether the processor has matrix tiles for products of these, (N, C) each, and they are large enough to pay."""
    return (
        all(x.dtype == torch.bfloat16 and x.shape[-1] % SIDE == 0 and _is_readable(x) for x in tensors)
        and min(x.numel() for x in tensors) >= FEWEST
        and has_tiles()
    )


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(D, C) in float32 of a linear layer's output's gradient (N, D) and its input (N, C), with `has_products`."""
    (n, d), c = grad.shape, x.shape[1]
    panels = _panels(d // SIDE, c // SIDE, torch.get_num_threads())
    rows, columns = (-(-size // SIDE // parts) * SIDE for size, parts in zip((d, c), panels, strict=True))
    room = _room("weight_gradient_room", rows, columns)
    out = grad.new_empty(d, c, dtype=torch.float32)
    _start("weight_gradient_bfloat16", math.prod(panels), grad, x, out, n, d, c, *panels, *room)
    return out


def _strides(*tensors: Tensor) -> list[int]:
    """Of samples, heads and tokens."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _room(size: str, *sizes: int) -> tuple[Tensor, int]:
    """Where the threads of a kernel work, and how many bytes of it are each one's, as a function of the kernels says."""
    size_of = getattr(library(), size)
    size_of.restype = ctypes.c_int64
    bytes_each = int(size_of(*map(ctypes.c_int64, sizes)))
    return torch.empty(torch.get_num_threads() * bytes_each, dtype=torch.uint8, device="cpu"), bytes_each


@functools.cache
def _panels(d: int, c: int, threads: int) -> tuple[int, int]:
    """Into how many panels a matrix of (D, C) blocks is cut for the least time, each of at most `PANEL` blocks."""

    def time(cut: tuple[int, int]) -> float:
        rows, columns = -(-d // cut[0]), -(-c // cut[1])
        # of a block's product, and of packing a block's rows, turned, and columns
        return -(-cut[0] * cut[1] // threads) * (rows * columns + 3.0 * rows + 2.5 * columns)

    cuts = [(i, j) for i in range(1, d + 1) for j in range(1, c + 1) if -(-d // i) * -(-c // j) <= PANEL]
    return min(cuts, key=time)


def mean_minus_self(x: Tensor, size: int, backward: bool = False) -> Tensor:
    """Average pooling with stride 1 minus the input, (B, H, W, C) to the same, or its gradient.

    Args:
        x: With `has_kernels(x)` and a line, W * C, of `MOST_LINE` numbers at most; the gradient of the result if backward.
        size: Odd window size; padding is not counted.
        backward: Whether the gradient is computed.
    """
    y = torch.empty_like(x)
    lines = x.shape[0] * x.shape[1]
    _start(f"mean_minus_self_{TYPES[x.dtype]}", lines, x, y, *x.shape[1:], size // 2, int(backward))
    return y


def has_depthwise(x: Tensor, kernel: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `depthwise` takes images, (B, H, W, C), once they are of a dtype, and a kernel with these sides, and gains."""
    return _takes_depthwise("depthwise", x, kernel, dtype)


def has_depthwise_weight(x: Tensor, kernel: Sequence[int], dtype: torch.dtype) -> bool:
    """The same of `depthwise_weight_gradient`, whose gradients are images like x."""
    return _takes_depthwise("depthwise_weight", x, kernel, dtype)


def _takes_depthwise(name: str, x: Tensor, kernel: Sequence[int], dtype: torch.dtype) -> bool:
    return (
        dtype in TYPES
        and kernel[0] == kernel[1]
        and x.numel() >= FEWEST // 4  # there is more to do than in a pass over memory
        and x.shape[-1] % MULTIPLE == 0
        and x.shape[-2] <= MOST_POSITIONS
        and _is_readable(x)
        and _has_kernel(f"{name}_{kernel[0]}_{TYPES[dtype]}")
    )


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, star: Tensor | None = None) -> Tensor:
    """A depthwise convolution with stride 1 that keeps the size, (B, H, W, C) to the same, with `has_depthwise`.

    Args:
        x: Images.
        weight: (C, 1, K, K).
        bias: (C,) or `None`.
        star: Scale and shift, (2,) in float32, of a StarReLU of the images that is convolved instead of them.
    """
    y, side = torch.empty_like(x), weight.shape[2]
    by_place = weight.float().flatten(1).t().contiguous()  # (K * K, C)
    bias = None if bias is None else bias.float().contiguous()
    units = len(x) * x.shape[-1] // MULTIPLE
    _start(f"depthwise_{side}_{TYPES[x.dtype]}", units, x, by_place, bias, y, *x.shape[1:], star)
    return y


def depthwise_weight_gradient(grad: Tensor, x: Tensor, side: int, star: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of a depthwise convolution's weight, (C, 1, K, K), and of its bias, (C,), in float32.

    Args:
        grad: Gradient of the result, (B, H, W, C), without gaps.
        x: Images, (B, H, W, C), with `has_depthwise_weight`.
        side: K.
        star: As of `depthwise`.
    """
    sums = x.new_empty(len(x), side * side + 1, x.shape[-1], dtype=torch.float32)
    units = len(x) * x.shape[-1] // MULTIPLE
    _start(f"depthwise_weight_{side}_{TYPES[x.dtype]}", units, x, grad, sums, *x.shape[1:], star)
    *of_weight, of_bias = sums.sum(0).split((side * side, 1))
    return of_weight[0].t().contiguous().view(-1, 1, side, side), of_bias[0]


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _blocks(x: Tensor, *number: int) -> Tensor:
    """Room for the sums of each block of rows, one or a number of them."""
    n, d = _rows(x)
    return x.new_empty(*number, -(-n // BLOCK), d, dtype=torch.float32)


class _Argument(ctypes.Union):
    _fields_ = (("p", ctypes.c_void_p), ("i", ctypes.c_int64), ("f", ctypes.c_float))


def _start(kernel: str, units: int, *args: Tensor | int | float | None) -> None:
    """Calls a kernel with its arguments, of tensors their addresses, over so many units of its work on torch's threads."""
    kernels: Any = library()
    given = (_Argument * len(args))(*map(_argument, args))
    kernels.start(getattr(kernels, kernel), given, ctypes.c_int64(units), ctypes.c_int(torch.get_num_threads()))


def _argument(value: Tensor | float | None) -> _Argument:
    if isinstance(value, int):
        return _Argument(i=value)
    if isinstance(value, float):
        return _Argument(f=value)
    return _Argument(p=None if value is None else value.data_ptr())
