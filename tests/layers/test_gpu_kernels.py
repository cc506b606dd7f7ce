"""Kernels for GPUs against float64, in Triton's interpreter where there is no GPU; see conftest.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cuda
from tests.layers.parts import DEVICE

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) + shift).to(dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of a dtype (the interpreter's bfloat16 is rounded towards 0), by the largest number."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}[dtype]
    assert got.shape == expected.shape and got.isfinite().all()
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_put(dtype: torch.dtype, on_base: bool, count: int) -> None:
    torch.manual_seed(count)
    rows, base = random(count, 7, 13, dtype=torch.bfloat16), random(5, 7, 13, dtype=dtype)
    order, result = torch.randperm(5, device=DEVICE), torch.full_like(base, float("nan"))
    fast_cuda.put_rows(rows, order, base if on_base else None, result, 1.5)
    expected = base.double() if on_base else torch.zeros_like(base, dtype=torch.float64)
    if count or on_base:
        close(result, expected.index_add(0, order[:count], rows.double(), alpha=1.5), dtype)
    assert torch.equal(result[order[count:]], base[order[count:]] if on_base else torch.zeros_like(base[order[count:]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_samples_are_taken(count: int, dtype: torch.dtype) -> None:
    x, kept = random(6, 7, 13), torch.randperm(6, device=DEVICE)[:count]
    for factor in (1.0, 0.75):
        result = torch.full((count, 7, 13), float("nan"), dtype=dtype, device=DEVICE)
        fast_cuda.take_rows(x, kept, result, factor)
        if count:
            close(result, x[kept].double() * factor, dtype)


@pytest.mark.parametrize("affine", ["neither", "weight", "both"])
@pytest.mark.parametrize("channels", [8, 13, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype, channels: int, affine: str) -> None:
    x, grad = random(3, 7, channels, dtype=dtype, shift=2.0), random(3, 7, channels, dtype=dtype)
    weight = None if affine == "neither" else random(channels, shift=1.0)
    bias = random(channels) if affine == "both" else None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(exact[0], (channels,), exact[1], exact[2], 1e-3)  # type: ignore[arg-type]
    expected.backward(grad.double())
    close(fast_cuda.layer_norm_forward(x, weight, bias, 1e-3, torch.float32), expected.detach(), torch.float32)
    found = fast_cuda.layer_norm_gradients(grad, x, weight, 1e-3)
    close(found[0], exact[0].grad, dtype)  # type: ignore[union-attr, arg-type]
    for got, want in zip(found[1:], exact[1:], strict=True):
        if want is not None:
            close(got, want.grad, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (3, 4, 4, 13), (2, 3, 3, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    """Also of images far from 0, whose variance is a small difference of large numbers if it is taken carelessly."""
    x, grad, channels = random(*shape, dtype=dtype, shift=30.0), random(*shape, dtype=dtype), shape[-1]
    weight, shift = random(channels, shift=1.0), random(channels) if bias else None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, shift)]
    expected = F.group_norm(exact[0].movedim(-1, 1), 1, *exact[1:], 1e-3).movedim(1, -1)  # type: ignore[union-attr]
    expected.backward(grad.double())
    sums = fast_cuda.group_norm_moments(x)
    got = fast_cuda.group_norm_forward(x, sums, weight, shift, 1e-3, torch.float32)
    close(got, expected.detach(), torch.float32)
    found = fast_cuda.group_norm_gradients(grad, x, sums, weight, 1e-3)
    close(found[0], exact[0].grad, dtype)  # type: ignore[union-attr, arg-type]
    for of, want in zip(found[1:], exact[1:], strict=True):
        if want is not None:
            close(of, want.grad, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 2, 1, 8), pytest.param((3, 4, 4, 16), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling(dtype: torch.dtype, shape: tuple[int, ...], size: int) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    exact = x.double().requires_grad_()
    expected = fast_cuda.plain_mean_minus_self(exact, size)
    expected.backward(grad.double())
    assert exact.grad is not None
    for got, want in (
        (fast_cuda.pooled(x, size), expected.detach()), (fast_cuda.pooled(grad, size, backward=True), exact.grad)
    ):  # fmt: skip
        assert float((got.double() - want).abs().max()) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [64, 1000])
def test_star_relu(numbers: int, dtype: torch.dtype) -> None:
    x, grad = random(numbers, dtype=dtype), random(numbers, dtype=dtype)
    scale, shift = random(1, shift=1.0), random(1)
    exact = [t.double().requires_grad_() for t in (x, scale, shift)]
    expected = fast_cuda.plain_star_relu(*exact)
    expected.backward(grad.double())
    close(fast_cuda.star_relu_forward(x, scale, shift), expected.detach(), dtype)
    for got, want, precision in zip(
        fast_cuda.star_relu_gradients(grad, x, scale), exact, (dtype, torch.float32, torch.float32), strict=True
    ):
        assert want.grad is not None
        close(got, want.grad, precision)
