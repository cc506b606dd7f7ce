"""MetaFormer: four stages of blocks whose token mixer, norm, MLP and scales come from a MetaFormerConfig.

PoolFormer (arXiv 2111.11418) and MetaFormer Baselines (arXiv 2210.13452: PoolFormerV2, IdentityFormer, RandFormer,
ConvFormer, CAFormer). Two layouts are equivalent: NCHW with 1x1 convolutions, as in PoolFormer's code, and NHWC with
linear layers. Inside a stage we use NHWC: linear layers and layer norms run on contiguous channels, and it was the
faster one. Images enter and features leave as (B, C, H, W).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.drop_path import DropPath, Mode
from layers.mlp import Mlp, MlpHead
from layers.norm import build_norm
from layers.patch_embed import PatchEmbed
from layers.rates import drop_path_rates
from layers.scale import build_scale
from layers.token_mixers import Attention, Identity, Pooling, RandomMixing, SepConv
from models.config import MetaFormerConfig


class MetaFormerBlock(nn.Module):
    """Token mixer and channel MLP, each normalised before and added to its shortcut by stochastic depth.

    Args:
        dim: Channels C of the activations (B, H, W, C).
        token_mixer: Exchanges between positions.
        mlp: Works on channels.
        norm: Name of both norms (`layers.norm.NORMS`).
        layer_scale: Initial value of a learned scale on the branches, or `None` for no scale.
        res_scale: Initial value of a learned scale on the shortcuts, or `None` for no scale.
        drop_path: Drop rate of both branches, in [0, 1].
        drop_path_mode: `mask`, `skip` or `batch`.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm: str = "layer_norm_no_bias",
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        drop_path_mode: Mode = "mask",
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm, dim)
        self.token_mixer = token_mixer
        self.layer_scale1 = build_scale(dim, layer_scale)
        self.res_scale1 = build_scale(dim, res_scale)
        self.drop_path1 = DropPath(drop_path, mode=drop_path_mode, kind=_kind(token_mixer))

        self.norm2 = build_norm(norm, dim)
        self.mlp = mlp
        self.layer_scale2 = build_scale(dim, layer_scale)
        self.res_scale2 = build_scale(dim, res_scale)
        self.drop_path2 = DropPath(drop_path, mode=drop_path_mode, kind=_kind(mlp))

    def branch1(self, x: Tensor) -> Tensor:
        """What is added to the first shortcut."""
        return self.layer_scale1(self.token_mixer(self.norm1(x)))

    def branch2(self, x: Tensor) -> Tensor:
        """What is added to the second shortcut."""
        return self.layer_scale2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path1.residual(x, self.branch1, self.res_scale1(x))
        x = self.drop_path2.residual(x, self.branch2, self.res_scale2(x))
        return x


