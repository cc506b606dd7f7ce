"""Mlp, the MLP head and their activations against plain computations."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.drop_path import BREAK_EVEN
from layers.mlp import ACTIVATIONS, ActName, Mlp, MlpHead, SquaredReLU, StarReLU, build_act

DIM = 6
VALUES = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 5, 7, DIM)


def assert_zero_gradients(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_star_relus_bias_may_be_changed_before_backward_or_come_of_inference_mode(x: Tensor) -> None:
    mlp = Mlp(DIM, act="star_relu")
    wanted = [parameter for name, parameter in mlp.named_parameters() if name != "act.bias"]
    expected = torch.autograd.grad(mlp(x).sum(), wanted)
    for frozen in (False, True):
        mlp.act.bias = nn.Parameter(torch.zeros(1), requires_grad=not frozen)
        y = mlp(x)
        nn.init.ones_(mlp.act.bias)
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), wanted), expected))
    with torch.inference_mode():
        inferred = torch.zeros(1)
    mlp.act.bias = nn.Parameter(inferred, requires_grad=False)
    assert all(map(torch.equal, torch.autograd.grad(mlp(x).sum(), wanted), expected))


# ---- activations ----------------------------------------------------------------------------------------------------


def test_star_relu() -> None:
    act = StarReLU()
    assert torch.equal(act(VALUES), torch.tensor([0.0, 0.0, 0.0, 0.25, 9.0]))
    nn.init.constant_(act.scale, 2.0)
    nn.init.constant_(act.bias, -0.5)
    assert torch.equal(act(VALUES), torch.tensor([-0.5, -0.5, -0.5, 0.0, 17.5]))
    act(VALUES).sum().backward()
    assert act.scale.grad is not None and act.scale.grad.item() == 9.25
    assert act.bias.grad is not None and act.bias.grad.item() == 5.0


def test_squared_relu() -> None:
    assert torch.equal(SquaredReLU()(VALUES), torch.tensor([0.0, 0.0, 0.0, 0.25, 9.0]))


@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
def test_torchs_own(name: str) -> None:
    assert torch.equal(build_act(name)(VALUES), getattr(F, name)(VALUES))


def test_each_call_builds_a_new_activation() -> None:
    assert build_act("star_relu") is not build_act("star_relu")


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"act must be one of gelu, .*star_relu, got 'geluu'"):
        build_act("geluu")
    with pytest.raises(ValueError, match="act must be one of"):
        Mlp(DIM, act="geluu")


# ---- Mlp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_two_1x1_convolutions(x: Tensor, bias: bool) -> None:
    mlp = Mlp(DIM, ratio=2.5, bias=bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), mlp.fc1.weight[:, :, None, None], mlp.fc1.bias)
    assert y.shape == (3, 15, 5, 7)
    y = F.conv2d(F.gelu(y), mlp.fc2.weight[:, :, None, None], mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), y.permute(0, 2, 3, 1))
    assert (mlp.fc1.bias is not None) == (mlp.fc2.bias is not None) == bias


def test_mlp_takes_any_leading_shape(x: Tensor) -> None:
    mlp = Mlp(DIM)
    torch.testing.assert_close(mlp(x.flatten(1, 2)), mlp(x).flatten(1, 2))
    torch.testing.assert_close(mlp(x[:, 0, 0]), mlp(x)[:, 0, 0])


def test_kind_is_a_key_of_the_break_even_rates() -> None:
    assert Mlp.kind == "mlp" and "mlp" in BREAK_EVEN


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp_in_bfloat16(act: str, x: Tensor) -> None:
    mlp = Mlp(DIM, act=act)
    expected = mlp(x)
    out = mlp.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    # float32 parameters, as under autocast
    assert build_act(act)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp_of_a_batch_without_samples(act: str) -> None:
    mlp = Mlp(DIM, act=act)
    x = torch.randn(0, 5, 7, DIM, requires_grad=True)
    out = mlp(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert_zero_gradients(mlp)


# ---- MlpHead --------------------------------------------------------------------------------------------------------


def test_head_by_its_formula() -> None:
    torch.manual_seed(0)
    head = MlpHead(DIM, 10, ratio=2.0)
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    x = torch.randn(4, DIM)
    hidden = torch.relu(x @ head.fc1.weight.T + head.fc1.bias) ** 2
    hidden = F.layer_norm(hidden, (12,), head.norm.weight, head.norm.bias, eps=1e-5)
    torch.testing.assert_close(head(x), hidden @ head.fc2.weight.T + head.fc2.bias)


def test_head_drops_before_its_last_layer_and_in_training_only() -> None:
    torch.manual_seed(0)
    head = MlpHead(DIM, 10, drop_rate=0.5)
    x = torch.randn(64, DIM)
    seen: list[torch.Tensor] = []
    head.fc2.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    head(x)
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    head.eval()(x)
    assert (seen[1] != 0).all()
    assert torch.equal(head(x), head(x))


def test_head_in_bfloat16_and_of_a_batch_without_samples() -> None:
    head = MlpHead(DIM, 10)
    out = head(torch.randn(0, DIM))
    assert out.shape == (0, 10)
    out.sum().backward()
    assert_zero_gradients(head)
    assert head.bfloat16()(torch.randn(2, DIM).bfloat16()).dtype == torch.bfloat16


def test_the_names_are_those_of_a_config() -> None:
    assert tuple(ACTIVATIONS) == get_args(ActName)
