"""Scale and build_scale."""

import pytest
import torch
from torch import nn

import layers.scale as scale_module
from layers.mlp import Mlp
from layers.norm import LayerNorm, norm_in
from layers.scale import Scale, build_scale, scaled_branch
from layers.token_mixers import Attention, SepConv
from tests.layers.test_fast import needs_bfloat16


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_multiplies_each_channel(shape: tuple[int, ...]) -> None:
    scale, x = Scale(3), torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        scale.scale.copy_(torch.tensor([1.0, -2.0, 0.5]))
    out = scale(x)
    expected = torch.stack([x[..., 0], -2 * x[..., 1], x[..., 2] / 2], dim=-1)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(scale.scale.grad, x.detach().reshape(-1, 3).sum(dim=0))
    assert x.grad is not None and torch.equal(x.grad.reshape(-1, 3)[0], scale.scale.detach())


def test_starts_at_its_initial_value() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(Scale(3)(x), x)
    scale = build_scale(3, 1e-5)
    assert isinstance(scale, Scale)
    assert torch.equal(scale.scale, torch.full((3,), 1e-5)) and scale.scale.requires_grad
    assert list(scale.state_dict()) == ["scale"]


def test_an_initial_value_of_zero_is_a_scale() -> None:
    assert isinstance(build_scale(3, 0.0), Scale)


def test_none_is_the_identity() -> None:
    assert isinstance(build_scale(3, None), nn.Identity)


def test_bfloat16_stays_bfloat16_whatever_the_parameter_is() -> None:
    scale = Scale(3, 0.5)
    x = torch.randn(2, 4, 5, 3).bfloat16()
    assert scale(x).dtype == torch.bfloat16
    assert torch.equal(scale.bfloat16()(x), x * 0.5)


def test_a_batch_without_samples() -> None:
    scale = Scale(3)
    out = scale(torch.randn(0, 4, 5, 3))
    assert out.shape == (0, 4, 5, 3)
    out.sum().backward()
    assert scale.scale.grad is not None and not scale.scale.grad.any()


@needs_bfloat16
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "body", [Mlp(32), SepConv(32), Attention(32, head_dim=16)], ids=["mlp", "sep_conv", "attention"]
)
def test_a_norm_rounds_for_the_linear_layer_behind_it(body: nn.Module, scaled: bool, cpu_kernels: bool) -> None:
    torch.manual_seed(0)
    norm, scale = LayerNorm(32), build_scale(32, 0.5 if scaled else None)
    x = torch.randn(4, 5, 6, 32, requires_grad=True)
    parameters = [x, *norm.parameters(), *body.parameters(), *scale.parameters()]
    seen: list[torch.dtype] = []

    def look(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0].dtype)

    def results() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = scaled_branch(norm, body, scale, x)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parameters)]

    found = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_module, "norm_in", lambda norm, x, dtype: norm(x))
        assert all(map(torch.equal, found, results())), "the same bits"
    with body.get_submodule(body.first).register_forward_pre_hook(look):  # type: ignore[arg-type]
        results()
    assert seen == [torch.float32], "whoever looks at the layer sees what the norm gives"
    if cpu_kernels:
        with torch.autocast("cpu", torch.bfloat16):
            assert norm_in(norm, x, torch.bfloat16).dtype == torch.bfloat16
            with torch.no_grad():
                assert norm_in(norm, x, torch.bfloat16).dtype == torch.float32