class Stage(nn.Module):
    """Optional downsampling, then blocks of one width, (B, H, W, C) -> (B, H', W', dim)."""

    def __init__(self, downsample: nn.Module, blocks: list[MetaFormerBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Head(nn.Module):
    """Norm, average over positions and classifier, (B, H, W, C) -> (B, num_classes); unpooled (B, C, H, W).

    Args:
        config: The model's config.
    """

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dims[-1]
        self.norm_first = config.head.order == "norm_pool"
        self.global_pool = "avg"
        self.norm = build_norm(config.head.norm, self.dim, config.head.norm_eps)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset(config.num_classes)

    def reset(self, num_classes: int) -> None:
        """Puts a new, freshly initialised classifier in place; 0 classes: none."""
        if num_classes == 0:
            self.fc: nn.Module = nn.Identity()
        elif self.config.head.kind == "mlp":
            self.fc = MlpHead(self.dim, num_classes, drop_rate=self.config.drop_rate)
            self.fc.norm.eps = self.config.head.mlp_norm_eps
        else:
            self.fc = nn.Linear(self.dim, num_classes)
        self.fc.apply(init_weights)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.norm_first:
            x = self.norm(x)
        if self.global_pool:
            x = x.mean(dim=(1, 2))  # (B, C)
        if not self.norm_first:
            x = self.norm(x)
        if not self.global_pool:
            return x.permute(0, 3, 1, 2)  # (B, C, H, W), as timm's unpooled features
        if isinstance(self.fc, MlpHead):  # has its own dropout, before its last layer
            return self.fc(x, pre_logits=pre_logits)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class MetaFormer(nn.Module):
    """An image classifier of MetaFormer blocks, with timm's model interface.

    Args:
        config: What to build.
        drop_path_rate: Rate of the last block, rising linearly from 0 at the first.
        drop_path_mode: `mask`, `skip` or `batch`.

    Raises:
        ValueError: A rate outside [0, 1] or an unknown mode.
    """

    def __init__(self, config: MetaFormerConfig, drop_path_rate: float = 0.0, drop_path_mode: Mode = "mask") -> None:
        super().__init__()
        self.config = config
        self.depths = tuple(config.depths)
        self.num_classes = config.num_classes
        self.num_features = config.dims[-1]
        self.head_hidden_size = self._head_hidden_size()
        self.pretrained_cfg = self.default_cfg = make_pretrained_cfg(config)
        self.feature_info: list[dict[str, Any]] = []

        self.stem = PatchEmbed(
            config.in_chans,
            config.dims[0],
            kernel_size=config.stem.kernel_size,
            stride=config.stem.stride,
            padding=config.stem.padding,
            norm=build_norm(config.stem.norm, config.dims[0]),
        )
        rates = iter(drop_path_rates(drop_path_rate, config.depths))
        stages, reduction = [], config.stem.stride
        for index, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True)):
            previous = config.dims[max(index - 1, 0)]
            downsample: nn.Module = nn.Identity()
            if dim != previous:
                reduction *= config.downsample.stride
                downsample = PatchEmbed(
                    previous,
                    dim,
                    kernel_size=config.downsample.kernel_size,
                    stride=config.downsample.stride,
                    padding=config.downsample.padding,
                    norm=build_norm(config.downsample.norm, previous),
                    norm_first=True,
                )
            blocks = [build_block(config, index, next(rates), drop_path_mode) for _ in range(depth)]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.apply(init_weights)
        self.head = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> output of the last stage, not normalised, (B, C, H', W')."""
        x = self.stem(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        return self.stages(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, C, H', W') -> logits, or what the last linear layer sees."""
        return self.head(x.permute(0, 2, 3, 1), pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen stages, as in timm.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n stages, or a list of stages (negative ones count from the end); `None`: all.
            norm: Apply the head's norm to the last stage's output where the head normalises before pooling.
            stop_early: Do not compute the stages behind the last one asked for.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: Return the list alone.

        Returns:
            A list of (B, C, H, W) or (B, H, W, C), or (last features (B, C, H', W'), that list).

        Raises:
            ValueError: An index or format that does not exist.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take = self._stage_indices(indices)
        x = self.stem(x.permute(0, 2, 3, 1))
        outputs = []
        last = len(self.stages) - 1
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in take:
                out = self.head.norm(x) if norm and index == last and self.head.norm_first else x
                outputs.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
            if stop_early and index == max(take):
                break
        return outputs if intermediates_only else (x.permute(0, 3, 1, 2), outputs)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages behind the last one asked for, and the head; returns the stages' indices."""
        take = self._stage_indices(indices)
        if max(take) < len(self.stages) - 1:
            self.stages = self.stages[: max(take) + 1]
            self.num_features = self.head.dim = self.feature_info[max(take)]["num_chs"]
            self.head_hidden_size = self._head_hidden_size()
            prune_norm = prune_head = True
        if prune_norm:
            self.head.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _stage_indices(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices: the last n stages, n in 1 to {count}, got {indices}")
            return list(range(count - indices, count))
        taken = [i + count if i < 0 else i for i in indices]
        if not taken or any(not 0 <= i < count for i in taken):
            raise ValueError(f"indices must name stages 0 to {count - 1}, got {list(indices)}")
        return taken

    def get_classifier(self) -> nn.Module:
        """The module that maps pooled features to logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a freshly initialised one; everything else is kept.

        Args:
            num_classes: 0 removes it.
            global_pool: `avg`, `""` for no pooling (the model then returns (B, C, H', W')), or `None` to leave it.

        Raises:
            ValueError: Another pooling.
        """
        pool = self.head.global_pool if global_pool is None else global_pool
        if pool not in ("", "avg"):
            raise ValueError(f"global_pool must be 'avg' or '', got {pool!r}")
        if pool == "" and num_classes > 0:
            raise ValueError("a classifier needs pooled features: give global_pool='avg'")
        self.head.global_pool = pool
        device, dtype = self.stem.conv.weight.device, self.stem.conv.weight.dtype
        self.config = self.config.model_copy(update={"num_classes": num_classes})
        self.num_classes = num_classes
        self.head.config = self.config
        self.head.reset(num_classes)
        self.head.fc.to(device=device, dtype=dtype).train(self.head.training)
        self.pretrained_cfg["num_classes"] = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in backward instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head\.norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names exempt from weight decay beside the one-dimensional ones, which timm's factory exempts anyway."""
        return set()

    def _head_hidden_size(self) -> int:
        # the MLP head's hidden width is MlpHead's default ratio, 4
        return 4 * self.num_features if self.config.head.kind == "mlp" else self.num_features


def build_block(config: MetaFormerConfig, stage: int, drop_path: float, mode: Mode) -> MetaFormerBlock:
    """One block of a stage."""
    dim = config.dims[stage]
    return MetaFormerBlock(
        dim,
        build_token_mixer(config, stage),
        Mlp(dim, ratio=config.mlp_ratio, act=config.act, bias=config.mlp_bias),
        norm=config.per_stage(config.norm)[stage],
        layer_scale=config.per_stage(config.layer_scale)[stage],
        res_scale=config.per_stage(config.res_scale)[stage],
        drop_path=drop_path,
        drop_path_mode=mode,
    )


def build_token_mixer(config: MetaFormerConfig, stage: int) -> nn.Module:
    """The token mixer of one stage."""
    kind, dim = config.per_stage(config.token_mixer)[stage], config.dims[stage]
    if kind == "pooling":
        return Pooling(config.pool_size)
    if kind == "identity":
        return Identity()
    if kind == "random_mixing":
        height, width = config.feature_size(stage)
        return RandomMixing(height * width)
    if kind == "sep_conv":
        return SepConv(dim, config.conv_expansion, config.conv_kernel_size)
    assert kind == "attention"
    return Attention(dim, config.head_dim)


def make_pretrained_cfg(config: MetaFormerConfig) -> dict[str, Any]:
    """timm's description of a model's input and classifier."""
    mean, std = config.channel_stats()
    height, width = config.height_width
    return {
        "architecture": config.name,
        "tag": config.pretrained[0] if config.pretrained else "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, height, width),
        "fixed_input_size": "random_mixing" in config.per_stage(config.token_mixer),
        "pool_size": config.feature_size(len(config.depths) - 1),
        "crop_pct": config.crop_pct,
        "crop_mode": "center",
        "interpolation": config.interpolation,
        "mean": tuple(mean),
        "std": tuple(std),
        "first_conv": "stem.conv",
        "classifier": "head.fc.fc2" if config.head.kind == "mlp" else "head.fc",
    }


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear layers and convolutions, zero biases, as in PoolFormer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _kind(branch: nn.Module) -> str:
    return str(getattr(branch, "kind", ""))
