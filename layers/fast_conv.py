"""Faster gradients of depthwise convolutions; see `layers.fast`.

On a CPU that of the weight is taken by a convolution. On a GPU that of the input is: the convolution of its gradient with
the kernel turned around, for which cuDNN takes half the time, and knows the shape already (a new one costs it some 20 ms).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import fast_cpu, fast_cuda
from layers.fast import (
    are_plain,
    dtype_of,
    fit,
    in_own_dtype,
    no_view,
    plain_gradients,
    run,
    shapes_of,
    stand_ins,
    takes,
    wants_plain_gradients,
)

LARGE_KERNELS = range(5, 8)
"""Sides of depthwise kernels whose gradient is taken as a convolution: oneDNN's own is good at smaller ones, and rows of
larger ones do not stay in the registers of AVX2."""

LARGE_IMAGES = 2**16
"""Numbers in the images from which that pays."""

SAMPLES_AT_A_TIME = 4
"""Samples of one such convolution: few shapes, and little memory, whatever the batch."""


def is_depthwise(conv: nn.Module) -> bool:
    """Whether a module is torch's depthwise convolution with stride 1 that keeps the size of its images."""
    return (
        type(conv) in (nn.Conv2d, FastDepthwiseConv2d)
        and conv.groups == conv.in_channels == conv.out_channels  # type: ignore[union-attr]
        and set(conv.stride) == set(conv.dilation) == {1}  # type: ignore[union-attr]
        and conv.padding_mode == "zeros"
        and all(side % 2 for side in conv.kernel_size)  # type: ignore[union-attr]
        and conv.padding in ("same", tuple(side // 2 for side in conv.kernel_size))  # type: ignore[union-attr]
    )


def has_fast_gradient(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether the gradient of a depthwise kernel is faster by a kernel of ours, or as a convolution.

    Args:
        x: Images, (B, C, H, W).
        kernel: Its sides.
    """
    return x.device.type == "cpu" and (
        fast_cpu.has_depthwise_weight(x.permute(0, 2, 3, 1), kernel, dtype_of(x))
        or (x.numel() >= LARGE_IMAGES and all(side in LARGE_KERNELS for side in kernel))
    )


def has_fast_forward(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether a depthwise convolution itself is faster by a kernel of ours; x: (B, C, H, W), kernel: its sides."""
    return fast_cpu.has_depthwise(x.permute(0, 2, 3, 1), kernel, dtype_of(x))


class FastDepthwiseConv2d(nn.Conv2d):
    """torch's depthwise convolution with `is_depthwise`, whose weight gets its gradient the fast way where that may be."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (B, C, H, W), and gains by it."""
        return (
            takes(x)  # first: torch.fx, which has no tensors, turns back here
            and type(self) is FastDepthwiseConv2d  # as in FastLinear
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and are_plain(self.weight, self.bias)
            and fit(x, self.weight, self.bias)
            and (self._trains_faster(x) or has_fast_forward(x, self.kernel_size))
        )

    def _trains_faster(self, x: Tensor) -> bool:
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        return is_trained and (x.device.type == "cuda" or has_fast_gradient(x, self.kernel_size))

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The convolution of (B, C, H, W), with `is_fast(x)`."""
        return depthwise_conv(x, self.weight, self.bias)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution with stride 1 that keeps the size, (B, C, H, W) to the same, with `takes(x)`.

    Args:
        x: Images.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or `None`.
    """
    dtype = dtype_of(x)
    return run(_DepthwiseConv, x.to(dtype), weight, None if bias is None else bias.to(dtype))


def star_relu_conv(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution of scale * relu(x)^2 + shift, (B, H, W, C) to the same, with `takes(x)`.

    On a CPU it keeps x only.

    Args:
        x: Output of another layer.
        scale: (1,).
        shift: (1,).
        weight: (C, 1, K, K), K odd.
    """
    dtype = dtype_of(x)
    if x.device.type != "cpu":
        x = x.to(dtype)
        form = fast_cuda.star_relu if fast_cuda.has_kernels(x) else fast_cuda.plain_star_relu
        return run(_DepthwiseConv, form(x, scale, shift).permute(0, 3, 1, 2), weight, None).permute(0, 2, 3, 1)
    # copies of the two numbers are kept, so that they may be changed in place, or come of inference mode, as of torch
    scale, shift = (number.to(dtype, copy=True) for number in (scale, shift))
    return run(_StarReluConv, x.to(dtype), scale, shift, weight)


def depthwise_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of a depthwise convolution with stride 1 that keeps the size.

    That of a sample is the depthwise convolution of its images, padded, with their gradients for the kernel.

    Args:
        grad: Gradient of the result, (B, H, W, C).
        x: Input, (B, H, W, C).
        weight: (C, 1, K, K), K odd; read for its shape and dtype only.

    Returns:
        (C, 1, K, K), summed over the samples in float32.
    """
    if fast_cpu.has_depthwise_weight(x, weight.shape[2:], x.dtype):
        return fast_cpu.depthwise_weight_gradient(grad.contiguous(), x, weight.shape[2])[0].to(weight.dtype)
    height, width, channels = x.shape[1:]
    found = weight.new_zeros(weight.shape, dtype=torch.float32)
    for some, grads in zip(x.split(SAMPLES_AT_A_TIME), grad.split(SAMPLES_AT_A_TIME), strict=True):
        if not some.numel():
            continue
        planes = len(some) * channels
        image = some.permute(0, 3, 1, 2).reshape(1, planes, height, width)
        kernel = grads.permute(0, 3, 1, 2).reshape(planes, 1, height, width)
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        out = F.conv2d(image, kernel, padding=padding, groups=planes)  # (1, planes, K, K)
        found += out.view(len(some), *weight.shape).sum(0, dtype=torch.float32)
    return found.to(weight.dtype)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)  # as torch does, not the bias, which may be changed in place
        ctx.shapes = shapes_of(x, weight, bias)
        return no_view(_conv(x, weight, bias))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(_plain_conv, ctx, stand_ins((x, weight, None), ctx.shapes, grads[0]), grads[0])
        grad, image = (each.permute(0, 2, 3, 1) for each in (grads[0], x))
        of_x, of_weight, of_bias = _depthwise_gradients(grad, image, weight, ctx.needs_input_grad[1])
        if not ctx.needs_input_grad[2]:
            of_bias = None
        else:
            of_bias = grads[0].sum((0, 2, 3)) if of_bias is None else of_bias.to(grad.dtype)
        return of_x.permute(0, 3, 1, 2), of_weight, of_bias


class _StarReluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift, weight)
        if has_fast_forward(x.permute(0, 3, 1, 2), weight.shape[2:]):
            return fast_cpu.depthwise(x, weight.to(x.dtype), None, _star(scale, shift))
        return no_view(_depthwise(_star_relu(x, scale, shift), weight))

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, shift, weight = ctx.saved_tensors
        if wants_plain_gradients(grads[0]):
            return plain_gradients(_plain_star_relu_conv, ctx, (x, scale, shift, weight), grads[0])
        grad, grad_weight, _ = _depthwise_gradients(grads[0], x, weight, ctx.needs_input_grad[3], (scale, shift))
        grad = grad.contiguous()
        if fast_cpu.has_kernels(x, grad):
            sums = fast_cpu.star_relu_backward_(x, grad, scale.item())
            return grad, *(of.to(x.dtype).reshape(1) for of in sums), grad_weight
        relu = F.relu(x)
        grad_shift = grad.sum().reshape(1)
        grad.mul_(relu)
        grad_scale = _inner(grad, relu).reshape(1)
        return grad.mul_(2 * scale), grad_scale, grad_shift, grad_weight


def _star_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * relu(x)^2 + shift."""
    if fast_cpu.has_kernels(x):
        return fast_cpu.star_relu(x, scale.item(), shift.item())
    relu = F.relu(x)
    return torch.addcmul(shift, relu, relu, value=scale.item(), out=relu)


def _star(scale: Tensor, shift: Tensor) -> Tensor:
    """StarReLU's two numbers as `fast_cpu` takes them."""
    return torch.cat((scale, shift)).float()


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, C) to the same."""
    return _conv(x.permute(0, 3, 1, 2), weight, None).permute(0, 2, 3, 1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W) to the same, in x's dtype; without gradients."""
    if has_fast_forward(x, weight.shape[2:]):
        return fast_cpu.depthwise(x.permute(0, 2, 3, 1), weight.to(x.dtype), bias).permute(0, 3, 1, 2)
    return _plain_conv(x, weight, bias)


def _plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_conv` by torch."""
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    return F.conv2d(x, weight.to(x.dtype), bias, padding=padding, groups=weight.shape[0])


def _plain_star_relu_conv(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """`star_relu_conv` by torch."""
    y = fast_cuda.plain_star_relu(x, scale, shift)
    return _plain_conv(y.permute(0, 3, 1, 2), weight, None).permute(0, 2, 3, 1)


def _depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, of_weight: bool, star: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a depthwise convolution.

    Args:
        grad: Of its result, (B, H, W, C).
        x: Its input, (B, H, W, C).
        weight: (C, 1, K, K).
        of_weight: Whether the weight's gradient is wanted.
        star: Scale and shift of a StarReLU of x, which is its input then.

    Returns:
        Those of the input and, if wanted, of the weight, each in its dtype, and of the bias in float32, where that comes at
        no cost.
    """
    turned = weight.flip(2, 3)
    if of_weight and fast_cpu.has_depthwise_weight(x, weight.shape[2:], x.dtype):
        grad = grad.contiguous()
        found, of_bias = fast_cpu.depthwise_weight_gradient(grad, x, weight.shape[2], star and _star(*star))
        return _depthwise(grad, turned), found.to(weight.dtype), of_bias
    if star is not None:
        x = _star_relu(x, *star)
    image = x.permute(0, 3, 1, 2)
    if of_weight and has_fast_gradient(image, weight.shape[2:]):
        return _depthwise(grad, turned), depthwise_weight_gradient(grad, x, weight), None
    by_turning = x.device.type != "cpu" or has_fast_forward(grad.permute(0, 3, 1, 2), weight.shape[2:])
    if by_turning and not of_weight:
        return _depthwise(grad, turned), None, None
    padding, wanted = [weight.shape[2] // 2, weight.shape[3] // 2], [not by_turning, of_weight, False]
    kernel = weight.to(x.dtype)
    of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), image, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], weight.shape[0], wanted
    )
    of_x = _depthwise(grad, turned) if by_turning else of_x.permute(0, 2, 3, 1)
    return of_x, None if of_kernel is None else of_kernel.to(weight.dtype), None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two tensors, the first contiguous."""
    if a.dtype != torch.float32:
        return (a * b).sum()
    return torch.dot(a.view(-1), b.reshape(-1))
