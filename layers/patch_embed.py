"""Patch embedding: the strided convolution of a stem or between two stages."""

from torch import Tensor, nn


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
        x = self.conv(x.permute(0, 3, 1, 2))  # (B, dim, H', W')
        # contiguous: a no-op behind channels_last input; once per stage otherwise, not once per linear layer
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, H', W', dim)
        return x if self.norm_first else self.norm(x)
