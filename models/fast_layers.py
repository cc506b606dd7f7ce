"""The fast paths of `layers.fast` for models of other libraries: their layers take them, and stay what they are."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU as TimmGELU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers import LayerNormAct, LayerNormAct2d
from timm.layers import Mlp as TimmMlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.convnext import LayerNorm2d

from layers import fast_cpu
from layers.fast import FastLinear, are_plain, dtype_of, is_linear, takes
from layers.fast_attention import attention_of, has_few_tokens, takes_attention, window_attention
from layers.fast_conv import FastDepthwiseConv2d, is_depthwise
from layers.fast_norm import layer_norm
from layers.fast_patches import FastConv2d, is_dense
from layers.mlp import fast_mlp, is_fast_mlp


def use_fast_layers(model: nn.Module) -> int:
    """Lets the layers of a model of timm or torchvision take the fast paths in eager code.

    Changed in place are torch's linear layers and layer norms, its depthwise convolutions with stride 1 that keep the size,
    its dense ones with many weights, timm's MLPs, blocks of ConvNeXt and modules of attention, those of Swin included: each
    becomes of a class derived from its own. Parameters, buffers, state-dict keys, hooks and what is computed stay as they
    are, but for rounding; copies and pickles keep the class. A second call changes nothing.

    Args:
        model: Any; our own have fast paths without it.

    Returns:
        The number of modules that take fast paths and did not before.
    """
    chosen = {module: kind for module in model.modules() if (kind := _fast_class(module)) is not type(module)}
    for module, kind in chosen.items():
        module.__class__ = kind
    return len(chosen)


class _InFront(nn.Module):
    """Base of what is put in front of a class, by `_put_in_front`."""

    front: type[nn.Module]
    """What is in front, a class of this file."""

    plain: type[nn.Module]
    """The class behind it, whose code is what a model's skipping was tried with (`stochastic_depth.standing`)."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.front, self.plain), self.__dict__


class FastLayerNorm(_InFront):
    """In front of a class of layer norm over (..., C): exact gradients in bfloat16."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class FastLayerNorm2d(_InFront):
    """In front of a class of layer norm over the channels of (B, C, H, W): exact gradients in bfloat16."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class FastLayerNormAct(FastLayerNorm):
    """In front of timm's layer norm with an activation behind it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(FastLayerNorm.forward(self, x)))


class FastLayerNormAct2d(FastLayerNorm2d):
    """In front of timm's layer norm of images with an activation behind it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(FastLayerNorm2d.forward(self, x)))


