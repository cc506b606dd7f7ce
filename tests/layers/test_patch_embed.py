"""PatchEmbed against a convolution in (B, C, H, W) with its norm before or behind it."""

import pytest
import torch
from torch import Tensor, nn

from layers.norm import LayerNorm
from layers.patch_embed import PatchEmbed


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 19, 30, 4)


def build(norm_first: bool = False, norm: nn.Module | None = None) -> PatchEmbed:
    return PatchEmbed(4, 6, kernel_size=7, stride=4, padding=2, norm=norm, norm_first=norm_first)


def layer_norm(dim: int) -> LayerNorm:
    norm = LayerNorm(dim)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("norm_first", [False, True])
def test_without_a_norm_it_is_a_convolution(x: Tensor, norm_first: bool) -> None:
    embed = build(norm_first)
    out = embed(x)
    assert out.shape == (2, 5, 7, 6)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), embed.conv(x.permute(0, 3, 1, 2).contiguous()))
    assert list(embed.state_dict()) == ["conv.weight", "conv.bias"]


def test_norm_behind_the_convolution(x: Tensor) -> None:
    embed = build(norm=layer_norm(6))
    convolved = embed.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(embed(x), embed.norm(convolved))


def test_norm_before_the_convolution(x: Tensor) -> None:
    embed = build(norm=layer_norm(4), norm_first=True)
    convolved = embed.conv(embed.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(embed(x), convolved)


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_leaves_is_contiguous(x: Tensor, channels_last: bool) -> None:
    # the blocks behind it run on contiguous channels, from images in either memory format
    images = x.permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images.contiguous()
    embed = build()
    out = embed(images.permute(0, 2, 3, 1))
    assert out.is_contiguous()
    torch.testing.assert_close(out, embed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_stays_bfloat16(x: Tensor, norm_first: bool) -> None:
    embed = build(norm_first, layer_norm(4 if norm_first else 6))
    expected = embed(x)
    out = embed.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_batch_without_samples(norm_first: bool) -> None:
    embed = build(norm_first, layer_norm(4 if norm_first else 6))
    x = torch.randn(0, 19, 30, 4, requires_grad=True)
    out = embed(x)
    assert out.shape == (0, 5, 7, 6)
    out.sum().backward()
    assert x.grad is not None
    for name, parameter in embed.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
