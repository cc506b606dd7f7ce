"""Layer norm in training on a CPU: its gradients against float64 and torch's own, and who gets torch's own."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.fast import plain_paths, takes
from layers.fast_norm import layer_norm
from layers.norm import LayerNorm
from tests.layers.test_fast import error, nodes

pytestmark = pytest.mark.skipif(
    not takes(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this processor"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tensors(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Input in bfloat16, and weight and bias in a dtype; all want gradients."""
    width = shape[-1]
    x = (torch.randn(shape) * 2 + torch.randn(width)).bfloat16()
    weight, shift = (torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype) if bias else None
    return [None if each is None else each.requires_grad_() for each in (x, weight, shift)]


def results(form: Any, inputs: list[Tensor | None], upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    y = form(*inputs, 1e-6)
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream.to(y.dtype))]


def in_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if each is None else each.detach().double().requires_grad_() for each in inputs]


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return layer_norm(x, [x.shape[-1]], weight, bias, eps)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("shape", [(20_000, 16), (5, 30, 40, 32), (3, 7), (1, 384), (4, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_exact(dtype: torch.dtype, bias: bool, shape: tuple[int, ...], cpu_kernels: bool) -> None:
    inputs = tensors(shape, bias, dtype)
    upstream = (torch.randn(shape) + 0.3).bfloat16()
    expected = results(plain, in_float64(inputs), upstream)
    found, torchs = results(exact, inputs, upstream), results(plain, inputs, upstream)
    for i, (a, b, reference) in enumerate(zip(found, torchs, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if i < 2 and not (cpu_kernels and shape[-1] % 16 == 0):
            assert torch.equal(a, b), "output and gradient of the input are torch's"
        elif shape[-1] > 1:  # one channel is 0 whatever it was, and so is its weight's gradient
            assert error(a, reference) <= (4e-3 if len(upstream) > 3 else 0.02)
    if len(upstream) == 20_000:
        assert error(torchs[2], expected[2]) > 0.05, "torch's, for which this is there"


@pytest.mark.parametrize("shape", [(2_000, 48), (3, 5, 64), (1, 16)])
@pytest.mark.parametrize("weights", ["weight and bias", "weight", "none"])
def test_float32(weights: str, shape: tuple[int, ...], cpu_kernels: bool) -> None:
    width = shape[-1]
    inputs = [torch.randn(shape) * 2 + torch.randn(width), torch.rand(width) + 0.5, torch.randn(width)]
    number = {"weight and bias": 3, "weight": 2, "none": 1}[weights]
    wanted = [x.requires_grad_() if i < number else None for i, x in enumerate(inputs)]
    upstream = torch.randn(shape) + 0.3
    assert ("_LayerNormBackward" in nodes(exact(*wanted, 1e-6))) == cpu_kernels  # type: ignore[arg-type]
    for a, b in zip(results(exact, wanted, upstream), results(plain, in_float64(wanted), upstream), strict=True):
        assert a.dtype == torch.float32 and error(a, b) < 1e-6


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_memory_in_another_order(layout: str) -> None:
    x = torch.randn(16, 5, 6, 16).bfloat16()
    x = x.transpose(0, 3) if layout == "transposed" else x.permute(0, 2, 3, 1)
    inputs = [x.detach().requires_grad_(), *tensors((x.shape[-1],), True)[1:]]
    upstream = torch.randn(x.shape[::-1]).bfloat16().permute(3, 2, 1, 0)
    for a, b in zip(results(exact, inputs, upstream), results(plain, in_float64(inputs), upstream), strict=True):
        assert error(a, b) <= 0.01


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias"])
def test_what_needs_no_gradient_gets_none(frozen: str, cpu_kernels: bool) -> None:
    x, weight, bias = tensors((50, 16), True)
    inputs = {"x": x, "weight": weight, "bias": bias}
    for name in frozen.split(" and "):
        inputs[name].requires_grad_(False)  # type: ignore[union-attr]
    y = exact(*inputs.values(), 1e-6)  # type: ignore[arg-type]
    assert ("_LayerNormBackward" in nodes(y)) == (cpu_kernels or frozen != "weight and bias")
    y.sum().backward()
    for name, each in inputs.items():
        assert each is not None and (each.grad is None) == (name in frozen)


def test_who_gets_torchs_own() -> None:
    x, weight, bias = tensors((6, 8), True)
    assert x is not None and weight is not None

    def is_exact(*inputs: Any) -> bool:
        return "_LayerNormBackward" in nodes(exact(*inputs, eps=1e-6))

    assert is_exact(x, weight, bias)
    assert not is_exact(x.float(), weight, bias) and not is_exact(x.double(), weight.double(), None)
    assert not is_exact(x, None, None) and not is_exact(x[:0], weight, bias)
    with plain_paths():
        assert not is_exact(x, weight, bias)
    with torch.no_grad():
        assert torch.equal(exact(x, weight, bias, 1e-6), plain(x, weight, bias, 1e-6))
    compiled: Any = torch.compile(exact, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias, 1e-6), plain(x, weight, bias, 1e-6))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float16, torch.float16),
                                    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])  # fmt: skip
def test_weights_of_other_dtypes_are_refused_as_torch_does(
    dtypes: tuple[torch.dtype, torch.dtype], cpu_kernels: bool
) -> None:
    x, *weights = tensors((64, 16), True)
    weight, bias = (each.detach().to(dtype).requires_grad_() for each, dtype in zip(weights, dtypes, strict=True))  # type: ignore[union-attr]
    told = []
    for form in (exact, plain):
        with pytest.raises(RuntimeError) as caught:
            form(x, weight, bias, 1e-6)  # type: ignore[arg-type]
        told.append(str(caught.value))
    assert told[0] == told[1] and "scalar type" in told[0]


def test_under_autocast_and_scripted() -> None:
    norm, x = LayerNorm(8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "_LayerNormBackward" in nodes(norm(x.bfloat16())) and "_LayerNormBackward" not in nodes(norm(x))
    torch.testing.assert_close(torch.jit.script(norm)(x), norm(x))


@pytest.mark.usefixtures("cpu_kernels")
def test_derivatives_of_derivatives_and_many_at_once() -> None:
    inputs = tensors((6, 16), True)
    for upstreams in (1, 3):
        found = []
        for form in (exact, plain):
            y = form(*inputs, 1e-6)  # type: ignore[arg-type]
            torch.manual_seed(1)
            if upstreams == 1:
                first = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)  # type: ignore[arg-type]
                found.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs))  # type: ignore[arg-type]
            else:
                upstream = torch.randn(upstreams, *y.shape).bfloat16()
                found.append(torch.autograd.grad(y, inputs, upstream, is_grads_batched=True))  # type: ignore[arg-type]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("cpu_kernels")
