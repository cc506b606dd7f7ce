"""The limit of a training step on the machine at hand: its matrix products and convolutions alone.

In it: of every linear layer, convolution, batched product and attention of a model the forward pass, the gradient of the
input (not where the input is the images) and the gradient of the weights, of the shapes that the model has, for the
samples that stochastic depth keeps. Each of these is done in the fastest of the ways at hand (`Operation.ways`), which a
short trial at the full batch finds before anything is measured; products of attention may be torch's fused kernel, with
its softmax, where that is faster than the products alone.

Not in it: biases, norms, activations, scales, pooling, softmax, additions, gathering and scattering, casts, the loss, the
optimizer. Operands lie in a few buffers that all operations share, so that the caches are warmer than in a real step. A
step therefore cannot be expected to reach the limit; how far above it lies is what a model's other work costs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import wait
from layers.fast import weight_gradient
from layers.fast_conv import depthwise_conv, depthwise_weight_gradient
from layers.fast_patches import patch_weight_gradient
from stochastic_depth.blocks import find_blocks

Direction = Literal["forward", "input", "weight"]
"""A pass through an operation: its result, the gradient of its input, or that of its weight."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Way: TypeAlias = Callable[[], Any]

aten = torch.ops.aten


class Pool:
    """Buffers that operands are views of, one for each role; each as large as its largest operand.

    Args:
        device: Of the buffers.
        dtype: Of the buffers.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, role: str, *shape: int) -> Tensor:
        """A contiguous tensor of that shape with normally distributed values, shared by all takers of the role."""
        size = math.prod(shape)
        if role not in self._buffers or self._buffers[role].numel() < size:
            self._buffers[role] = torch.randn(size, device=self.device).mul_(0.1).to(self.dtype)
        return self._buffers[role][:size].view(shape)

    def take_image(self, role: str, layout: str, *shape: int) -> Tensor:
        """(B, C, H, W), in the memory of `channels_last` or of `contiguous`."""
        batch, channels, height, width = shape
        if layout == "contiguous":
            return self.take(role, *shape)
        return self.take(role, batch, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Operation:
    """One product or convolution of one sample; what the samples share are weights."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of one sample."""
        raise NotImplementedError

    def ways(self, direction: Direction, samples: int, pool: Pool) -> dict[str, Way]:
        """All ways at hand to do one pass for that many samples, by name, their operands in place."""
        raise NotImplementedError

    def passes(self, direction: Direction) -> int:
        """What a pass costs in multiply-accumulates, as a multiple of the forward pass; 0: there is no such pass."""
        return 1


@dataclass(frozen=True)
class Linear(Operation):
    """(rows, inputs) times (outputs, inputs) transposed.

    Ways: a matrix product, as a linear layer does it, a 1x1 convolution of (B, C, rows, 1) in two memory layouts, and for
    the weight's gradient in bfloat16 on a CPU ours, which takes matrix tiles where there are some.
    """

    rows: int
    inputs: int
    outputs: int

    @property
    def macs(self) -> int:
        return self.rows * self.inputs * self.outputs

    def ways(self, direction: Direction, samples: int, pool: Pool) -> dict[str, Way]:
        x = pool.take("x", samples * self.rows, self.inputs)
        g = pool.take("g", samples * self.rows, self.outputs)
        w = pool.take("w", self.outputs, self.inputs)
        products: dict[Direction, dict[str, Way]] = {
            "forward": {"linear": lambda: F.linear(x, w)},
            "input": {"product": lambda: g @ w},
            "weight": {"product": lambda: g.t() @ x, "product transposed": lambda: x.t() @ g},
        }
        if pool.device.type == "cpu" and pool.dtype == torch.bfloat16:
            products["weight"]["ours"] = lambda: weight_gradient(g, x)
        convolution = Convolution(self.inputs, self.rows, 1, self.outputs)
        return products[direction] | convolution.ways(direction, samples, pool)


