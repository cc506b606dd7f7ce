"""Kernels for NVIDIA's GPUs, in Triton, of what torch does in many passes over memory there; `layers.fast_cuda` calls them.

All compute in float32 whatever they read and write, and none adds with atomics, so results do not depend on the order in
which a GPU gets to its work. Sizes in comments are those of the arrays behind the pointers, all without gaps.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def put_rows(rows, order, base, result, count, factor, size, BLOCK: tl.constexpr, ON_BASE: tl.constexpr):
    """result[order[i]] = base[order[i]] + factor * rows[i], (B, size): the second for i < count, the first if it is there."""
    i = tl.program_id(1)
    row = tl.load(order + i).to(tl.int64) * size
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.zeros([BLOCK], tl.float32)
    if ON_BASE:
        value += tl.load(base + row + columns, mask=inside, other=0.0).to(tl.float32)
    # a row that is not there is not read
    there = inside & (i < count)
    value += factor * tl.load(rows + i.to(tl.int64) * size + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(result + row + columns, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def take_rows(source, kept, result, factor, size, BLOCK: tl.constexpr):
    """result[i] = factor * source[kept[i]], (B', size)."""
    i = tl.program_id(1)
    row = tl.load(kept + i).to(tl.int64) * size
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    value = factor * tl.load(source + row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + i.to(tl.int64) * size + columns, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(x, at, mask, channels, eps):
    """Rows of a tile with mean 0 and variance 1, and one over their standard deviations."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows"])
def layer_norm(
    x, weight, bias, y, rows, channels, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Of each of (rows, channels)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]
    value, _ = _normalised(x, at, mask, channels, eps)
    if WEIGHT:
        value *= tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def layer_norm_backward(
    grad, x, weight, grad_x, of_weight, of_bias, rows, channels, eps, tiles,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Gradient of x, (rows, channels), and for each program its part of those of weight and bias, (programs, channels)."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    by_weight = tl.zeros([ROWS, CHANNELS], tl.float32)  # rows are added up once, in the end
    by_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    if WEIGHT:
        scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        at = row[:, None] * channels + channel[None, :]
        normal, rstd = _normalised(x, at, mask, channels, eps)
        upstream = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        by_weight += upstream * normal
        by_bias += upstream
        if WEIGHT:
            upstream *= scale[None, :]
        along = tl.sum(upstream * normal, 1) / channels
        mean = tl.sum(upstream, 1) / channels
        value = rstd[:, None] * (upstream - mean[:, None] - normal * along[:, None])
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(of_weight + program * channels + channel, tl.sum(by_weight, 0), mask=channel < channels)
    tl.store(of_bias + program * channels + channel, tl.sum(by_bias, 0), mask=channel < channels)


@triton.jit
def moments(x, sums, size, blocks, BLOCK: tl.constexpr):
    """Sums of each part of a sample, (B, parts, 2): of the differences from its first number, and of their squares."""
    part, sample = tl.program_id(0), tl.program_id(1)
    x += sample.to(tl.int64) * size
    first = tl.load(x).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        at = (part * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        value = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - first, 0.0)
        total += value
        squares += value * value
    at = (sample * tl.num_programs(0) + part) * 2
    tl.store(sums + at, tl.sum(total, 0))
    tl.store(sums + at + 1, tl.sum(squares, 0))


@triton.jit
def _statistics(x, sums, sample, size, eps, PARTS: tl.constexpr):
    """Mean of a sample, and one over its standard deviation, from its `moments`."""
    first = tl.load(x + sample.to(tl.int64) * size).to(tl.float32)
    part = (sample * PARTS + tl.arange(0, PARTS)) * 2
    mean = tl.sum(tl.load(sums + part), 0) / size
    variance = tl.maximum(tl.sum(tl.load(sums + part + 1), 0) / size - mean * mean, 0.0)
    return first + mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _tile(positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Positions and channels of a program's tile of a sample, where they are, and which are there.

    Programs go through the channels first, CHANNELS at a time.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    position = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    at = position[:, None] * channels + channel[None, :]
    return position, channel, at, (position < positions)[:, None] & (channel < channels)[None, :]


@triton.jit
def group_norm(
    x, sums, weight, bias, y, positions, channels, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Of samples (B, positions, channels), with their `moments`."""
    sample, size = tl.program_id(1), positions * channels
    mean, rstd = _statistics(x, sums, sample, size, eps, PARTS)
    _, channel, at, mask = _tile(positions, channels, ROWS, CHANNELS)
    at += sample.to(tl.int64) * size
    scale = rstd * tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    value = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale[None, :]
    if BIAS:
        value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_sums(
    grad, x, sums, weight, of_weight, of_bias, along, size, channels, eps, tiles,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What each part of a sample adds to the gradients of weight and bias, (B, parts, channels), and of x, (B, parts, 2)."""
    part, sample = tl.program_id(0), tl.program_id(1)
    mean, rstd = _statistics(x, sums, sample, size, eps, PARTS)
    channel = tl.arange(0, CHANNELS)
    begin = sample.to(tl.int64) * size
    weights = tl.zeros([ROWS, CHANNELS], tl.float32)
    biases = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * channels + channel[None, :]
        mask = (at < size) & (channel < channels)[None, :]
        upstream = tl.load(grad + begin + at, mask=mask, other=0.0).to(tl.float32)
        normal = (tl.load(x + begin + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        weights += upstream * normal  # upstream is 0 where the mask is
        biases += upstream
    by_weight, by_bias = tl.sum(weights, 0), tl.sum(biases, 0)
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    place = sample * PARTS + part
    tl.store(of_weight + place * channels + channel, by_weight, mask=channel < channels)
    tl.store(of_bias + place * channels + channel, by_bias, mask=channel < channels)
    tl.store(along + place * 2, tl.sum(scale * by_bias, 0))
    tl.store(along + place * 2 + 1, tl.sum(scale * by_weight, 0))


@triton.jit
def group_norm_backward(
    grad, x, sums, weight, along, grad_x, positions, channels, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of x, (B, positions, channels), with `along` of `group_norm_sums`."""
    sample, size = tl.program_id(1), positions * channels
    mean, rstd = _statistics(x, sums, sample, size, eps, PARTS)
    part = (sample * PARTS + tl.arange(0, PARTS)) * 2
    by_bias = tl.sum(tl.load(along + part), 0) / size
    by_weight = tl.sum(tl.load(along + part + 1), 0) / size
    _, channel, at, mask = _tile(positions, channels, ROWS, CHANNELS)
    at += sample.to(tl.int64) * size
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    upstream = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    value = rstd * (upstream - by_bias - normal * by_weight)
    tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def mean_minus_self(
    x, y, height, width, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, REACH: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Means over the image's part of windows, minus the middle, (B, height, width, channels); or the gradient of that."""
    position, _, at, mask = _tile(height * width, channels, ROWS, CHANNELS)
    at += tl.program_id(1).to(tl.int64) * (height * width * channels)
    row, column = position // width, position % width
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in tl.static_range(-REACH, REACH + 1):  # type: ignore[attr-defined]
        for j in tl.static_range(-REACH, REACH + 1):  # type: ignore[attr-defined]
            other_row, other_column = row + i, column + j
            there = (other_row >= 0) & (other_row < height) & (other_column >= 0) & (other_column < width)
            value = tl.load(x + at + (i * width + j) * channels, mask=mask & there[:, None], other=0.0).to(tl.float32)
            if BACKWARD:  # each gradient is shared by the window around it
                shared_by = _positions(other_row, height, REACH) * _positions(other_column, width, REACH)
                value *= tl.where(there, 1.0 / tl.where(there, shared_by, 1.0), 0.0)[:, None]
            total += value
    if not BACKWARD:
        total *= (1.0 / (_positions(row, height, REACH) * _positions(column, width, REACH)))[:, None]
    total -= tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _positions(at, length, REACH: tl.constexpr):
    """How many of the positions from at - REACH to at + REACH are there."""
    return (tl.minimum(at + REACH, length - 1) - tl.maximum(at - REACH, 0) + 1).to(tl.float32)


@triton.jit
def star_relu(x, scale, shift, y, size, BLOCK: tl.constexpr):
    """scale * relu(x)^2 + shift, (size,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    value = tl.load(scale).to(tl.float32) * value * value + tl.load(shift).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def star_relu_backward(grad, x, scale, grad_x, sums, size, BLOCK: tl.constexpr):
    """Gradient of x, (size,), and for each program its part of those of scale and shift, (programs, 2)."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    upstream = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    relu = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    value = 2.0 * tl.load(scale).to(tl.float32) * relu * upstream
    tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=at < size)
    tl.store(sums + program * 2, tl.sum(upstream * relu * relu, 0))
    tl.store(sums + program * 2 + 1, tl.sum(upstream, 0))
