"""Faster ways of the same: what runs in eager code instead of torch's plain operators, and when.

Each has its plain form beside it and equals that in outputs and gradients but for rounding. They are chosen by device,
dtype and size, never by timing, so the same machine always computes the same bits. On a CPU:

- `linear`: oneDNN's inner product forward and for the input's gradient. torch gives float32 to MKL, whose kernels are
  slow on other vendors' processors; on Intel's they stay for few rows.
- `fast_mlp`, and `fast_conv.star_relu_conv`: an activation and the layer behind it keep the activation's input only and
  compute the activation again in backward, so that the widest tensors of a block are kept once instead of two to four
  times.
- `fast_conv.depthwise_conv`, and `star_relu_conv`: the gradient of a large depthwise kernel is taken by a convolution, of
  the images with their gradients, which oneDNN computes several times as fast as what it has for that.
- `mean_minus_self`: pooling minus its input in one tensor, keeping none.
- `fast_norm`: in bfloat16, the gradients of a layer norm's weight and bias summed in float32; torch's are 5 to 70 % off.
- `fast_attention`: with gradients, a kernel, or products and a softmax one after the other over few tokens.
- `weight_gradient`: in bfloat16, on processors with matrix tiles, a kernel whose sums stay in float32; `fast_patches`
  takes dense convolutions' gradients to it.
- `fast_cpu`: in training, what stands between the products in one pass over memory, by kernels compiled on the spot.

On a GPU, in float32 and half precision: `fast_cuda`'s kernels for taking and adding samples, norms, pooling and StarReLU,
`fast_conv` for the gradient of a depthwise convolution's input, and, as on a CPU, scales that are put into weights.

They run in eager code, on a CPU in float32 and in bfloat16 where oneDNN computes in it. Compiled, traced, scripted and
exported code, torch.func, forward-mode differentiation, dispatch modes (FLOP counters, fake tensors) and modules with hooks,
with parametrisations or replaced by others (LoRA, quantisation) get the plain form, and so do weights of a tensor subclass.
`set_fast_paths(False)`, in a training config `runtime.fast_paths: false`, turns all off. Models of other libraries take
them after `models.fast_layers.use_fast_layers`.
"""

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from layers import fast_cpu

FEWEST_PRODUCTS = 2**22
"""Multiplications of a linear layer from which oneDNN's call costs less than it saves."""

MANY_ROWS = 2**12
"""Rows of a linear layer's input, in float32, from which a convolution's gradient of the weight is the fastest, and
oneDNN's product on Intel's processors too."""

_PLAIN = (Tensor, nn.Parameter)
_enabled = True


def set_fast_paths(enabled: bool) -> None:
    """Turns the fast paths of this process on or off; on is the default."""
    global _enabled
    _enabled = enabled


def fast_paths() -> bool:
    """Whether the fast paths are on."""
    return _enabled


@contextmanager
def plain_paths() -> Iterator[None]:
    """The plain forms only, for comparisons."""
    before = _enabled
    set_fast_paths(False)
    try:
        yield
    finally:
        set_fast_paths(before)


def takes(x: Any, *modules: nn.Module) -> bool:
    """Whether fast paths may take an input, on a CPU or on a GPU, past some modules without calling them.

    Args:
        x: Input of the first.
        modules: Whose weights are read; each must be what it was built as, without hooks. Linear layers and convolutions
            must fit x, so that the plain form says what is wrong where they do not.
    """
    return (
        (is_eager(x) or is_eager(x, "cuda"))
        and _computes_in(dtype_of(x), x.device)
        and not torch_module._has_any_global_hook()
        and all(map(_is_bare, modules))
        and all(fit(x, *m._parameters.values()) for m in modules if isinstance(m, (nn.Linear, nn.Conv2d)))
    )


def is_eager(x: Any, device: str = "cpu") -> bool:
    """Whether what is computed from x, a tensor on devices of that type, runs now and as written, nobody looking on."""
    return (
        _enabled
        and not torch.compiler.is_compiling()
        and _is_plain(x)
        and x.device.type == device
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None  # type: ignore[attr-defined]
        and forward_ad._current_level < 0
    )


def are_plain(*weights: Tensor | None) -> bool:
    """Whether weights are nothing but numbers, not tensors of another library's kind."""
    return all(weight is None or _is_plain(weight) for weight in weights)


