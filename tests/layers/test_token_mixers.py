"""Token mixers against plain computations in (B, C, H, W), and what every one of them must do."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.drop_path import BREAK_EVEN
from layers.fast import plain_paths
from layers.token_mixers import (
    TOKEN_MIXERS,
    Attention,
    Identity,
    Pooling,
    RandomMixing,
    SepConv,
    SpatialMlp,
    TokenMixerName,
)

HEIGHT, WIDTH, DIM = 5, 7, 12

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "pooling": Pooling,
    "identity": Identity,
    "random_mixing": lambda: RandomMixing(HEIGHT * WIDTH),
    "spatial_mlp": lambda: SpatialMlp(HEIGHT, WIDTH, hidden=20),
    "spatial_linear": lambda: SpatialMlp(HEIGHT, WIDTH),
    "sep_conv": lambda: SepConv(DIM),
    "attention": lambda: Attention(DIM, head_dim=4, qkv_bias=True, proj_bias=True),
}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, HEIGHT, WIDTH, DIM)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5])
def test_pooling_is_average_pooling_minus_the_input(x: Tensor, size: int) -> None:
    pooled = F.avg_pool2d(nchw(x), size, stride=1, padding=size // 2, count_include_pad=False)
    torch.testing.assert_close(nchw(Pooling(size)(x)), pooled - nchw(x))


def test_pooling_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).reshape(1, 2, 2, 1)
    # every window holds all four positions, whose average is 3; what is padded does not count
    assert torch.equal(Pooling(3)(x).flatten(), torch.tensor([2.0, 1.0, 0.0, -3.0]))


def test_identity(x: Tensor) -> None:
    assert Identity()(x) is x


def test_random_mixing_multiplies_positions_by_its_matrix(x: Tensor) -> None:
    mixer = RandomMixing(HEIGHT * WIDTH)
    tokens = nchw(x).flatten(2)  # (B, C, N)
    mixed = torch.einsum("mn,bcn->bcm", mixer.random_matrix, tokens)
    torch.testing.assert_close(nchw(mixer(x)), mixed.reshape(3, DIM, HEIGHT, WIDTH))


def test_random_mixing_is_an_average_that_is_never_trained(x: Tensor) -> None:
    mixer = RandomMixing(HEIGHT * WIDTH)
    matrix = mixer.random_matrix
    assert list(mixer.state_dict()) == ["random_matrix"] and matrix.shape == (35, 35)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(35))
    assert (matrix > 0).all() and matrix.unique().numel() > 1000
    mixer(x.requires_grad_()).square().sum().backward()
    assert not matrix.requires_grad and matrix.grad is None


def test_spatial_mlp_is_two_layers_over_positions(x: Tensor) -> None:
    mixer = SpatialMlp(HEIGHT, WIDTH, hidden=20, act="relu")
    randomise(mixer)
    assert isinstance(mixer.fc2, nn.Linear) and mixer.fc1.weight.shape == (20, 35)
    tokens = nchw(x).flatten(2)  # (B, C, N)
    hidden = torch.einsum("hn,bcn->bch", mixer.fc1.weight, tokens) + mixer.fc1.bias
    mixed = torch.einsum("nh,bch->bcn", mixer.fc2.weight, hidden.relu()) + mixer.fc2.bias
    torch.testing.assert_close(nchw(mixer(x)), mixed.reshape(3, DIM, HEIGHT, WIDTH), rtol=1e-4, atol=1e-4)


def test_spatial_mlp_without_hidden_units_is_one_layer(x: Tensor) -> None:
    mixer = SpatialMlp(HEIGHT, WIDTH)
    assert {k: tuple(v.shape) for k, v in mixer.state_dict().items()} == {"fc1.weight": (35, 35), "fc1.bias": (35,)}
    mixed = torch.einsum("mn,bcn->bcm", mixer.fc1.weight, nchw(x).flatten(2)) + mixer.fc1.bias
    torch.testing.assert_close(nchw(mixer(x)), mixed.reshape(3, DIM, HEIGHT, WIDTH))


@pytest.mark.parametrize(("kernel_size", "expansion"), [(7, 2.0), (3, 1.5)])
def test_sep_conv_is_three_convolutions(x: Tensor, kernel_size: int, expansion: float) -> None:
    mixer = SepConv(DIM, expansion, kernel_size)
    randomise(mixer)
    hidden = int(expansion * DIM)
    y = F.conv2d(nchw(x), mixer.pwconv1.weight[:, :, None, None])
    y = mixer.act1.scale * F.relu(y) ** 2 + mixer.act1.bias
    assert y.shape[1] == hidden
    y = F.conv2d(y, mixer.dwconv.weight, padding=kernel_size // 2, groups=hidden)
    y = F.conv2d(y, mixer.pwconv2.weight[:, :, None, None])
    torch.testing.assert_close(nchw(mixer(x)), y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_dim", [3, 12])
def test_attention_is_torchs_multi_head_attention(x: Tensor, head_dim: int, bias: bool) -> None:
    mixer = Attention(DIM, head_dim=head_dim, qkv_bias=bias, proj_bias=bias)
    randomise(mixer)
    tokens = nchw(x).flatten(2).permute(2, 0, 1)  # (N, B, C)
    expected, _ = F.multi_head_attention_forward(
        tokens,
        tokens,
        tokens,
        embed_dim_to_check=DIM,
        num_heads=DIM // head_dim,
        in_proj_weight=mixer.qkv.weight,
        in_proj_bias=mixer.qkv.bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=mixer.proj.weight,
        out_proj_bias=mixer.proj.bias,
        need_weights=False,
    )
    expected = expected.permute(1, 2, 0).reshape(3, DIM, HEIGHT, WIDTH)
    torch.testing.assert_close(nchw(mixer(x)), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_a_softmax_of_scaled_products(x: Tensor) -> None:
    mixer = Attention(DIM, head_dim=DIM)
    q, k, v = (nchw(x).flatten(2).transpose(1, 2) @ mixer.qkv.weight.T).chunk(3, dim=-1)  # each (B, N, C)
    weights = torch.softmax(q @ k.transpose(1, 2) / DIM**0.5, dim=-1)
    torch.testing.assert_close(mixer(x).flatten(1, 2), weights @ v @ mixer.proj.weight.T)


def test_attention_takes_token_sequences(x: Tensor) -> None:
    mixer = Attention(DIM, head_dim=4)
    torch.testing.assert_close(mixer(x.flatten(1, 2)), mixer(x).flatten(1, 2))


# ---- what every mixer must do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXERS)
def test_kind_is_a_key_of_the_break_even_rates(kind: str) -> None:
    # a spatial MLP is as dear as the channel MLP and breaks even where that does
    assert MIXERS[kind]().kind == ("mlp" if kind.startswith("spatial") else kind)
    assert MIXERS[kind]().kind in BREAK_EVEN


@pytest.mark.parametrize("kind", MIXERS)
def test_keeps_shape_and_works_for_any_memory_order(kind: str, x: Tensor) -> None:
    mixer = MIXERS[kind]()
    out = mixer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(mixer(nchw(x).permute(0, 2, 3, 1)), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MIXERS)
def test_never_mixes_samples(kind: str, x: Tensor) -> None:
    mixer = MIXERS[kind]()
    torch.testing.assert_close(mixer(x), torch.cat([mixer(sample[None]) for sample in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MIXERS)
def test_bfloat16_stays_bfloat16(kind: str, x: Tensor) -> None:
    mixer = MIXERS[kind]()
    expected = mixer(x)
    out = mixer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["pooling", "identity", "random_mixing"])
def test_bfloat16_activations_with_float32_parameters(kind: str, x: Tensor) -> None:
    # as under autocast, which casts linear layers and convolutions but not these
    assert MIXERS[kind]()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MIXERS)
def test_a_batch_without_samples(kind: str) -> None:
    mixer = MIXERS[kind]()
    x = torch.randn(0, HEIGHT, WIDTH, DIM, requires_grad=True)
    out = mixer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    for name, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_random_mixing_at_another_size() -> None:
    with pytest.raises(ValueError, match=r"built for 35 positions, got 6 x 7; build the model with image_size"):
        RandomMixing(35)(torch.randn(1, 6, 7, DIM))


@pytest.mark.parametrize("size", [(6, 7), (7, 5), (35, 1)])
def test_spatial_mlp_at_another_size(size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"built for 5 x 7 positions, got {size[0]} x {size[1]}; build the model with"
    ):
        SpatialMlp(5, 7)(torch.randn(1, *size, DIM))


def test_attention_with_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="head_dim 5 does not divide 12 channels"):
        Attention(DIM, head_dim=5)


# ---- torch.fx, TorchScript and tracing ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MIXERS)
def test_graphs_scripts_and_traces_agree(name: str, training: bool, x: Tensor) -> None:
    mixer = MIXERS[name]().train(training)
    randomise(mixer)
    with warnings.catch_warnings(), plain_paths():  # torch compares a trace with the module, to 1e-5
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced: Any = torch.jit.trace(mixer, x)
    for twin in (torch.fx.symbolic_trace(mixer), torch.jit.script(mixer), traced):
        torch.testing.assert_close(twin(x), mixer(x), rtol=1e-4, atol=1e-3)
        with plain_paths():  # as graphs, scripts and traces are
            assert torch.equal(twin(x), mixer(x)) and torch.equal(twin(x[:1]), mixer(x[:1]))


@pytest.mark.parametrize("name", ["random_mixing", "spatial_mlp"])
def test_graphs_and_scripts_check_sizes_too(name: str) -> None:
    mixer = MIXERS[name]()
    for twin in (torch.fx.symbolic_trace(mixer), torch.jit.script(mixer)):
        with pytest.raises(
            (ValueError, torch.jit.Error), match="positions, got 6 x 7; build the model with image_size"
        ):
            twin(torch.randn(1, 6, 7, DIM))


def test_attention_scripted_takes_tokens_as_well_as_a_grid() -> None:
    mixer = MIXERS["attention"]()
    scripted, graph = torch.jit.script(mixer), torch.fx.symbolic_trace(mixer)
    for shape in ((2, 9, DIM), (2, 3, 3, DIM), (0, 9, DIM)):
        x = torch.randn(shape)
        with plain_paths():
            expected = mixer(x)
        assert torch.equal(scripted(x), expected) and torch.equal(graph(x), expected)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_mixer_stands_in_the_table_by_its_name_in_a_config() -> None:
    assert tuple(TOKEN_MIXERS) == get_args(TokenMixerName)
    assert set(TOKEN_MIXERS.values()) == {Pooling, Identity, RandomMixing, SepConv, Attention, SpatialMlp}


def test_facts_of_the_classes() -> None:
    facts = {name: (m.kind, m.break_even, m.fixed_size, m.takes_tokens) for name, m in TOKEN_MIXERS.items()}
    assert facts == {
        "pooling": ("pooling", 0.3, False, False),
        "identity": ("identity", 0.6, False, True),
        "random_mixing": ("random_mixing", 0.2, True, False),
        "sep_conv": ("sep_conv", 0.05, False, False),
        "attention": ("attention", 0.05, False, True),
        "spatial_mlp": ("mlp", 0.05, True, False),
    }
    assert {m.kind: m.break_even for m in TOKEN_MIXERS.values()} == BREAK_EVEN
    assert list(BREAK_EVEN) == ["pooling", "identity", "random_mixing", "sep_conv", "attention", "mlp"]


CONFIG = SimpleNamespace(pool_size=5, conv_kernel_size=3, conv_expansion=1.5, head_dim=4, qkv_bias=True, proj_bias=False,
                         spatial_hidden=None, act="gelu")  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_MIXERS)
def test_each_is_built_from_a_config(name: str, x: Tensor) -> None:
    mixer = TOKEN_MIXERS[name].build(DIM, (HEIGHT, WIDTH), CONFIG)
    assert type(mixer) is TOKEN_MIXERS[name] and mixer(x).shape == x.shape
    smaller = x[:, :-1]
    if mixer.fixed_size:
        with pytest.raises(ValueError, match="build the model with image_size"):
            mixer(smaller)
    else:
        assert mixer(smaller).shape == smaller.shape
    if mixer.takes_tokens:
        assert mixer(x.flatten(1, 2)).shape == (3, HEIGHT * WIDTH, DIM)


def test_what_each_reads_of_a_config() -> None:
    pooling, _, _, conv, attention, mlp = (m.build(DIM, (HEIGHT, WIDTH), CONFIG) for m in TOKEN_MIXERS.values())
    assert isinstance(pooling, Pooling) and pooling.pool_size == 5
    assert isinstance(conv, SepConv) and conv.dwconv.weight.shape == (18, 1, 3, 3)
    assert isinstance(attention, Attention) and (attention.head_dim, attention.proj.bias) == (4, None)
    assert attention.qkv.bias is not None
    assert isinstance(mlp, SpatialMlp) and isinstance(mlp.fc2, nn.Identity)
