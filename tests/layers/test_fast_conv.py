"""Depthwise convolutions with faster gradients against torch's own: values, gradients, and who gets the plain form."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from layers import fast_conv, fast_cpu
from layers.fast import plain_paths, takes
from layers.fast_conv import (
    FastDepthwiseConv2d,
    depthwise_weight_gradient,
    has_fast_gradient,
    is_depthwise,
    star_relu_conv,
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
needs_bfloat16 = pytest.mark.skipif(
    not takes(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this processor"
)
PRECISIONS = ["float32", *(pytest.param(name, marks=needs_bfloat16) for name in ("bfloat16", "autocast"))]
pytestmark = pytest.mark.skipif(not takes(torch.empty(1)), reason="torch without oneDNN has no fast paths")


@pytest.fixture(autouse=True, params=["kernels", "torch's forms"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way for small images too, with and without the kernels for this processor."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast_conv, "LARGE_IMAGES", 1)
    monkeypatch.setattr(fast_cpu, "FEWEST", 4)
    if request.param != "kernels":
        monkeypatch.setattr(fast_cpu, "library", lambda: None)


def conv(side: int = 7, *, channels: int = 16, bias: bool = True) -> FastDepthwiseConv2d:
    return FastDepthwiseConv2d(channels, channels, side, padding=side // 2, groups=channels, bias=bias)


def results(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream.to(y.dtype))]


def is_fast(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_DepthwiseConvBackward"


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 1, 5), (4, 16, 3), (0, 5, 5)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 7), (7, 7)])
def test_the_gradient_of_a_depthwise_kernel(kernel: tuple[int, int], shape: tuple[int, ...]) -> None:
    x, grad, weight = torch.randn(*shape, 16), torch.randn(*shape, 16), torch.randn(16, 1, *kernel, requires_grad=True)
    padding = (kernel[0] // 2, kernel[1] // 2)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=16)
    (expected,) = torch.autograd.grad(out, weight, grad.permute(0, 3, 1, 2))
    torch.testing.assert_close(depthwise_weight_gradient(grad, x, weight), expected)


def test_no_images() -> None:
    module, x = conv(), torch.randn(0, 16, 8, 8, requires_grad=True)
    grads = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in module.parameters())]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("side, batch", [(5, 3), (7, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_and_gradients(precision: str, layout: str, bias: bool, side: int, batch: int) -> None:
    module, x = conv(side, bias=bias), torch.randn(batch, 16, 11, 13).contiguous(memory_format=LAYOUTS[layout])
    upstream = torch.randn(x.shape).contiguous(memory_format=LAYOUTS[layout])
    exact = results(copy.deepcopy(module).double(), x.double(), upstream)
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        found = results(module, x, upstream)
        with plain_paths():
            plain = results(module, x, upstream)
    assert is_fast(found[0]) and not is_fast(plain[0]) and torch.equal(found[0], plain[0])
    for a, b, reference in zip(found, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error, allowed = ((each.double() - reference).norm() for each in (a, b))
        assert error <= 2 * allowed + (1e-6 if precision == "float32" else 3e-3) * reference.norm()


def test_second_derivatives() -> None:
    module, x = conv(5, channels=2), torch.randn(2, 2, 4, 3, requires_grad=True)

    def penalty() -> list[Tensor]:
        (of_x,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(of_x.square().sum(), [x, module.weight]))

    assert is_fast(module(x))
    found = penalty()
    with plain_paths():
        expected = penalty()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_activations_computed_again_give_equal_gradients() -> None:
    module, x = conv(), torch.randn(2, 16, 8, 8, requires_grad=True)
    wanted = [x, *module.parameters()]
    once = torch.autograd.grad(module(x).square().sum(), wanted)
    y: Any = checkpoint(module, x, use_reentrant=False)
    for a, b in zip(once, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        assert torch.equal(a, b)


PLAIN: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "dilation": {"dilation": 2, "padding": 6},
    "no padding": {"padding": 0},
    "reflected": {"padding_mode": "reflect"},
    "even": {"kernel_size": 6},
    "grouped": {"groups": 4},
    "wider": {"out_channels": 32},
}


def test_which_convolutions_are_meant() -> None:
    same: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "kernel_size": 7, "padding": 3, "groups": 16}
    assert (
        is_depthwise(nn.Conv2d(**same))
        and is_depthwise(nn.Conv2d(**{**same, "padding": "same"}))
        and is_depthwise(conv())
    )
    for name, other in PLAIN.items():
        assert not is_depthwise(nn.Conv2d(**{**same, **other})), name
    assert not is_depthwise(nn.Linear(6, 6)) and not is_depthwise(nn.Conv1d(16, 16, 7, padding=3, groups=16))


def test_only_large_kernels_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16, 16, 16)
    assert has_fast_gradient(x, (7, 5)) and not has_fast_gradient(x, (3, 7)) and not has_fast_gradient(x, (9, 9))
    monkeypatch.setattr(fast_conv, "LARGE_IMAGES", x.numel() + 1)
    assert not has_fast_gradient(x, (7, 7)) and not is_fast(conv()(x))


def test_what_gains_nothing_or_is_more_than_numbers_gets_the_plain_form() -> None:
    x, module = torch.randn(2, 16, 16, 16), conv()
    assert is_fast(module(x)) and is_fast(copy.deepcopy(module)(x))
    assert not is_fast(module.double()(x.double()))
    module.float()
    assert not is_fast(module(x[0])), "an image without a batch"
    module.weight.requires_grad_(False)
    assert not is_fast(module(x)), "no gradient of the kernel"
    module.weight.requires_grad_(True)
    with torch.no_grad():
        assert module(x).grad_fn is None
    with pytest.raises(RuntimeError, match="expected input"):
        module(torch.randn(2, 5, 16, 16))

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    before = module(x)
    parametrize.register_parametrization(module, "weight", Doubled())
    bias: Any = module.bias
    torch.testing.assert_close(module(x), 2 * before - bias[:, None, None])


@pytest.mark.parametrize("given, kept", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_images_of_another_dtype_are_refused_as_torch_does(given: torch.dtype, kept: torch.dtype) -> None:
    x, module = torch.randn(2, 16, 16, 16, dtype=given), conv().to(kept)
    told = []
    for form in (nn.Conv2d.forward, FastDepthwiseConv2d.forward):
        with pytest.raises(RuntimeError) as caught:
            form(module, x)
        told.append(str(caught.value))
    assert told[0] == told[1] and "Input type" in told[0]


def test_scripted() -> None:
    module, x = conv(), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


def test_backward_under_autocast_stays_in_float32() -> None:
    x, upstream = torch.randn(4, 16, 9, 9), torch.randn(4, 16, 9, 9)
    module = conv()
    expected = results(copy.deepcopy(module).double(), x.double(), upstream.double())
    y = module(x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, *module.parameters()], upstream)
    for a, b in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_a_bias_may_be_changed_in_place_as_of_torch() -> None:
    module, x = conv(), torch.randn(2, 16, 9, 9, requires_grad=True)
    y = module(x)
    assert is_fast(y) and module.bias is not None
    with torch.no_grad():
        module.bias.add_(1)
    y.sum().backward()
    y = module(x)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("cpu_kernels")
def test_star_relu_of_images_that_lie_in_any_order() -> None:
    x, weight = torch.randn(2, 16, 9, 9).permute(0, 2, 3, 1), torch.randn(16, 1, 7, 7)
    assert not x.is_contiguous()
    for images in (x, x.contiguous()[:, ::2], x[:, :1].expand(2, 9, 9, 16)):
        numbers = (images, torch.tensor([1.5]), torch.tensor([-0.5]), weight)
        given = [each.detach().requires_grad_() for each in numbers]
        plain = [each.detach().double().requires_grad_() for each in given]
        y = star_relu_conv(*given)
        stars = plain[1] * F.relu(plain[0]).square() + plain[2]
        exact = F.conv2d(stars.permute(0, 3, 1, 2), plain[3], padding=3, groups=16).permute(0, 2, 3, 1)
        upstream = torch.randn(y.shape)
        expected = torch.autograd.grad(exact, plain, upstream.double())
        for found, reference in zip(torch.autograd.grad(y, given, upstream), expected, strict=True):
            torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("precision", ["float32", pytest.param("autocast", marks=needs_bfloat16)])
def test_star_relus_numbers_may_be_changed_in_place_or_come_of_inference_mode(precision: str) -> None:
    values, weight = (torch.tensor([1.5]), torch.tensor([-0.5])), torch.randn(16, 1, 7, 7)
    x = torch.randn(2, 9, 9, 16, requires_grad=True)
    with torch.inference_mode():
        inferred = [value.clone() for value in values]
    trained = [value.clone().requires_grad_() for value in values]
    found = []
    for numbers, change in (
        (trained, False),
        ([value.clone() for value in values], True),
        (inferred, False),
        (trained, True),
    ):
        given = weight.clone().requires_grad_()
        wanted = [x, given, *(number for number in numbers if number.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
            y = star_relu_conv(x, numbers[0], numbers[1], given)
        with torch.no_grad():
            for number in numbers if change else []:
                number.add_(1)
        found.append(torch.autograd.grad(y.sum(), wanted))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_torch_fx_sees_a_convolution() -> None:
    module, x = conv(), torch.randn(2, 16, 9, 9)
    traced = torch.fx.symbolic_trace(module)
    assert any(node.target is F.conv2d or "conv2d" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), module(x))
