"""Norms in channels-last layout against torch's in (B, C, H, W)."""

import warnings
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from layers.norm import NORMS, Affine, GroupNorm1, LayerNorm, NormName, build_norm

DIM = 6


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 5, 7, DIM) + 1


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_group_norm_is_torchs_with_one_group(x: Tensor, eps: float, bias: bool) -> None:
    ours = GroupNorm1(DIM, eps, bias)
    randomise(ours)
    theirs = nn.GroupNorm(1, DIM, eps)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(torch.zeros(DIM) if ours.bias is None else ours.bias)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), theirs(nchw(b))
    torch.testing.assert_close(nchw(out), expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(x)
    (out * weights).sum().backward()
    (expected * nchw(weights)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    if ours.bias is not None:
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-4)


def test_group_norm_of_pooled_features() -> None:
    x = torch.randn(4, DIM)  # (B, C), behind a pooling head
    torch.testing.assert_close(GroupNorm1(DIM)(x), nn.GroupNorm(1, DIM)(x))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs_over_channels(x: Tensor, bias: bool) -> None:
    ours = LayerNorm(DIM, bias=bias)
    randomise(ours)
    mean, var = nchw(x).mean(1, keepdim=True), nchw(x).var(1, keepdim=True, unbiased=False)
    expected = (nchw(x) - mean) / (var + 1e-6).sqrt() * ours.weight[:, None, None]
    if bias:
        expected = expected + ours.bias[:, None, None]
    torch.testing.assert_close(nchw(ours(x)), expected, rtol=1e-5, atol=1e-5)
    assert (ours.bias is not None) == bias


def test_affine_scales_and_shifts_each_channel(x: Tensor) -> None:
    ours = Affine(DIM)
    assert torch.equal(ours(x), x)
    randomise(ours)
    torch.testing.assert_close(nchw(ours(x)), nchw(x) * ours.weight[:, None, None] + ours.bias[:, None, None])


# ---- by name --------------------------------------------------------------------------------------------------------


def test_build_norm_builds_what_the_name_says() -> None:
    kinds = {"group_norm": GroupNorm1, "layer_norm": LayerNorm}
    eps = {"group_norm": 1e-5, "group_norm_no_bias": 1e-6, "layer_norm": 1e-6, "layer_norm_no_bias": 1e-6}
    for name in NORMS:
        norm = build_norm(name, DIM)
        if name == "none":
            assert isinstance(norm, nn.Identity)
            continue
        if name == "affine":
            assert isinstance(norm, Affine) and list(norm.state_dict()) == ["weight", "bias"]
            continue
        assert type(norm) is kinds[name.removesuffix("_no_bias")]
        assert norm.eps == eps[name]
        assert build_norm(name, DIM, eps=1e-3).eps == 1e-3
        keys = ["weight"] if name.endswith("_no_bias") else ["weight", "bias"]
        assert list(norm.state_dict()) == keys


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"norm must be one of group_norm, .*none, got 'batch_norm'"):
        build_norm("batch_norm", DIM)


def test_settings_are_shown() -> None:
    assert repr(GroupNorm1(DIM, bias=False)) == "GroupNorm1(6, eps=1e-05, bias=False)"


# ---- what every norm must do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_never_mixes_samples(name: str, x: Tensor) -> None:
    norm = randomise(build_norm(name, DIM))
    torch.testing.assert_close(norm(x), torch.cat([norm(sample[None]) for sample in x]))


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_stays_bfloat16(name: str, x: Tensor) -> None:
    norm = randomise(build_norm(name, DIM))
    out, expected = norm.bfloat16()(x.bfloat16()), norm.float()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_activations_with_float32_parameters(name: str, x: Tensor) -> None:
    assert build_norm(name, DIM)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_without_samples(name: str) -> None:
    norm = build_norm(name, DIM)
    x = torch.randn(0, 5, 7, DIM, requires_grad=True)
    out = norm(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    for key, parameter in norm.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


# ---- torch.fx, TorchScript and tracing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_graphs_scripts_and_traces_agree_at_other_sizes(name: str, x: Tensor) -> None:
    norm = randomise(build_norm(name, DIM))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced: Any = torch.jit.trace(norm, x)
    other = torch.randn(2, 3, 4, DIM)
    for twin in (torch.fx.symbolic_trace(norm), torch.jit.script(norm), traced):
        assert torch.equal(twin(x), norm(x)) and torch.equal(twin(other), norm(other))


def test_the_names_are_those_of_a_config() -> None:
    assert tuple(NORMS) == get_args(NormName)
