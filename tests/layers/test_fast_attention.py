"""Attention over few tokens against float64 and torch's own forms: outputs, gradients, who gets which."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layers.fast import takes
from layers.fast_attention import MOST_TOKENS, attention, plain_attention, window_attention
from tests.layers.test_fast import Results, error, is_fast, needs_bfloat16, plain_window_attention

pytestmark = pytest.mark.skipif(not takes(torch.empty(1)), reason="torch without oneDNN has no fast paths")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def attention_results(form: Callable[[Tensor], Tensor], qkv: Tensor, upstream: Tensor) -> Results:
    """Output, and gradients of queries, keys and values."""
    qkv = qkv.detach().requires_grad_()
    out = form(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream.to(out.dtype))[0].unbind(2)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("tokens, heads, width", [(197, 3, 64), (196, 2, 32), (49, 4, 32), (1, 2, 8)])
@pytest.mark.parametrize("sharpness", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_attention_is_as_exact_as_torch(
    dtype: torch.dtype, sharpness: int, tokens: int, heads: int, width: int
) -> None:
    qkv = torch.randn(3, tokens, 3, heads, width)
    qkv[:, :, :2] *= sharpness
    qkv, upstream = qkv.to(dtype), torch.randn(3, tokens, heads, width).to(dtype)
    exact = attention_results(plain_attention, qkv.double(), upstream)
    found = attention_results(attention, qkv, upstream)
    plain = attention_results(plain_attention, qkv, upstream)
    least = 3 * torch.finfo(dtype).eps
    for a, b, reference in zip(found, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert error(a, reference) <= max(1.3 * error(b, reference), least), "one token: queries and keys get zero"


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("batch, windows, tokens, width", [(6, 3, 49, 32), (6, 6, 49, 32), (4, 1, 64, 8), (2, 2, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_attention_with_a_bias(dtype: torch.dtype, batch: int, windows: int, tokens: int, width: int) -> None:
    qkv, upstream = torch.randn(batch, tokens, 3, 2, width).to(dtype), torch.randn(batch, tokens, 2, width).to(dtype)
    numbers = torch.randn(windows, 2, tokens, tokens)

    def results(form: Callable[..., Tensor], qkv: Tensor) -> Results:
        bias = numbers.to(torch.promote_types(qkv.dtype, torch.float32)).requires_grad_()
        of_parts = attention_results(lambda x: form(x, bias), qkv, upstream)
        out = form(qkv, bias)
        of_bias = torch.autograd.grad(out, bias, upstream.to(out.dtype))[0]
        assert of_bias.dtype == bias.dtype
        return [*of_parts, of_bias]

    plain_form = plain_window_attention
    exact, found, plain = results(plain_form, qkv.double()), results(window_attention, qkv), results(plain_form, qkv)
    for a, b, reference in zip(found, plain, exact, strict=True):
        assert a.shape == reference.shape and a.dtype == b.dtype
        assert error(a, reference) <= max(1.5 * error(b, reference), 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_many_tokens_is_torchs(dtype: torch.dtype) -> None:
    for tokens in (1, MOST_TOKENS[dtype], MOST_TOKENS[dtype] + 1):
        qkv = torch.randn(2, tokens, 3, 2, 8, dtype=dtype, requires_grad=True)
        assert is_fast(attention(qkv)) == (tokens <= MOST_TOKENS[dtype])
    for shape in ((0, 5, 3, 2, 8), (2, 0, 3, 2, 8)):
        qkv = torch.randn(shape, dtype=dtype, requires_grad=True)
        attention(qkv).sum().backward()
        assert qkv.grad is not None and qkv.grad.shape == shape
    double = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    assert torch.equal(attention(double), plain_attention(double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_gradients_is_torchs(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 49, 3, 2, 8, dtype=dtype)
    assert not torch.equal(attention(qkv), plain_attention(qkv)), "scores round otherwise"
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(attention(qkv), plain_attention(qkv))


@needs_bfloat16
def test_attention_computes_in_float32_under_autocast() -> None:
    qkv, upstream = torch.randn(2, 50, 3, 2, 16).bfloat16(), torch.randn(2, 50, 2, 16)
    expected = attention_results(attention, qkv, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_results(attention, qkv, upstream)
    assert all(map(torch.equal, found, expected))
