"""Faster gradients of the weights of dense convolutions in bfloat16, on processors with matrix tiles; see `layers.fast`.

That of a convolution is that of a linear layer of its patches, for which `fast_cpu` has a kernel. oneDNN's own takes 1.4 to 6
times as long where there are many weights, as between the stages of a model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import fast_cpu
from layers.fast import (
    are_plain,
    bias_gradient,
    dtype_of,
    fit,
    in_own_dtype,
    plain_gradients,
    run,
    shapes_of,
    stand_ins,
    takes,
    wants_plain_gradients,
    weight_gradient,
)

LARGE_WEIGHTS = 2**18
"""Weights from which patches pay: below, writing them costs more than is gained."""

LARGE_POINTWISE = 2**16
"""The same where a patch is a position, which stays where it is."""

PATCHES = 2**24
"""Numbers in the patches that are written at a time: 32 MB."""


def is_dense(conv: nn.Module) -> bool:
    """Whether a module is torch's convolution of images with weights for which patches may pay."""
    if type(conv) not in (nn.Conv2d, FastConv2d):
        return False
    pointwise = set(conv.kernel_size) | set(conv.stride) == {1} and set(conv.padding) == {0}  # type: ignore[arg-type]
    return (
        conv.groups == 1
        and set(conv.dilation) == {1}  # type: ignore[arg-type]
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.weight.numel() >= (LARGE_POINTWISE if pointwise else LARGE_WEIGHTS)  # type: ignore[operator]
        and len(conv.weight) % fast_cpu.SIDE == conv.weight[0].numel() % fast_cpu.SIDE == 0  # type: ignore
    )


def is_fast_conv(x: Tensor, conv: nn.Module, *, bare: bool = True) -> bool:
    """Whether `conv2d` may take images, (B, C, H, W), and gains by it.

    Args:
        x: The images.
        conv: The convolution.
        bare: Whether it would not be called, so that it must not have hooks.
    """
    return (
        (takes(x, conv) if bare else _takes_inside(x, conv))  # first: torch.fx, which has no tensors, turns back here
        and is_dense(conv)
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and conv.weight.requires_grad  # type: ignore[union-attr]
        and x.ndim == 4
        and x.shape[1] == conv.in_channels
        and dtype_of(x) == torch.bfloat16
        and fast_cpu.has_tiles()
        and _has_runs(x, conv.kernel_size)  # type: ignore[arg-type]
    )


def _takes_inside(x: Tensor, conv: nn.Module) -> bool:
    """Whether fast paths may take x within a convolution's own forward, which hooks are around."""
    return takes(x) and are_plain(*conv._parameters.values()) and fit(x, *conv._parameters.values())


class FastConv2d(nn.Conv2d):
    """torch's convolution with `is_dense`, whose weight gets its gradient the fast way where that may be."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (B, C, H, W), and gains by it."""
        return is_fast_conv(x, self, bare=False)

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The convolution of (B, C, H, W), with `is_fast(x)`."""
        return conv2d(x, self)


def conv2d(x: Tensor, conv: Any) -> Tensor:
    """A convolution of (B, C, H, W), with `is_fast_conv`."""
    dtype = dtype_of(x)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return run(_Conv, x.to(dtype), conv.weight, bias, conv.stride, conv.padding)


def patch_weight_gradient(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient of the weight of a dense convolution.

    Args:
        grad: Gradient of the result, (B, D, H', W').
        x: Input, (B, C, H, W); fast where it lies in memory as channels_last, or has a few channels only.
        kernel: Its sides.
        stride: In positions.
        padding: In positions, of zeros.

    Returns:
        (D, C, *kernel), on matrix tiles in float32, as sums are.
    """
    in_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    sizes = (kernel[0], kernel[1], x.shape[1]) if in_channels_last else (x.shape[1], *kernel)
    _, channels, height, width = grad.shape
    most = PATCHES // (width * x.shape[1] * kernel[0] * kernel[1])
    # lines at a time, of images or of a part of one that has more; not fewer than the kernel takes
    lines = max(most, -(-fast_cpu.FEWEST // (width * channels)))
    images = max(1, lines // height)
    found: Tensor | None = None
    for some, grads in zip(x.split(images), grad.split(images), strict=True):
        windows = _windows(some, kernel, stride, padding, in_channels_last)
        for patches, upstream in zip(windows.split(lines, 1), grads.permute(0, 2, 3, 1).split(lines, 1), strict=True):
            part = weight_gradient(upstream.contiguous(), patches.flatten(3))
            found = part if found is None else found.float() + part
    assert found is not None  # no images are split into one part
    found = found.unflatten(1, sizes)
    return found.permute(0, 3, 1, 2) if in_channels_last else found


def _windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], in_channels_last: bool
) -> Tensor:
    """(B, H', W', ...) of images (B, C, H, W): views of patches, their numbers in the order of the images' memory."""
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # (B, C, H', W', *kernel)
    return x.permute(0, 2, 3, 4, 5, 1) if in_channels_last else x.permute(0, 2, 3, 1, 4, 5)


def _has_runs(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether numbers of a patch lie side by side in images, (B, C, H, W), so that patches are quickly written."""
    return x.is_contiguous(memory_format=torch.channels_last) or (x.is_contiguous() and kernel[1] >= 8)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)  # as torch does, not the bias, which may be changed in place
        ctx.shapes, ctx.window = shapes_of(x, weight, bias), (stride, padding)
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)

    @staticmethod
    @in_own_dtype
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.window
        grad, wanted = grads[0], ctx.needs_input_grad
        if wants_plain_gradients(grad):
            plain = lambda x, weight, bias: F.conv2d(x, weight.to(x.dtype), bias, stride, padding)  # noqa: E731
            return *plain_gradients(plain, ctx, stand_ins((x, weight, None), ctx.shapes, grad), grad), None, None
        of_x = of_weight = None
        if wanted[0]:
            only_x = (True, False, False)
            of_x = torch.ops.aten.convolution_backward(
                grad, x, weight.to(x.dtype), None, stride, padding, (1, 1), False, (0, 0), 1, only_x
            )[0]
        if wanted[1]:
            of_weight = patch_weight_gradient(grad, x, weight.shape[2:], stride, padding).to(weight.dtype)
        of_bias = bias_gradient(grad.permute(0, 2, 3, 1).contiguous()) if wanted[2] else None
        return of_x, of_weight, of_bias, None, None
