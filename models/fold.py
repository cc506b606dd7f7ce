"""The inference form: scales and norms folded into the layers beside them, at equal outputs."""

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.errors import ConfigError
from files.strict_yaml import validate
from layers.mlp import Mlp, SquaredReLU, StarReLU
from layers.norm import Affine, GroupNorm1, LayerNorm
from layers.scale import Scale
from models.config import MetaFormerConfig
from models.factory import set_class_names, trained_class_names
from models.metaformer import MetaFormer, MetaFormerBlock
from models.weights import load_weights


class Standardize(nn.Module):
    """A norm of (B, ..., C) without weight and bias.

    Args:
        first_dim: Statistics over this dimension and those behind it: 1 for a group norm, -1 for a layer norm.
        eps: Added to the variance.
    """

    def __init__(self, first_dim: int, eps: float) -> None:
        super().__init__()
        self.first_dim = first_dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.first_dim == 1:  # as layers.norm.GroupNorm1 does it
            return torch.group_norm(x.movedim(x.ndim - 1, 1), 1, eps=self.eps).movedim(1, x.ndim - 1)
        return F.layer_norm(x, x.shape[self.first_dim :], eps=self.eps)


def fold_scales(model: MetaFormer) -> MetaFormer:
    """A copy for inference that computes the same with fewer operations.

    In every block, LayerScale goes into the branch's last linear layer, or, behind a mixer that treats all channels
    alike, into the norm before it; the norm's weight and bias go into the branch's first linear layer; StarReLU's scale
    and bias go into the MLP's second. What stays: ResScale, because it acts on the shortcut; StarReLU before a
    depthwise convolution, whose zero padding does not see the bias; a norm in front of pooling and of other mixers
    that do not begin with a linear layer over channels. Which layers change depends on the config only.

    Args:
        model: Is not changed.

    Returns:
        A model in evaluation mode without gradients; its state dict has other keys.
    """
    folded = deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for block in folded.modules():
            if isinstance(block, MetaFormerBlock):
                block.layer_scale1 = _fold_layer_scale(block.layer_scale1, block.token_mixer, block.norm1)
                block.layer_scale2 = _fold_layer_scale(block.layer_scale2, block.mlp, block.norm2)
                block.norm1 = _fold_norm(block.norm1, block.token_mixer)
                block.norm2 = _fold_norm(block.norm2, block.mlp)
                if isinstance(block.mlp, Mlp) and isinstance(block.mlp.act, StarReLU):
                    act = block.mlp.act
                    width = block.mlp.fc2.in_features
                    _scale_inputs(block.mlp.fc2, act.scale.expand(width), act.bias.expand(width))
                    block.mlp.act = SquaredReLU()
    return folded.requires_grad_(False)


def _fold_layer_scale(scale: nn.Module, branch: nn.Module, norm: nn.Module) -> nn.Module:
    """Folds the scale behind a branch into it; returns what is left of the scale."""
    if not isinstance(scale, Scale):
        return scale
    factor = scale.scale.double()
    if name := getattr(branch, "last", ""):
        linear = branch.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _set(linear, linear.weight.double() * factor[:, None], None if linear.bias is None else linear.bias * factor)
        return nn.Identity()
    if getattr(branch, "per_channel", False) and isinstance(norm, (GroupNorm1, LayerNorm, Affine)):
        _set(norm, norm.weight.double() * factor, None if norm.bias is None else norm.bias * factor)
        return nn.Identity()
    return scale


def _fold_norm(norm: nn.Module, branch: nn.Module) -> nn.Module:
    """Folds a norm's weight and bias into the linear layer behind it; returns what is left of the norm."""
    name = getattr(branch, "first", "")
    if not name or not isinstance(norm, (GroupNorm1, LayerNorm, Affine)):
        return norm
    linear = branch.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    _scale_inputs(linear, norm.weight, norm.bias)
    if isinstance(norm, Affine):
        return nn.Identity()
    return Standardize(-1 if isinstance(norm, LayerNorm) else 1, norm.eps)


def _scale_inputs(linear: nn.Linear, scale: Tensor, shift: Tensor | None) -> None:
    """Makes a linear layer compute what it did of x * scale + shift."""
    weight, bias = linear.weight.double(), linear.bias
    if shift is not None:
        moved = weight @ shift.double()
        bias = moved if bias is None else bias + moved
    _set(linear, weight * scale.double(), bias)


def _set(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces weight and bias, computed in float64, in the module's own dtype."""
    dtype = module.get_parameter("weight").dtype
    for name, value in (("weight", weight), ("bias", bias)):
        module.register_parameter(name, None if value is None else nn.Parameter(value.to(dtype), requires_grad=False))


def load_folded(folder: Path) -> MetaFormer:
    """The model in a folder of format `folded`.

    Raises:
        ConfigError: It is no such folder, or damaged.
    """
    state, saved = load_weights(folder)
    if not saved or saved.get("format") != "folded" or not isinstance(saved.get("model"), dict):
        raise ConfigError(f"{folder}: not a folded model; export.py --format folded writes them")
    with torch.device("meta"):
        model = fold_scales(MetaFormer(validate(MetaFormerConfig, saved["model"], source=f"{folder}: model")))
    own = model.state_dict()
    wrong = [
        key for key in {**own, **state} if key not in own or key not in state or own[key].shape != state[key].shape
    ]
    if wrong:
        raise ConfigError(f"{folder}: weights do not fit the config beside them: {wrong[0]}")
    model.load_state_dict(state, assign=True)
    if (names := trained_class_names(saved)) is not None:
        set_class_names(model, names)
    return model.requires_grad_(False)
