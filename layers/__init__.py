"""Building blocks of the zoo; they import torch only."""

from layers.drop_path import DropPath, drop_path
from layers.mlp import Mlp, MlpHead, SquaredReLU, StarReLU
from layers.norm import Affine, GroupNorm1, LayerNorm, build_norm
from layers.patch_embed import PatchEmbed, TokenEmbed
from layers.rates import drop_path_rates
from layers.scale import Scale
from layers.schedule import DropPathSchedule
from layers.token_mixers import Attention, DepthwiseConv, Identity, Pooling, RandomMixing, SepConv, SpatialMlp

# `drop_path` is the function; the file of that name is imported by its path, `from layers.drop_path import ...`.
__all__ = [
    "Affine",
    "Attention",
    "DepthwiseConv",
    "DropPath",
    "DropPathSchedule",
    "GroupNorm1",
    "Identity",
    "LayerNorm",
    "Mlp",
    "MlpHead",
    "PatchEmbed",
    "Pooling",
    "RandomMixing",
    "Scale",
    "SepConv",
    "SpatialMlp",
    "SquaredReLU",
    "StarReLU",
    "TokenEmbed",
    "build_norm",
    "drop_path",
    "drop_path_rates",
]
