"""PatchEmbed against a convolution in (B, C, H, W) with its norm before or behind it; TokenEmbed by its tokens."""

import pytest
import torch
from torch import Tensor, nn

from layers.norm import LayerNorm
from layers.patch_embed import PatchEmbed, TokenEmbed


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


# ---- tokens ---------------------------------------------------------------------------------------------------------


def tokens(**settings) -> TokenEmbed:
    embed = TokenEmbed(4, 3, 5, **settings)
    for parameter in embed.parameters():
        nn.init.normal_(parameter)
    return embed


def patches() -> Tensor:
    return torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_positions_alone_leave_the_grid() -> None:
    embed = tokens()
    assert {k: tuple(v.shape) for k, v in embed.state_dict().items()} == {"pos_embed": (1, 15, 4)}
    assert embed.pos_embed is not None
    out = embed(patches())
    assert out.shape == (2, 3, 5, 4)
    torch.testing.assert_close(out.flatten(1, 2), patches().flatten(1, 2) + embed.pos_embed)


@pytest.mark.parametrize("pos_embed", ["none", "patches", "all"])
def test_class_and_register_tokens_come_first(pos_embed) -> None:
    embed = tokens(class_token=True, register_tokens=2, pos_embed=pos_embed)
    out = embed(patches())
    assert out.shape == (2, 18, 4) and embed.num_prefix_tokens == 3
    assert embed.cls_token is not None and embed.reg_token is not None
    prefix = torch.cat([embed.cls_token, embed.reg_token], dim=1).expand(2, 3, 4)
    rows = patches().flatten(1, 2)
    if embed.pos_embed is not None:
        assert embed.pos_embed.shape == (1, 18 if pos_embed == "all" else 15, 4)
        rows = rows + embed.pos_embed[:, -15:]
        prefix = prefix + embed.pos_embed[:, :3] if pos_embed == "all" else prefix
    torch.testing.assert_close(out, torch.cat([prefix, rows], dim=1))


def test_new_tokens_are_small() -> None:
    embed = TokenEmbed(64, 8, 8, class_token=True, register_tokens=4, pos_embed="all")
    assert embed.pos_embed is not None and embed.cls_token is not None and embed.reg_token is not None
    assert float(embed.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert 0 < float(embed.cls_token.detach().abs().max()) < 1e-5 > float(embed.reg_token.detach().abs().max()) > 0


def test_tokens_of_a_batch_without_samples() -> None:
    embed = tokens(class_token=True, pos_embed="all")
    out = embed(patches()[:0])
    assert out.shape == (0, 16, 4)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in embed.parameters())


@pytest.mark.parametrize("size", [(5, 3), (3, 6), (15, 1)])
def test_positions_at_another_size(size: tuple[int, int]) -> None:
    x = torch.randn(1, *size, 4)
    with pytest.raises(
        ValueError, match=rf"built for 3 x 5 positions, got {size[0]} x {size[1]}; build the model with"
    ):
        tokens()(x)
    assert tokens(class_token=True, pos_embed="none")(x).shape == (1, 1 + size[0] * size[1], 4)


# ---- torch.fx and TorchScript ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"class_token": True}, {"class_token": True, "register_tokens": 2}])
@pytest.mark.parametrize("pos_embed", ["patches", "all"])
def test_graphs_and_scripts_agree_and_check_sizes_too(settings: dict, pos_embed) -> None:
    embed = tokens(**settings, pos_embed=pos_embed if settings else "patches")
    for twin in (torch.fx.symbolic_trace(embed), torch.jit.script(embed)):
        assert torch.equal(twin(patches()), embed(patches()))
        with pytest.raises(
            (ValueError, torch.jit.Error), match="built for 3 x 5 positions, got 5 x 3; build the model with"
        ):
            twin(torch.randn(1, 5, 3, 4))
