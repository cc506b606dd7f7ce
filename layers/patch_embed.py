"""What makes tokens of an image: the strided convolution of a stem or between stages, and ViT's learned tokens."""

from typing import Literal

import torch
from torch import Tensor, nn

from layers.fast_patches import conv2d, is_fast_conv

PosEmbed = Literal["none", "patches", "all"]


@torch.fx.wrap  # stays one call in a graph of torch.fx, and checks there as well
def check_grid(x: Tensor, height: int, width: int, what: str) -> Tensor:
    """Returns x, (B, height, width, C), as it is.

    Raises:
        ValueError: It has other positions; `what` names what was built for these.
    """
    if not _is_tracing() and (x.shape[1] != height or x.shape[2] != width):
        raise ValueError(
            f"{what} was built for {height} x {width} positions, got {x.shape[1]} x {x.shape[2]}; "
            "build the model with image_size set to the size used"
        )
    return x


@torch.fx.wrap
def check_positions(x: Tensor, count: int, what: str) -> Tensor:
    """Returns x, (B, H, W, C) with H * W = count, as it is.

    Raises:
        ValueError: It has another number of positions; `what` names what was built for that.
    """
    if not _is_tracing() and x.shape[1] * x.shape[2] != count:
        raise ValueError(
            f"{what} was built for {count} positions, got {x.shape[1]} x {x.shape[2]}; "
            "build the model with image_size set to the size used"
        )
    return x


def _is_tracing() -> bool:
    """Whether torch.jit.trace looks on, which takes sizes for variables and would warn of a branch on them."""
    return not torch.jit.is_scripting() and torch.jit.is_tracing()


class PatchEmbed(nn.Module):
    """Strided convolution in channels-last layout, (B, H, W, C) -> (B, H', W', dim).

    Args:
        in_chans: Channels C of the input.
        dim: Channels of the output.
        kernel_size: In positions.
        stride: In positions.
        padding: In positions.
        norm: Norm of the input (between the stages of MetaFormer Baselines) or of the output (its stem).
        norm_first: Which of the two.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int,
        norm: nn.Module | None = None,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.norm_first = norm_first
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = self.norm(x)
        x = x.permute(0, 3, 1, 2)
        x = self.conv_fast(x) if not torch.jit.is_scripting() and self.is_fast(x) else self.conv(x)  # (B, dim, H', W')
        # contiguous: a no-op behind channels_last input; once per stage otherwise, not once per linear layer
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, H', W', dim)
        return x if self.norm_first else self.norm(x)

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `conv_fast` may take images, (B, C, H, W), and gains by it."""
        return is_fast_conv(x, self.conv)

    @torch.jit.unused
    def conv_fast(self, x: Tensor) -> Tensor:
        """The convolution of (B, C, H, W), with `is_fast(x)`."""
        return conv2d(x, self.conv)


class TokenEmbed(nn.Module):
    """Learned positions, and learned tokens in front of the patches, as in ViT (arXiv 2010.11929).

    Maps (B, H, W, C) to (B, 1 + R + H * W, C): class token, R register tokens (arXiv 2309.16588), patches row by row.
    Without class and register tokens the patches stay (B, H, W, C).

    Args:
        dim: Channels C.
        height: H of its input, which a position embedding fixes.
        width: W of its input.
        class_token: Whether there is a class token.
        register_tokens: Their number R.
        pos_embed: `none`; `patches`: added to the patches only (DeiT-III); `all`: to the tokens in front as well (ViT).
    """

    def __init__(
        self,
        dim: int,
        height: int,
        width: int,
        *,
        class_token: bool = False,
        register_tokens: int = 0,
        pos_embed: PosEmbed = "patches",
    ) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.num_prefix_tokens = int(class_token) + register_tokens
        self.embeds_all = pos_embed == "all"
        count = height * width + (self.num_prefix_tokens if self.embeds_all else 0)
        # Names and shapes are timm's.
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, register_tokens, dim)) if register_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, count, dim)) if pos_embed != "none" else None
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = check_grid(x, self.height, self.width, "the position embedding")
        batch, height, width, dim = x.shape
        if self.pos_embed is not None and not self.embeds_all:
            x = x + self.pos_embed.reshape(1, height, width, dim)
        if self.num_prefix_tokens == 0:
            return x
        tokens: list[Tensor] = []
        if self.cls_token is not None:
            tokens.append(self.cls_token.expand(batch, -1, -1))
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(batch, -1, -1))
        tokens.append(x.reshape(batch, height * width, dim))
        x = torch.cat(tokens, dim=1)  # (B, N, C)
        if self.pos_embed is not None and self.embeds_all:
            x = x + self.pos_embed
        return x

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.height} x {self.width}, prefix_tokens={self.num_prefix_tokens}"