def fit(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether torch computes x with weights of these dtypes: x's own, or under autocast what that casts."""
    if autocast_dtype(x) is not None:
        return all(weight is None or weight.dtype != torch.float64 for weight in weights)
    return all(weight is None or weight.dtype == x.dtype for weight in weights)


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested


def is_linear(*modules: nn.Module) -> bool:
    """Whether modules are torch's linear layers themselves, not others in their place."""
    return all(type(module) in (nn.Linear, FastLinear) for module in modules)


def scaled(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight (D, C) and bias (D,) of a linear layer with a scale (D,) behind it."""
    if scale is None:
        return weight, bias
    return weight * scale[:, None], None if bias is None else bias * scale


def call(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer of (..., C), the fast way where that may be."""
    if is_linear(module) and takes(x, module):
        return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return module(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`, (..., C) -> (..., D), with `takes(x)`."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if not is_large(x, weight):
        return F.linear(*cast(x, weight, bias))
    return run(_Linear, *cast(x, weight, bias, leave=True))


def mean_minus_self(x: Tensor, size: int) -> Tensor:
    """Average pooling with stride 1 minus the input, (B, H, W, C) to the same, with `takes(x)`; keeps nothing."""
    return run(_MeanMinusSelf, x, size)


class FastLinear(nn.Linear):
    """torch's linear layer, which goes the fast way where that may be."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        return F.linear(x, self.weight, self.bias)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (..., C)."""
        # a parametrisation, which makes a class of its own, may compute another weight each time that one is read
        return is_linear(self) and takes(x) and are_plain(self.weight, self.bias) and fit(x, self.weight, self.bias)

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The layer on (..., C), with `is_fast(x)`."""
        return linear(x, self.weight, self.bias)


class _NoGradients:
    """The context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps nothing."""


def run(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """A function of autograd; without gradients past autograd, whose call of a function takes as long as a small layer."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_NoGradients(), *inputs)


def in_own_dtype(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of autograd's backward pass without autocast, which it may be called under.

    Products of float32 would be in another dtype then, which kernels beside them do not expect.
    """

    @functools.wraps(backward)
    def without_autocast(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return without_autocast


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, *_ = getattr(ctx, "needs_input_grad", (False, False))
        # as torch does, only what a gradient is computed of
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shapes = shapes_of(x, weight, bias)
        return no_view(product(x, weight.to(x.dtype), bias))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            plain = lambda x, weight, bias: F.linear(x, weight.to(x.dtype), bias)  # noqa: E731
            return plain_gradients(plain, ctx, stand_ins((x, weight, None), ctx.shapes, grads[0]), grads[0])
        grad = grads[0].contiguous()
        return (
            product(grad, weight.to(grad.dtype).t(), None) if ctx.needs_input_grad[0] else None,
            weight_gradient(grad, x) if ctx.needs_input_grad[1] else None,
            bias_gradient(grad) if ctx.needs_input_grad[2] else None,
        )


class _MeanMinusSelf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size, x = size, x.contiguous()
        return no_view(fast_cpu.mean_minus_self(x, size) if _pools(x) else _pool(x, size).sub_(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        size = ctx.size
        grad = grads[0].contiguous()
        if _pools(grad) and not wants_plain_gradients(grads[0]):
            return fast_cpu.mean_minus_self(grad, size, backward=True), None
        # sums over windows again, of each gradient by its window's size; torch's own backward in bfloat16 is slow
        share = _pool(grad.new_ones(1, *grad.shape[1:3], 1), size, over_padding=True)
        return _pool(grad / share, size, over_padding=True).sub_(grad), None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN, or the plain way where there is little of it."""
    if not is_large(x, weight):
        return F.linear(x, weight, bias)
    return onednn_product(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    """act(x @ weight.T + bias) by oneDNN; act: none, relu or gelu."""
    # a bias is read as if its numbers lay one behind another
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none" if act == "gelu" else "")


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(D, C) of a linear layer's output's gradient (..., D) and its input (..., C), both without gaps.

    On matrix tiles that of bfloat16 is in float32, as sums are.
    """
    grad, x = _rows_of(grad), _rows_of(x)
    if fast_cpu.has_products(grad, x):
        return fast_cpu.weight_gradient(grad, x)
    if x.dtype == torch.float32 and len(x) >= MANY_ROWS:
        # of a 1 x 1 convolution on an image of 1 x N; products make a transposed copy, or cut so long a sum badly
        images = [rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2) for rows in (grad, x)]
        weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)  # its shape is looked at, not its numbers
        only_weight = (False, True, False)
        of_weight = torch.ops.aten.convolution_backward(
            *images, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, only_weight
        )[1]
        return of_weight.flatten(1)
    return grad.t() @ x


def bias_gradient(grad: Tensor) -> Tensor:
    """(D,) of a linear layer's output's gradient (..., D), without gaps."""
    if fast_cpu.has_kernels(grad):
        return fast_cpu.column_sums(grad).to(grad.dtype)
    return _rows_of(grad).sum(0)


def _rows_of(x: Tensor) -> Tensor:
    """(..., C) as (N, C)."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def no_view(y: Tensor) -> Tensor:
    """What a function of autograd returns, so that who gets it may change it in place: autograd forbids that of views."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def wants_plain_gradients(grad: Tensor) -> bool:
    """Whether a gradient is itself differentiated, backward or forward, or taken for many upstream gradients at once.

    The last is torch.func.vmap's way, and that of `is_grads_batched`.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_batched(grad)


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors at once, of `is_grads_batched` or torch.func."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.is_legacy_batchedtensor(x) or functorch.maybe_current_level() is not None


def shapes_of(*tensors: Tensor | None) -> list[torch.Size | None]:
    """Of what is perhaps not kept, for `stand_ins`."""
    return [None if tensor is None else tensor.shape for tensor in tensors]


def stand_ins(
    kept: tuple[Tensor | None, ...], shapes: list[torch.Size | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Inputs for `plain_gradients`: for what was not kept, since no gradient depends on its numbers, zeros."""
    # torch.func forbids requires_grad_()
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device, requires_grad=True)
    with torch.enable_grad():
        return tuple(
            zero.expand(shape) if tensor is None and shape is not None else tensor
            for tensor, shape in zip(kept, shapes, strict=True)
        )


def plain_gradients(plain: Any, ctx: Any, inputs: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the plain form, which can be differentiated again."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and ctx.needs_input_grad[i]]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # of views: an input that was computed from another, as where a layer is applied twice, counts as given
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        out = plain(*views)
    found = torch.autograd.grad(out, [views[i] for i in wanted], grad, create_graph=again)  # type: ignore[misc]
    of = dict(zip(wanted, found, strict=True))
    return tuple(of.get(i) for i in range(len(inputs)))


def _pools(x: Tensor) -> bool:
    """Whether there is a kernel for pooling x, (B, H, W, C)."""
    return fast_cpu.has_kernels(x) and x.shape[2] * x.shape[3] <= fast_cpu.MOST_LINE


def _pool(x: Tensor, size: int, *, over_padding: bool = False) -> Tensor:
    """Means over windows with stride 1, of the image's part of a window or, with zeros around it, of the whole."""
    image = x.permute(0, 3, 1, 2)
    y = F.avg_pool2d(image, size, stride=1, padding=size // 2, count_include_pad=over_padding)
    return y.permute(0, 2, 3, 1)


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer with that weight, (D, C), computes enough of x, (..., C), for oneDNN's product to pay."""
    if _HAS_FAST_MKL and dtype_of(x) == torch.float32 and x.numel() < MANY_ROWS * x.shape[-1]:
        return False
    return x.numel() * weight.shape[0] >= FEWEST_PRODUCTS


def dtype_of(x: Tensor) -> torch.dtype:
    """What a linear layer of x computes in."""
    # on a CPU one of float16 keeps it under autocast to bfloat16
    casts = x.dtype == torch.float32 or (x.device.type != "cpu" and x.dtype.is_floating_point)
    return (autocast_dtype(x) if casts else None) or x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to on x's device; `None` where it is off."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, leave: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the dtype that a linear layer of x computes in.

    Args:
        x: Input.
        weight: (D, C).
        bias: (D,) or `None`.
        leave: Whether a weight that is kept anyway, a parameter, stays what it is: who keeps it for backward and casts
            it twice keeps no copy.
    """
    dtype = dtype_of(x)
    return (
        x.to(dtype),
        weight if leave and weight.is_leaf else weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu":
        return dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32:
        return _HAS_ONEDNN and torch.backends.mkldnn.enabled  # type: ignore[return-value]
    return dtype == torch.bfloat16 and _HAS_BFLOAT16 and torch.backends.mkldnn.enabled  # type: ignore[return-value]


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class says, with weights that are nothing but numbers."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ) and are_plain(*module._parameters.values())


def _has_fast_mkl() -> bool:
    """Whether torch has MKL, and the processor is of the vendor that MKL is made for."""
    processor = platform.processor()
    # only Linux has this file, and only there platform does not know the vendor
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = file.read(1024)
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


_HAS_FAST_MKL = _has_fast_mkl()
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_BFLOAT16 = _HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