@dataclass(frozen=True)
class Convolution(Operation):
    """Of (channels, height, width), with a kernel (outputs, channels / groups, *kernel).

    Ways: memory in channels-last order or contiguous; the gradient of a weight in bfloat16 also by way of float32, and
    that of a dense one in bfloat16 on a CPU as of a linear layer of patches; of depthwise ones our kernels' ways, or as a
    convolution.
    """

    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    @property
    def keeps_size(self) -> bool:
        """Whether the kernel has an odd side and each position of the input one of the result."""
        return (self.stride, self.dilation) == ((1, 1), (1, 1)) and tuple(
            2 * p + 1 for p in self.padding
        ) == self.kernel

    @property
    def macs(self) -> int:
        return math.prod((*self.out_size, self.outputs, self.channels // self.groups, *self.kernel))

    def ways(self, direction: Direction, samples: int, pool: Pool) -> dict[str, Way]:
        found: dict[str, Way] = {}
        for layout in ("channels_last", "contiguous"):
            x = pool.take_image("x", layout, samples, self.channels, self.height, self.width)
            g = pool.take_image("g", layout, samples, self.outputs, *self.out_size)
            w = pool.take_image("w", layout, self.outputs, self.channels // self.groups, *self.kernel)
            shape = (self.stride, self.padding, self.dilation)
            if direction == "forward":
                run = partial(F.conv2d, x, w, None, *shape, self.groups)
            else:
                wanted = [direction == "input", direction == "weight", False]
                run = partial(
                    aten.convolution_backward, g, x, w, None, *map(list, shape), False, [0, 0], self.groups, wanted
                )
            found[f"convolution {layout}"] = run
            if direction == "weight" and pool.dtype == torch.bfloat16 and self.kernel != (1, 1):
                # torch's bfloat16 kernel can be several times slower than two casts and the one in float32
                found[f"convolution {layout} in float32"] = lambda args=run.args: aten.convolution_backward(
                    *(a.float() for a in args[:3]), *args[3:]
                )
            is_bfloat16_on_cpu = pool.dtype == torch.bfloat16 and pool.device.type == "cpu"
            if direction == "weight" and is_bfloat16_on_cpu and self.groups == 1 and self.dilation == (1, 1):
                sizes = (self.kernel, self.stride, self.padding)
                found[f"patches {layout}"] = partial(patch_weight_gradient, g, x, *sizes)
            if self.keeps_size and self.groups == self.channels == self.outputs:
                if direction == "weight":
                    images = (g.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1))
                    found[f"depthwise {layout}"] = partial(depthwise_weight_gradient, *images, w)
                elif is_bfloat16_on_cpu:
                    image, kernel = (x, w) if direction == "forward" else (g, w.flip(2, 3))
                    found[f"depthwise {layout}"] = partial(depthwise_conv, image, kernel, None)
        return found


@dataclass(frozen=True)
class Product(Operation):
    """`groups` matrix products (rows, inner) times (inner, columns) of activations."""

    groups: int
    rows: int
    inner: int
    columns: int

    @property
    def macs(self) -> int:
        return self.groups * self.rows * self.inner * self.columns

    def ways(self, direction: Direction, samples: int, pool: Pool) -> dict[str, Way]:
        groups = samples * self.groups
        x, w, g = (
            pool.take(role, groups, *shape)
            for role, shape in zip(
                "xwg", ((self.rows, self.inner), (self.inner, self.columns), (self.rows, self.columns)), strict=True
            )
        )
        if direction == "forward":
            return {"product": lambda: torch.bmm(x, w)}
        if direction == "input":
            return {"product": lambda: torch.bmm(g, w.mT)}
        return {"product": lambda: torch.bmm(x.mT, g)}


@dataclass(frozen=True)
class Attention(Operation):
    """`heads` attentions of `queries` over `keys` positions; the gradients of all three inputs are one pass, `input`.

    Ways: the products alone (two, and four for the gradients), or torch's fused kernel with its softmax.
    """

    heads: int
    queries: int
    keys: int
    width: int

    @property
    def macs(self) -> int:
        return 2 * self.heads * self.queries * self.keys * self.width

    def passes(self, direction: Direction) -> int:
        return {"forward": 1, "input": 2, "weight": 0}[direction]

    def ways(self, direction: Direction, samples: int, pool: Pool) -> dict[str, Way]:
        shape = (samples, self.heads)
        q, g = (pool.take(role, *shape, self.queries, self.width) for role in ("x", "g"))
        k, v = (pool.take(role, *shape, self.keys, self.width) for role in ("k", "v"))
        p = pool.take("p", *shape, self.queries, self.keys)
        if direction == "forward":
            return {
                "products": lambda: (q @ k.mT, p @ v),
                "fused": lambda: F.scaled_dot_product_attention(q, k, v),
            }
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
            out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
        return {
            "products": lambda: (p.mT @ g, g @ v.mT, p @ k, p.mT @ q),
            "fused": lambda: torch.autograd.grad(out, leaves, g, retain_graph=True),
        }


@dataclass(frozen=True)
class Placed:
    """An operation of a model.

    Attributes:
        operation: What is computed for a sample.
        block: Index of the residual block whose stochastic depth decides on its samples; `None`: it sees all.
        on_images: Whether its input is the images, which need no gradient.
    """

    operation: Operation
    block: int | None
    on_images: bool = False

    @property
    def directions(self) -> list[Direction]:
        """The passes that it has."""
        return [d for d in DIRECTIONS if self.operation.passes(d) and not (self.on_images and d == "input")]


class _Recorder(TorchDispatchMode):
    """Writes down the operations of a forward pass, with the samples that each saw."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Operation, int]] = []  # with the first dimension, which grows with the samples
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if not self.off:
            if func in (aten.mm.default, aten.addmm.default):
                x, w = args[-2:]
                self.found.append((Linear(1, w.shape[0], w.shape[1]), x.shape[0]))
            elif func in (aten.bmm.default, aten.baddbmm.default):
                x, w = args[-2:]
                self.found.append((Product(1, x.shape[1], x.shape[2], w.shape[2]), x.shape[0]))
            elif func is aten.convolution.default:
                x, w, _, stride, padding, dilation, _, _, groups = args
                geometry = (tuple(each) for each in (w.shape[2:], stride, padding, dilation))
                self.found.append((Convolution(*x.shape[1:], w.shape[0], *geometry, groups), x.shape[0]))  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))


class _AttentionRecorder(TorchFunctionMode):
    """Writes down attention as one operation, before torch chooses how to compute it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k = args[:2]
        batch, heads, queries, width = q.shape
        self.recorder.found.append((Attention(heads, queries, k.shape[2], width), batch))
        self.recorder.off = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.off = False


def find_operations(model: nn.Module, input_size: Sequence[int]) -> list[Placed]:
    """The products and convolutions of a model's forward pass, each with the block that it belongs to.

    The model runs twice on the meta device, without computing: with all samples, and with one sample less for each
    block than for the block before. What an operation saw less tells its block.

    Args:
        model: With stochastic depth that `set_drop_path` has set in mode `skip`. It is of no use afterwards: it goes to
            the meta device, and its rates change.
        input_size: (C, H, W).

    Raises:
        ValueError: An operation takes no whole number of samples.
    """
    model = model.to("meta").train()
    blocks = find_blocks(model)
    batch = len(blocks) + 2
    images = torch.empty(batch, *input_size, device="meta")
    runs = []
    for share in (0, 1):
        for number, block in enumerate(blocks, start=1):
            for module in block.drop_paths.values():
                module.mode, module.break_even, module.drop_prob = "skip", 0.0, share * number / batch
                module.multiplier = 1.0
        recorder = _Recorder()
        with torch.no_grad(), recorder, _AttentionRecorder(recorder):
            model(images)
        runs.append(recorder.found)
    placed = []
    for (operation, full), (_, less) in zip(*runs, strict=True):
        missing = batch * (full - less) / full
        if full % batch or missing != int(missing):
            raise ValueError(f"{operation} took {full} and {less} rows of {batch} samples")
        block = int(missing) - 1 if missing else None
        placed.append(Placed(_of_one_sample(operation, full // batch), block, on_images=not placed))
    return placed


def _of_one_sample(operation: Operation, groups: int) -> Operation:
    """An operation as recorded, of which `groups` belong to one sample."""
    match operation:
        case Linear(_, inputs, outputs):
            return Linear(groups, inputs, outputs)
        case Convolution(kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1) as conv:
            return Linear(groups * conv.height * conv.width, conv.channels, conv.outputs)
        case Product(_, rows, inner, columns):
            return Product(groups, rows, inner, columns)
        case Attention(heads, queries, keys, width):
            return Attention(groups * heads, queries, keys, width)
    if groups != 1:
        raise ValueError(f"{operation} runs {groups} times for a sample")
    return operation


def kept_samples(rates: Sequence[float], batch: int) -> list[int]:
    """Samples that each block keeps: the expected number in whole samples, the rest carried on to the next block."""
    kept, carry = [], 0.0
    for rate in rates:
        exact = batch * (1.0 - rate) + carry
        kept.append(min(max(round(exact), 0), batch))
        carry = exact - kept[-1]
    return kept


@dataclass
class Ways:
    """The fastest way for each pass of each operation, found once by a trial.

    Attributes:
        pool: Where operands lie.
        batch: Samples that trials are made with.
        seconds: The trials: by operation and pass the fastest of three by way, in seconds.
    """

    pool: Pool
    batch: int
    seconds: dict[tuple[Operation, Direction], dict[str, float]] = field(default_factory=dict)

    def best(self, operation: Operation, direction: Direction) -> str:
        """Name of the fastest way."""
        key = (operation, direction)
        if key not in self.seconds:
            ways = operation.ways(direction, self.batch, self.pool)
            self.seconds[key] = {name: self._try(run) for name, run in ways.items()}
        times = self.seconds[key]
        return min(times, key=lambda name: times[name])

    def _try(self, run: Way, times: int = 3) -> float:
        found = []
        for _ in range(times + 1):  # the first warms up
            wait(self.pool.device)
            start = time.perf_counter()
            run()
            wait(self.pool.device)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def facts(self) -> list[dict[str, Any]]:
        """The trials for a JSON: milliseconds by way, the fastest first."""
        return [
            {
                "operation": repr(operation),
                "pass": direction,
                "ms": {name: round(1000 * s, 3) for name, s in sorted(times.items(), key=lambda item: item[1])},
            }
            for (operation, direction), times in self.seconds.items()
        ]


class Limit:
    """The products and convolutions of one training step, ready to run.

    Args:
        operations: Of the model.
        rates: Drop rate of each block.
        ways: Whose batch is that of the step.

    Attributes:
        macs: Multiply-accumulates of the step, forward and backward.
    """

    def __init__(self, operations: Sequence[Placed], rates: Sequence[float], ways: Ways) -> None:
        kept: Mapping[int | None, int] = {None: ways.batch, **dict(enumerate(kept_samples(rates, ways.batch)))}
        self.macs = 0
        self._runs: list[Way] = []
        with torch.no_grad():
            for each in operations:  # all trials first: they are the largest that buffers must hold
                for direction in each.directions:
                    ways.best(each.operation, direction)
            for direction in DIRECTIONS:
                for each in operations if direction == "forward" else reversed(operations):
                    samples = kept[each.block]
                    if not samples or direction not in each.directions:
                        continue
                    way = ways.best(each.operation, direction)
                    self._runs.append(each.operation.ways(direction, samples, ways.pool)[way])
                    self.macs += samples * each.operation.macs * each.operation.passes(direction)

    def run(self) -> None:
        """All of it once."""
        with torch.no_grad():
            for run in self._runs:
                run()