def test_what_comes_out_may_be_changed_in_place() -> None:
    x, weight, bias = tensors((6, 16), True)
    assert x is not None
    y = exact(x, weight, bias, 1e-6).mul_(2.0)
    y.sum().backward()
    assert x.grad is not None


# ---- unusual inputs -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_of_an_input_with_gaps(dtype: torch.dtype) -> None:
    norm = LayerNorm(32)
    x = torch.randn(32, 48).to(dtype).requires_grad_()

    def second() -> Tensor:
        y = norm(x.t())
        (first,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
        torch.autograd.grad(y, x, torch.ones(2, *y.shape, dtype=y.dtype), retain_graph=True, is_grads_batched=True)
        return torch.autograd.grad(first.float().square().sum(), x)[0]

    found = second()
    with plain_paths():
        expected = second()
    assert error(found, expected.double()) < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("width", [16, 64])
def test_another_number_of_channels_is_refused(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            LayerNorm(32)(torch.randn(48, width, dtype=dtype, requires_grad=True))
    unscaled = torch.nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer_norm(torch.randn(48, width, requires_grad=True), [32], unscaled.weight, unscaled.bias, 1e-6)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("eps", [1, 0, True, np.float32(0.5), torch.tensor(0.5)])
def test_an_eps_of_any_kind(eps: Any) -> None:
    x = torch.randn(48, 32, requires_grad=True)
    torch.testing.assert_close(exact(x, None, None, eps), F.layer_norm(x, (32,), eps=float(eps)))


def test_numbers_that_are_not_in_memory_as_they_are_read(cpu_kernels: bool) -> None:
    x = torch.randn(48, 32)
    y = exact(torch._neg_view(x).requires_grad_(), None, None, 1e-6)
    torch.testing.assert_close(y, F.layer_norm(-x, (32,), eps=1e-6))
    weight = torch.ones(32, requires_grad=True)
    y = exact(x.requires_grad_(), weight, None, 1e-6)
    assert ("_LayerNormBackward" in nodes(y)) == cpu_kernels
    y.backward(torch._efficientzerotensor(y.shape))
    assert x.grad is not None and not x.grad.any() and weight.grad is not None and not weight.grad.any()
