"""Operators of our own, where torch's do not serve; each with the plain form it equals."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("drop_path_zoo::depthwise_conv", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=weight.shape[0])  # (B, C, H, W)
    return y.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("drop_path_zoo::depthwise_conv_backward", mutates_args=())
def _depthwise_conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad, image = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)  # (B, C, H, W)
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, image, weight, None, [1, 1], padding, [1, 1], False, [0, 0], weight.shape[0], [True, True, False]
    )
    return grad_x.permute(0, 2, 3, 1).contiguous(), grad_weight.contiguous()


depthwise_conv.register_fake(lambda x, weight: torch.empty_like(x, memory_format=torch.contiguous_format))
_depthwise_conv_backward.register_fake(
    lambda grad, x, weight: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )
)
depthwise_conv.register_autograd(
    lambda ctx, grad: _depthwise_conv_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
