"""Attention over few tokens against float64 and torch's own forms: outputs, gradients, who gets which."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers import fast_cpu
from layers.fast import takes
from layers.fast_attention import (
    MOST_TOKENS,
    attention,
    attention_of,
    plain_attention,
    takes_attention,
    window_attention,
)
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


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_attention_without_gradients_is_the_kernels_or_torchs(dtype: torch.dtype, cpu_kernels: bool) -> None:
    qkv = torch.randn(2, 49, 3, 2, 16, dtype=dtype)
    parts = list(qkv.permute(2, 0, 3, 1, 4))
    trained, trained_of = attention(qkv.requires_grad_()), attention_of(*parts)
    assert not torch.equal(trained, plain_attention(qkv)), "scores round otherwise"
    has_kernel = fast_cpu.has_attention(*parts)
    assert cpu_kernels or not has_kernel
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(attention(qkv), trained if has_kernel else plain_attention(qkv))
            assert takes_attention(*parts) == has_kernel
            assert not has_kernel or torch.equal(attention_of(*parts), trained_of)
            narrow = qkv[..., :8]
            assert torch.equal(attention(narrow), plain_attention(narrow))


def parts_results(form: Callable[..., Tensor], parts: list[Tensor], upstream: Tensor) -> Results:
    """Output and gradients of queries, keys and values that were not computed together."""
    parts = [part.detach().requires_grad_() for part in parts]
    out = form(*parts)
    return [out.detach(), *torch.autograd.grad(out, parts, upstream)]


@pytest.mark.parametrize("tokens", [50, 300])
def test_attention_of_parts(tokens: int, cpu_kernels: bool) -> None:
    parts, upstream = [torch.randn(2, 3, tokens, 32) for _ in range(3)], torch.randn(2, 3, tokens, 32)
    assert takes_attention(*parts) == (cpu_kernels or tokens == 50)
    if not takes_attention(*parts):
        return
    plain = F.scaled_dot_product_attention
    exact = parts_results(plain, [p.double() for p in parts], upstream.double())
    for a, b in zip(parts_results(attention_of, parts, upstream), exact, strict=True):
        assert a.shape == b.shape and error(a, b) < 3e-6
    mixed = [parts[0], parts[1].transpose(1, 2).contiguous().transpose(1, 2), torch.stack(parts, -2)[..., 2, :]]
    if cpu_kernels:
        found, wanted = (parts_results(attention_of, given, upstream) for given in (mixed, parts))
        assert all(map(torch.equal, found, wanted)), "wherever they lie"
    parts = [part.requires_grad_() for part in parts]
    out = attention_of(parts[0], parts[1].detach(), parts[2])
    assert len(torch.autograd.grad(out.sum(), parts[::2])) == 2, "a part without gradients"


def test_gradients_of_the_kernels_gradients(cpu_kernels: bool) -> None:
    if not cpu_kernels:
        pytest.skip("of the kernel")
    qkv, upstream = torch.randn(2, 20, 3, 2, 16), torch.randn(2, 2, 20, 16)
    parts = [part.contiguous() for part in qkv.permute(2, 0, 3, 1, 4)]

    def twice(form: Callable[..., Tensor], given: list[Tensor]) -> Results:
        given = [each.detach().requires_grad_() for each in given]
        out = form(*given)
        first = torch.autograd.grad(out, given, upstream.to(out.dtype), create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), given)
        many = torch.autograd.grad(
            form(*given), given, torch.stack((upstream, -upstream)).to(out.dtype), is_grads_batched=True
        )
        return [*second, *many]

    double = [part.double() for part in parts]
    with sdpa_kernel(SDPBackend.MATH):  # torch's other form cannot be differentiated twice
        found, exact = twice(attention_of, parts), twice(F.scaled_dot_product_attention, double)
        found += twice(lambda qkv: attention(qkv).transpose(1, 2), [qkv])
        exact += twice(lambda qkv: plain_attention(qkv).transpose(1, 2), [qkv.double()])
    for got, want in zip(found, exact, strict=True):
        assert error(got, want) < 1e-5


def test_what_the_kernel_returns_and_is_given_may_be_changed_in_place_as_of_torch(cpu_kernels: bool) -> None:
    if not cpu_kernels:
        pytest.skip("of the kernel")
    for form in (attention, lambda qkv: attention_of(*(qkv[:, :, i].transpose(1, 2) for i in range(3)))):
        qkv = torch.randn(2, 20, 3, 2, 16, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # since it is kept
            form(qkv).mul_(2).sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            given = qkv * 1
            out = form(given)
            given.mul_(2)
            out.sum().backward()
        with torch.no_grad():
            form(qkv).mul_(2)


@needs_bfloat16
def test_attention_computes_in_float32_under_autocast() -> None:
    qkv, upstream = torch.randn(2, 50, 3, 2, 16).bfloat16(), torch.randn(2, 50, 2, 16)
    expected = attention_results(attention, qkv, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_results(attention, qkv, upstream)
    assert all(map(torch.equal, found, expected))
