"""Our operators equal the plain forms that they stand for: outputs, gradients, empty batches, compiled code."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.kernels import depthwise_conv

KERNELS = [(1, 1), (3, 3), (7, 7), (3, 5)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The same by torch's convolution, on (B, H, W, C)."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)


def inputs(
    kernel: tuple[int, int], batch: int = 3, dtype: torch.dtype = torch.float32, dims: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, H, W, C), weights (C, 1, kH, kW) and the gradient of the output."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 6, 5, dims, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(dims, 1, *kernel, dtype=dtype, generator=generator, requires_grad=True)
    return x, weight, torch.randn(batch, 6, 5, dims, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_depthwise_conv_equals_torchs(kernel: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, grad = inputs(kernel, dtype=dtype)
    got, expected = depthwise_conv(x, weight), plain(x, weight)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, [x, weight], grad), torch.autograd.grad(expected, [x, weight], grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_by_finite_differences() -> None:
    x, weight, _ = inputs((3, 3), batch=2, dtype=torch.float64, dims=2)
    assert torch.autograd.gradcheck(depthwise_conv, (x, weight))


def test_an_empty_batch_gives_the_weights_a_zero_gradient() -> None:
    x, weight, grad = inputs((3, 3), batch=0)
    out = depthwise_conv(x, weight)
    assert out.shape == (0, 6, 5, 4)
    grad_x, grad_weight = torch.autograd.grad(out, [x, weight], grad)
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_images_of_any_layout() -> None:
    x, weight, grad = inputs((3, 3))
    other = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    assert not other.is_contiguous()
    for a, b in zip(
        torch.autograd.grad(depthwise_conv(other, weight), [other, weight], grad),
        torch.autograd.grad(plain(x, weight), [x, weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiled_for_any_number_of_samples(compilations: Callable[[], tuple[int, int]]) -> None:
    compiled = torch.compile(depthwise_conv, backend="aot_eager", dynamic=True)
    for batch in (4, 0, 3, 9, 2):
        x, weight, grad = inputs((3, 3), batch=batch)
        out, expected = compiled(x, weight), plain(x, weight)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out, [x, weight], grad), torch.autograd.grad(expected, [x, weight], grad), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert compilations()[1] == 0


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    x, weight, _ = inputs((3, 3))
    torch.library.opcheck(depthwise_conv, (x, weight))  # schema, shapes on the meta device, autograd, dynamic shapes
