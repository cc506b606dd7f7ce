"""Token mixers: what a MetaFormer block exchanges between positions. All map (B, H, W, C) to (B, H, W, C).

PoolFormer (arXiv 2111.11418), MetaFormer Baselines (arXiv 2210.13452), ViT (arXiv 2010.11929), MLP-Mixer
(arXiv 2105.01601) and ResMLP (arXiv 2105.03404). No dimension beside the batch is inferred
with -1, so that a batch without samples passes. What others ask of a mixer are attributes of its class, and `TOKEN_MIXERS`
holds every mixer by its name in a model's config: a new one is a class and a row here (docs/contributing.md).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers import fast_cuda
from layers.fast import call, is_linear, linear, mean_minus_self, scaled, takes
from layers.fast_attention import attention, plain_attention
from layers.fast_conv import star_relu_conv
from layers.fast_cuda import average_pool
from layers.kernels import depthwise_conv
from layers.mlp import Mlp, StarReLU, build_act, fast_mlp, is_fast_mlp
from layers.patch_embed import check_grid, check_positions

# What looks at sizes stays one call in a graph of torch.fx.
torch.fx.wrap("average_pool")
torch.fx.wrap("check_grid")
torch.fx.wrap("check_positions")


class TokenMixer(nn.Module):
    """What every token mixer says of itself.

    Attributes:
        kind: What its branch computes, a key of `layers.drop_path.BREAK_EVEN`; mixers of one cost share a kind.
        break_even: Drop rate from which leaving samples out of that kind of branch beats masking them, as measured there.
        fixed_size: Whether its weights belong to positions, so that it takes images of one size only.
        takes_tokens: Whether it also takes rows of tokens, (B, N, C), and so class and register tokens.
        per_channel: Whether it treats every channel alike, so that a scale per channel may stand before as well as behind it.
        first: Name of the linear layer over channels that it begins with; "": none.
        last: Name of the one that it ends with; its weights can take a scale per channel (`forward_scaled`).
        config_keys: Keys of a model's config that this mixer alone reads.
    """

    kind = ""
    break_even = 0.0
    fixed_size = False
    takes_tokens = False
    per_channel = False
    first, last = "", ""
    config_keys: tuple[str, ...] = ()

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "TokenMixer":
        """The mixer of one stage.

        Args:
            dim: Channels C.
            size: Positions (H, W) at the model's image size.
            config: The model's config; its keys are attributes.
        """
        return cls()


class Pooling(TokenMixer):
    """Average pooling minus the input, as in PoolFormer; padding is not counted.

    Args:
        pool_size: Odd window size in positions.
    """

    kind = "pooling"
    break_even = 0.3
    per_channel = True
    config_keys = ("pool_size",)

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        self.pool_size = pool_size

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "Pooling":
        """As `TokenMixer.build`."""
        return cls(config.pool_size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        y = average_pool(x.permute(0, 3, 1, 2), self.pool_size)  # (B, C, H, W), channels_last in memory
        return y.permute(0, 2, 3, 1) - x  # (B, H, W, C)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (B, H, W, C)."""
        return takes(x) and (x.device.type == "cpu" or fast_cuda.has_kernels(x))

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The same, keeping nothing for backward, with `is_fast(x)`."""
        if x.device.type == "cuda":
            return fast_cuda.mean_minus_self(x, self.pool_size)
        return mean_minus_self(x, self.pool_size)

    def extra_repr(self) -> str:
        """The window size."""
        return f"pool_size={self.pool_size}"


class Identity(TokenMixer):
    """Mixes nothing: the token mixer of IdentityFormer."""

    kind = "identity"
    break_even = 0.6
    takes_tokens = True
    per_channel = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class RandomMixing(TokenMixer):
    """Mixes all positions by a frozen random matrix with rows that sum to 1: the token mixer of RandFormer.

    Args:
        num_tokens: H * W of its input, which is thereby fixed.
    """

    kind = "random_mixing"
    break_even = 0.2
    fixed_size = True
    per_channel = True

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        matrix = torch.softmax(torch.rand(num_tokens, num_tokens), dim=-1)
        # A parameter, as in the original's checkpoints, but never trained.
        self.random_matrix = nn.Parameter(matrix, requires_grad=False)

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "RandomMixing":
        """As `TokenMixer.build`."""
        return cls(size[0] * size[1])

    def forward(self, x: Tensor) -> Tensor:
        x = check_positions(x, self.num_tokens, "random mixing")
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)  # (B, N, C)
        x = torch.matmul(self.random_matrix.to(x.dtype), x)
        return x.reshape(batch, height, width, dim)


class SpatialMlp(TokenMixer):
    """Linear layers over all positions, the same for every channel: the token mixer of MLP-Mixer and of ResMLP.

    Args:
        height: H of its input, which is thereby fixed.
        width: W of its input.
        hidden: Hidden units between two layers (MLP-Mixer), or `None` for one layer (ResMLP).
        act: Name of the activation between the two.
    """

    kind = "mlp"  # matrix products as large as the channel MLP's, so it breaks even where that does
    break_even = Mlp.break_even
    fixed_size = True
    config_keys = ("spatial_hidden",)

    def __init__(self, height: int, width: int, hidden: int | None = None, act: str = "gelu") -> None:
        super().__init__()
        self.height, self.width, self.hidden = height, width, hidden
        tokens = height * width
        self.fc1 = nn.Linear(tokens, hidden or tokens)
        self.act = build_act(act) if hidden else nn.Identity()
        self.fc2 = nn.Linear(hidden, tokens) if hidden else nn.Identity()

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "SpatialMlp":
        """As `TokenMixer.build`."""
        return cls(*size, config.spatial_hidden, config.act)

    def forward(self, x: Tensor) -> Tensor:
        x = check_grid(x, self.height, self.width, "the spatial MLP")
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim).transpose(1, 2)  # (B, C, N)
        x = self.layers(x)
        return x.transpose(1, 2).reshape(batch, height, width, dim)

    def layers(self, x: Tensor) -> Tensor:
        """The linear layers, (B, C, N) to the same."""
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        return self.fc2(self.act(self.fc1(x)))

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (B, C, N)."""
        return is_fast_mlp(x, self.fc1, self.act, self.fc2) or (not self.hidden and takes(x, self.fc1))

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The layers on (B, C, N), with `is_fast(x)`."""
        return fast_mlp(x, self.fc1, self.act, self.fc2) if self.hidden else call(self.fc1, x)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of (B, H, W, C) with stride 1 and no bias, which keeps H and W.

    torch.compile does not know how many samples mode `skip` keeps, predicts the memory layout of a convolution's output
    wrongly for such a batch, and stops with an assertion (torch 2.14). While training compiled code it therefore runs as an
    operator of our own, whose layout is always that of its input.

    Args:
        dim: Channels C.
        kernel_size: Odd size of the kernel.
    """

    any_batch = True  # tells layers.drop_path that compiled code may skip around this convolution

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.compiles_for_training():
            return depthwise_conv(x, self.weight.to(x.dtype))
        y = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)  # (B, C, H, W), channels_last in memory
        return y.permute(0, 2, 3, 1)

    @torch.jit.unused
    def compiles_for_training(self) -> bool:
        """Whether this is torch.compile's look at training code, which an export is not."""
        return self.training and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class SepConv(TokenMixer):
    """Inverted separable convolution of MobileNetV2 with StarReLU: the token mixer of ConvFormer.

    Args:
        dim: Channels C.
        expansion_ratio: Hidden channels per channel.
        kernel_size: Odd size of the depthwise kernel.
    """

    kind = "sep_conv"
    break_even = 0.05
    first, last = "pwconv1", "pwconv2"
    config_keys = ("conv_kernel_size", "conv_expansion")

    def __init__(self, dim: int, expansion_ratio: float = 2.0, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = int(expansion_ratio * dim)
        self.pwconv1 = nn.Linear(dim, hidden, bias=False)
        self.act1 = StarReLU()
        self.dwconv = DepthwiseConv(hidden, kernel_size)
        self.pwconv2 = nn.Linear(hidden, dim, bias=False)

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "SepConv":
        """As `TokenMixer.build`."""
        return cls(dim, config.conv_expansion, config.conv_kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_scaled(x, None)
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_scaled` may take x, (B, H, W, C)."""
        return (
            takes(x, self.pwconv1, self.act1, self.dwconv, self.pwconv2)
            and is_linear(self.pwconv1, self.pwconv2)
            and type(self.act1) is StarReLU
            and type(self.dwconv) is DepthwiseConv
        )

    @torch.jit.unused
    def forward_scaled(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """This mixer times a scale per channel, with `is_fast(x)`: the scale goes into the last layer's weights.

        Args:
            x: (B, H, W, C).
            scale: (C,), or `None` for 1.
        """
        x = linear(x, self.pwconv1.weight, self.pwconv1.bias)
        x = star_relu_conv(x, self.act1.scale, self.act1.bias, self.dwconv.weight)
        return linear(x, *scaled(self.pwconv2.weight, self.pwconv2.bias, scale))


class Attention(TokenMixer):
    """Multi-head self-attention over all positions: the token mixer of CAFormer's last stages and of ViT.

    Args:
        dim: Channels C.
        head_dim: Channels per head; must divide dim.
        qkv_bias: Whether query, key and value have a bias.
        proj_bias: Whether the output projection has a bias.

    Raises:
        ValueError: head_dim does not divide dim.
    """

    kind = "attention"
    break_even = 0.05
    takes_tokens = True
    first, last = "qkv", "proj"
    config_keys = ("head_dim", "qkv_bias", "proj_bias")

    def __init__(self, dim: int, head_dim: int = 32, qkv_bias: bool = False, proj_bias: bool = False) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"attention: head_dim {head_dim} does not divide {dim} channels")
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    @classmethod
    def build(cls, dim: int, size: tuple[int, int], config: Any) -> "Attention":
        """As `TokenMixer.build`."""
        return cls(dim, config.head_dim, qkv_bias=config.qkv_bias, proj_bias=config.proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_scaled(x, None)
        return self.proj(plain_attention(self.split(self.qkv(x))).reshape(x.shape))

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values of a grid of positions or a row of tokens, (B, ..., 3 C) -> (B, N, 3, heads, D)."""
        qkv = qkv.flatten(1, -2)
        return qkv.reshape(qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_scaled` may take x, (B, ..., C)."""
        return takes(x, self.qkv, self.proj) and is_linear(self.qkv, self.proj)

    @torch.jit.unused
    def forward_scaled(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """This mixer times a scale per channel, with `is_fast(x)`: the scale goes into the last layer's weights.

        Args:
            x: (B, ..., C).
            scale: (C,), or `None` for 1.
        """
        qkv = self.split(linear(x, self.qkv.weight, self.qkv.bias))
        return linear(attention(qkv).reshape(x.shape), *scaled(self.proj.weight, self.proj.bias, scale))


TokenMixerName = Literal["pooling", "identity", "random_mixing", "sep_conv", "attention", "spatial_mlp"]
TOKEN_MIXERS: dict[str, type[TokenMixer]] = {
    "pooling": Pooling,
    "identity": Identity,
    "random_mixing": RandomMixing,
    "sep_conv": SepConv,
    "attention": Attention,
    "spatial_mlp": SpatialMlp,
}
"""Every token mixer by its name in a model's config."""
