"""Dense convolutions whose weights get their gradients by patches, against torch's own, and who gets the plain form."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import fast_cpu, fast_patches
from layers.fast import plain_paths, takes, weight_gradient
from layers.fast_patches import FastConv2d, is_dense, is_fast_conv, patch_weight_gradient
from layers.patch_embed import PatchEmbed
from models.fast_layers import use_fast_layers

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CONVS: dict[str, dict[str, Any]] = {
    "patches apart": {"in_channels": 64, "out_channels": 96, "kernel_size": 2, "stride": 2},
    "patches over each other": {"in_channels": 32, "out_channels": 64, "kernel_size": 3, "stride": 2, "padding": 1},
    "stride 1": {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1},
    "positions": {"in_channels": 64, "out_channels": 128, "kernel_size": 1},
    "some positions": {"in_channels": 64, "out_channels": 32, "kernel_size": 1, "stride": 2},
    "of images": {"in_channels": 3, "out_channels": 32, "kernel_size": (4, 8), "stride": (4, 8), "padding": (0, 4)},
}
needs_bfloat16 = pytest.mark.skipif(
    not takes(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this processor"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way for few weights too, whatever the processor."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast_patches, "LARGE_WEIGHTS", 1)
    monkeypatch.setattr(fast_patches, "LARGE_POINTWISE", 1)
    monkeypatch.setattr(fast_cpu, "has_tiles", lambda: fast_cpu._has_kernel("has_products"))


def conv(name: str = "patches over each other", **others: Any) -> FastConv2d:
    return FastConv2d(**{**CONVS[name], **others})


def results(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream.to(y.dtype))]


def is_fast(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_ConvBackward"


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVS)
def test_the_gradient_of_a_weight(name: str, layout: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = conv(name)
    x = torch.randn(batch, module.in_channels, 18, 24).contiguous(memory_format=LAYOUTS[layout])
    y = module(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, module.weight, grad)
    sizes: Any = (module.kernel_size, module.stride, module.padding)
    found = patch_weight_gradient(grad, x, *sizes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    line, rows = grad.shape[3] * module.weight[0].numel(), []

    def counted(grad: Tensor, patches: Tensor) -> Tensor:
        rows.append(patches.numel())
        return weight_gradient(grad, patches)

    monkeypatch.setattr(fast_patches, "weight_gradient", counted)
    monkeypatch.setattr(fast_cpu, "FEWEST", 1)
    for lines in (2 * grad.shape[2], 2, 1):
        monkeypatch.setattr(fast_patches, "PATCHES", lines * line)
        rows.clear()
        torch.testing.assert_close(patch_weight_gradient(grad, x, *sizes), expected, rtol=1e-4, atol=1e-4)
        assert max(rows) <= lines * line and sum(rows) == batch * grad.shape[2] * line


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", CONVS)
def test_values_and_gradients(name: str, precision: str, bias: bool) -> None:
    module = conv(name, bias=bias)
    x = torch.randn(5, module.in_channels, 18, 24).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(module(x)).bfloat16()
    exact = results(copy.deepcopy(module).double(), x.double(), upstream.double())
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        found = results(module, x, upstream)
        with plain_paths():
            plain = results(module, x, upstream)
    assert not is_fast(plain[0]) and torch.equal(found[0], plain[0])
    assert is_fast(found[0]) == fast_cpu.has_tiles()
    for a, b, reference in zip(found, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error, allowed = ((each.double() - reference).norm() for each in (a, b))
        assert error <= 2 * allowed + 3e-3 * reference.norm()


@needs_bfloat16
def test_on_matrix_tiles_sums_are_exact() -> None:
    if not fast_cpu.has_tiles() or not fast_cpu.library().has_products():  # type: ignore[union-attr]
        pytest.skip("no matrix tiles")
    x = torch.randn(16, 128, 28, 28).bfloat16().contiguous(memory_format=torch.channels_last)
    grad = torch.randn(16, 320, 14, 14).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(320, 128, 3, 3, dtype=torch.double, requires_grad=True)
    y = F.conv2d(x.double(), weight, stride=2, padding=1)
    (exact,) = torch.autograd.grad(y, weight, grad.double())
    found = patch_weight_gradient(grad, x, (3, 3), (2, 2), (1, 1))
    assert found.dtype == torch.float32 and (found - exact).norm() < 1e-6 * exact.norm()


def test_which_convolutions_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(is_dense(conv(name)) for name in CONVS if name != "of images") and is_dense(nn.Conv2d(32, 32, 1))
    others: dict[str, dict[str, Any]] = {
        "dilated": {"dilation": 2},
        "grouped": {"groups": 2},
        "reflected": {"padding_mode": "reflect"},
        "padded by name": {"padding": "valid"},
        "of odd size": {"out_channels": 48},
    }
    for name, other in others.items():
        assert not is_dense(nn.Conv2d(**{**CONVS["patches apart"], **other})), name
    assert not is_dense(nn.Linear(32, 32)) and not is_dense(nn.Conv1d(32, 32, 1))
    monkeypatch.setattr(fast_patches, "LARGE_WEIGHTS", 10_000)
    assert is_dense(conv()) and not is_dense(conv("stride 1")) and is_dense(conv("positions"))


@needs_bfloat16
def test_what_gains_nothing_or_is_more_than_numbers_gets_the_plain_form() -> None:
    if not fast_cpu.has_tiles():
        pytest.skip("no kernels for matrix tiles")
    x, module = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last), conv()
    assert not is_fast(module(x)), "float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fast(module(x)) and is_fast(copy.deepcopy(module)(x))
        assert not is_fast(module(x.contiguous())), "no numbers of a patch side by side"
        assert not is_fast(module(x[0])), "an image without a batch"
        with plain_paths():
            assert not is_fast(module(x))
        with torch.no_grad():
            assert module(x).grad_fn is None
        with pytest.raises(RuntimeError, match="to have 32 channels"):
            module(torch.randn(2, 64, 16, 16))
        module.weight.requires_grad_(False)
        assert not is_fast(module(x)), "no gradient of the weight"
    with pytest.raises(RuntimeError, match="Input type"):
        conv()(x.bfloat16())


@needs_bfloat16
def test_second_derivatives_and_activations_computed_again() -> None:
    module = conv("patches apart").bfloat16()
    x = torch.randn(2, 64, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()

    def penalty() -> list[Tensor]:
        (of_x,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(of_x.square().sum(), [x, module.weight]))

    found = penalty()
    with plain_paths():
        expected = penalty()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.detach().abs().max()))
    wanted = [x, *module.parameters()]
    once = torch.autograd.grad(module(x).square().sum(), wanted)
    y: Any = checkpoint(module, x, use_reentrant=False)
    for a, b in zip(once, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        assert torch.equal(a, b)


@needs_bfloat16
def test_a_bias_may_be_changed_before_backward_and_images_may_be_frozen() -> None:
    module, x = conv().bfloat16(), torch.randn(2, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    bias: Any = module.bias
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    y = module(x)
    with torch.no_grad():
        bias.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert all(map(torch.equal, found, expected))


@needs_bfloat16
def test_in_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3, stride=2), nn.Conv2d(64, 64, 3, groups=64))
    assert use_fast_layers(model) == 1 and type(model[1]) is FastConv2d and use_fast_layers(model) == 0
    embed, x = PatchEmbed(32, 64, kernel_size=3, stride=2, padding=1), torch.randn(2, 9, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert embed.is_fast(x.permute(0, 3, 1, 2)) == fast_cpu.has_tiles()
        found = results(embed, x, torch.ones(2, 5, 5, 64))
        with plain_paths():
            plain = results(embed, x, torch.ones(2, 5, 5, 64))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01 * float(b.detach().abs().max()))


def test_scripted_and_traced_by_torch_fx() -> None:
    module, x = conv(), torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
    traced = torch.fx.symbolic_trace(module)
    assert any("conv2d" in str(node.target) for node in traced.graph.nodes) and not is_fast_conv(x, nn.Linear(1, 1))
    torch.testing.assert_close(traced(x), module(x))