class FastMlp(TimmMlp):
    """timm's MLP, which keeps its activation's input only; with dropout or a norm inside its linear layers alone are fast."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.is_fast(x):
            return self.forward_fast(x)
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))

    @torch.jit.unused
    def is_fast(self, x: Tensor) -> bool:
        """Whether `forward_fast` may take x, (..., C)."""
        return (
            takes(x, self.act, self.drop1, self.norm, self.drop2)
            and type(self.norm) is nn.Identity
            and _drops_nothing(self.drop1)
            and _drops_nothing(self.drop2)
            and is_fast_mlp(x, self.fc1, _torchs(self.act), self.fc2)
        )

    @torch.jit.unused
    def forward_fast(self, x: Tensor) -> Tensor:
        """The MLP on (..., C), with `is_fast(x)`."""
        return fast_mlp(x, self.fc1, _torchs(self.act), self.fc2)


class FastWindowAttention(WindowAttention):
    """timm's attention within windows, of Swin."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.forward_fast(x, mask) if self.is_fast(x, mask) else super().forward(x, mask)

    def is_fast(self, x: Tensor, mask: Tensor | None = None) -> bool:
        """Whether `forward_fast` may take x, (windows, N, C), with a mask (windows of an image, N, N)."""
        return (
            x.device.type == "cpu"
            and takes(x, self.softmax, self.attn_drop)
            and _drops_nothing(self.attn_drop)
            and x.shape[0] > 0
            and x.shape[1] == self.window_area
            and (mask is None or (mask.shape[1:] == (x.shape[1],) * 2 and x.shape[0] % mask.shape[0] == 0))
            and has_few_tokens(x.shape[1], dtype_of(x))
        )

    def forward_fast(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The attention on (windows, N, C), with `is_fast`; mask: added to the scores, (windows of an image, N, N)."""
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = bias + mask[:, None]
        y = window_attention(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)), bias)
        return self.proj_drop(self.proj(y.flatten(2)))


class FastAttention(_InFront):
    """In front of a class of attention: its scaled dot products are computed by a kernel, or over few tokens apart."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        # without a backward pass the kernel alone gains, and of little less than looking for its place costs
        is_small = not torch.is_grad_enabled() and (not isinstance(x, Tensor) or x.numel() < fast_cpu.FEWEST)
        if is_small or not takes(x) or x.device.type != "cpu":  # type: ignore[union-attr]
            return super().forward(*args, **kwargs)
        with _Apart():
            return super().forward(*args, **kwargs)


class FastConvNeXtBlock(_InFront):
    """In front of timm's block of ConvNeXt: its layer scale is put into the weights of the MLP's last layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        # the MLP is not called, so it must do no more than its class says
        if not (takes(x, self.mlp) and self.mlp.is_fast(x) and are_plain(self.gamma)):
            return super().forward(x)  # type: ignore[misc]
        y, mlp = self.norm(self.conv_dw(x).permute(0, 2, 3, 1)), self.mlp
        y = fast_mlp(y, mlp.fc1, _torchs(mlp.act), mlp.fc2, self.gamma).permute(0, 3, 1, 2)
        shortcut = self.shortcut(x)
        dtype = torch.promote_types(y.dtype, self.gamma.dtype)
        if shortcut.dtype != dtype:  # timm's product with the layer scale, and so the sum, is in that
            y = y.to(dtype)
        return self.drop_path(y) + shortcut


class _Apart(TorchFunctionMode):
    """Inside it torch's scaled dot-product attention goes the fast way where that may be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and all(map(_is_off, kwargs.values())):
            q, k, v = args
            if (
                q.ndim == 4
                and q.numel()
                and q.shape == k.shape == v.shape
                and dtype_of(q) == q.dtype == k.dtype == v.dtype
                and takes(q)
                and takes_attention(q, k, v)
            ):
                return attention_of(q, k, v)
        return func(*args, **kwargs)


def _fast_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module should have."""
    kind = type(module)
    if "forward" in module.__dict__:
        return kind
    if kind is nn.Linear:
        return FastLinear
    is_norm = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    if is_norm and kind.forward in _NORMS and not getattr(module, "_fast_norm", False):
        return _put_in_front(_NORMS[kind.forward], kind)
    if is_depthwise(module):
        return FastDepthwiseConv2d
    if is_dense(module):
        return FastConv2d
    if kind is TimmMlp and is_linear(module.fc1, module.fc2):  # type: ignore[arg-type]
        return FastMlp
    if kind is WindowAttention:
        return FastWindowAttention
    if kind is ConvNeXtBlock and not module.use_conv_mlp and module.gamma is not None and _is_mlp(module.mlp):
        return _put_in_front(FastConvNeXtBlock, kind)
    # so timm calls it where a module computes scaled dot products by torch's function
    if getattr(module, "fused_attn", False) is True and not issubclass(kind, FastAttention):
        return _put_in_front(FastAttention, kind)
    return kind


@functools.cache
def _put_in_front(front: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """A class with another in front of it, by the same name."""
    same = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (front, plain), {**same, "front": front, "plain": plain})


def _blank(front: type[nn.Module], plain: type[nn.Module]) -> nn.Module:
    """A module without content, of the class for both."""
    kind = _put_in_front(front, plain)
    return kind.__new__(kind)


def _is_mlp(module: Any) -> bool:
    """Whether a module is or becomes a `FastMlp`."""
    return type(module) is FastMlp or (type(module) is TimmMlp and _fast_class(module) is FastMlp)


def _drops_nothing(module: nn.Module) -> bool:
    """Whether a module is torch's dropout, at rest."""
    return type(module) is nn.Dropout and not (module.training and module.p)


def _is_off(value: Any) -> bool:
    """Whether an argument of attention asks for nothing: no mask, no dropout, no other scale."""
    return value is None or (isinstance(value, (bool, int, float)) and not value)


def _torchs(act: nn.Module) -> nn.Module:
    """torch's activation in the place of timm's own that is the same."""
    return _GELU if type(act) is TimmGELU else act


_GELU = nn.GELU()
_NORMS: dict[Any, type[nn.Module]] = {
    nn.LayerNorm.forward: FastLayerNorm,
    TimmLayerNorm.forward: FastLayerNorm,
    TimmLayerNorm2d.forward: FastLayerNorm2d,
    LayerNormAct.forward: FastLayerNormAct,
    LayerNormAct2d.forward: FastLayerNormAct2d,
    LayerNorm2d.forward: FastLayerNorm2d,
}
"""What goes in front of layer norms, by their way of computing, which classes derived from them share."""
