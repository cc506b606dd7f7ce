"""MetaFormer: stages of blocks whose token mixer, norm, MLP and scales come from a MetaFormerConfig.

PoolFormer (arXiv 2111.11418) and MetaFormer Baselines (arXiv 2210.13452: PoolFormerV2, IdentityFormer, RandFormer,
ConvFormer, CAFormer) have four stages. Models of one stage are isotropic: ViT (arXiv 2010.11929), DeiT (arXiv
2012.12877, 2204.07118), MLP-Mixer (arXiv 2105.01601) and ResMLP (arXiv 2105.03404).

Two layouts are equivalent: NCHW with 1x1 convolutions, as in PoolFormer's code, and NHWC with linear layers. Inside a
stage we use NHWC: linear layers and layer norms run on contiguous channels, and it was the faster one. Images enter and
features leave as (B, C, H, W). Class and register tokens belong to the model, never to its blocks: behind them
activations and features are (B, N, C), which attention and the MLP take as they are.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.drop_path import DropPath, Mode
from layers.mlp import Mlp, MlpHead
from layers.norm import build_norm
from layers.patch_embed import PatchEmbed, TokenEmbed
from layers.rates import drop_path_rates
from layers.scale import build_scale, scaled_branch
from layers.token_mixers import TOKEN_MIXERS, TokenMixer
from models.config import MetaFormerConfig, make_pretrained_cfg


class MetaFormerBlock(nn.Module):
    """Token mixer and channel MLP, each normalised before and added to its shortcut by stochastic depth.

    Args:
        dim: Channels C of the activations (B, ..., C).
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
        if torch.jit.is_scripting():
            return self.layer_scale1(self.token_mixer(self.norm1(x)))
        else:
            return scaled_branch(self.norm1, self.token_mixer, self.layer_scale1, x)

    def branch2(self, x: Tensor) -> Tensor:
        """What is added to the second shortcut."""
        if torch.jit.is_scripting():
            return self.layer_scale2(self.mlp(self.norm2(x)))
        else:
            return scaled_branch(self.norm2, self.mlp, self.layer_scale2, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path1.residual(x, self.branch1, self.res_scale1(x))
        x = self.drop_path2.residual(x, self.branch2, self.res_scale2(x))
        return x

    def forward_scripted(self, x: Tensor) -> Tensor:
        """`forward` for TorchScript, which cannot hand a branch to `residual`; in training it raises."""
        x = self.res_scale1(x) + self.drop_path1(self.branch1(x)).to(x.dtype)
        x = self.res_scale2(x) + self.drop_path2(self.branch2(x)).to(x.dtype)
        return x


torch.jit.unused(MetaFormerBlock.forward)  # not compiled: `Stage` calls `forward_scripted` instead


class Stage(nn.Module):
    """Optional downsampling, then blocks of one width, (B, C, H, W) -> (B, dim, H', W').

    What enters and leaves is a view in channels-first order of channels-last memory, so that whoever takes features from
    here, by hooks or by graphs, gets what forward_features gives; inside, all is (B, H, W, C).

    Args:
        downsample: (B, H, W, C) -> (B, H', W', dim).
        blocks: Their activations are (B, H', W', dim), or token sequences (B, N, dim).
        tokens: Whether the stage maps token sequences (B, N, dim), which are never permuted.
    """

    def __init__(self, downsample: nn.Module, blocks: list[MetaFormerBlock], *, tokens: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.tokens = tokens
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(_channels_last(x, self.tokens))
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block.forward_scripted(x)  # type: ignore[operator]
        else:
            for block in self.blocks:
                x = self.step(block, x)
        return _channels_first(x, self.tokens)

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block, whose activations are recomputed in backward where that is set."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class Head(nn.Module):
    """Norm, pooling and classifier, (B, H, W, C) -> (B, num_classes), unpooled (B, C, H, W).

    Behind class and register tokens (B, N, C) -> (B, num_classes), unpooled (B, N, C).

    Args:
        config: The model's config.
    """

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dims[-1]
        self.num_prefix_tokens = config.num_prefix_tokens
        self.norm_first = config.head.order == "norm_pool"
        self.global_pool = config.head.pool
        self.norm = build_norm(config.head.norm, self.dim, config.head.norm_eps)
        # the MLP head has its own dropout, before its last layer
        self.drop = nn.Identity() if config.head.kind == "mlp" else nn.Dropout(config.drop_rate)
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
        if self.global_pool == "token":
            x = x[:, 0]  # (B, C)
        elif self.global_pool:
            x = x[:, self.num_prefix_tokens :].mean(1) if self.num_prefix_tokens > 0 else x.mean((1, 2))  # (B, C)
        if not self.norm_first:
            x = self.norm(x)
        if not self.global_pool:
            return _channels_first(x, self.num_prefix_tokens > 0)  # as timm's unpooled features
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
        self.isotropic = len(config.depths) == 1
        self.num_prefix_tokens = config.num_prefix_tokens
        self.num_classes = config.num_classes
        self.num_features = config.dims[-1]
        self.pretrained_cfg = self.default_cfg = make_pretrained_cfg(config)

        self.stem = PatchEmbed(
            config.in_chans,
            config.dims[0],
            kernel_size=config.stem.kernel_size,
            stride=config.stem.stride,
            padding=config.stem.padding,
            norm=build_norm(config.stem.norm, config.dims[0]),
        )
        self.embed: nn.Module = nn.Identity()
        if config.pos_embed != "none" or config.num_prefix_tokens:
            self.embed = TokenEmbed(
                config.dims[0],
                *config.feature_size(0),
                class_token=config.class_token,
                register_tokens=config.register_tokens,
                pos_embed=config.pos_embed,
            )
        rates = iter(drop_path_rates(drop_path_rate, config.depths))
        stages, levels, reduction = [], [], config.stem.stride
        for index, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True)):
            previous = config.dims[max(index - 1, 0)]
            downsample: nn.Module = nn.Identity()
            if dim != previous:
                assert config.downsample is not None
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
            stages.append(Stage(downsample, blocks, tokens=self.num_prefix_tokens > 0))
            names = [f"stages.{index}.blocks.{i}" for i in range(depth)] if self.isotropic else [f"stages.{index}"]
            levels += [{"num_chs": dim, "reduction": reduction, "module": name} for name in names]
        self.stages = nn.Sequential(*stages)
        self.feature_info = levels
        self.apply(init_weights)
        self.head = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> output of the last stage, not normalised: (B, C, H', W').

        Of a model with class or register tokens: (B, N, C), those tokens first.
        """
        x = self.embed(self.stem(x.permute(0, 2, 3, 1)))  # (B, H, W, C) or (B, N, C)
        return self.stages(_channels_first(x, self.num_prefix_tokens > 0))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features as `forward_features` gives them -> logits, or with `pre_logits` what the classifier sees."""
        return self.head(_channels_last(x, self.num_prefix_tokens > 0), pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Outputs of chosen levels, as in timm: of stages, or of blocks in a model with one stage.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n levels, or a list of levels (negative ones count from the end); `None`: all.
            norm: Apply the head's norm, where it comes before pooling, to what has its width: the last stage's output,
                or that of every block in a model with one stage.
            stop_early: Do not compute the levels behind the last one asked for.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: Return the list alone.
            return_prefix_tokens: Make each entry of the list a pair with its class and register tokens (B, N, C).

        Returns:
            A list of (B, C, H, W) or (B, H, W, C), without class and register tokens, or (last features as
            `forward_features` gives them, that list).

        Raises:
            ValueError: An index or format that does not exist, or tokens that the model has not.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        if return_prefix_tokens and not self.num_prefix_tokens:
            raise ValueError("return_prefix_tokens: this model has no class or register tokens")
        take = self._level_indices(indices)
        tokens = self.num_prefix_tokens > 0
        grid = self.stem(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        x = self.embed(grid)
        outputs = []
        levels = self._levels()
        for index, level in enumerate(levels):
            x = level(x)
            if index in take:
                normed = norm and self.head.norm_first and (self.isotropic or index == len(levels) - 1)
                out = self.head.norm(x) if normed else x
                prefix = out[:, : self.num_prefix_tokens]
                if tokens:
                    out = out[:, self.num_prefix_tokens :].reshape(grid.shape)
                out = _channels_first(out, False) if output_fmt == "NCHW" else out
                outputs.append((out, prefix) if return_prefix_tokens else out)
            if stop_early and index == max(take):
                break
        return outputs if intermediates_only else (_channels_first(x, tokens), outputs)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the levels behind the last one asked for, and the head; returns the levels' indices."""
        take = self._level_indices(indices)
        if max(take) < len(self._levels()) - 1:
            if self.isotropic:
                stage = self._stage(0)
                stage.blocks = stage.blocks[: max(take) + 1]
            else:
                self.stages = self.stages[: max(take) + 1]
            self.num_features = self.head.dim = self.feature_info[max(take)]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self.head.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _stage(self, index: int) -> Stage:
        stage = self.stages[index]
        assert isinstance(stage, Stage)
        return stage

    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """What gives the features, (B, H, W, C) or (B, N, C): the stages, or the blocks of a model with one stage."""
        if not self.isotropic:
            return [partial(_run_channels_last, stage, self.num_prefix_tokens > 0) for stage in self.stages]
        stage = self._stage(0)
        return [partial(stage.step, block) for block in stage.blocks]

    def _level_indices(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        count, level = len(self._levels()), "blocks" if self.isotropic else "stages"
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices: the last n {level}, n in 1 to {count}, got {indices}")
            return list(range(count - indices, count))
        taken = [i + count if i < 0 else i for i in indices]
        if not taken or any(not 0 <= i < count for i in taken):
            raise ValueError(f"indices must name {level} 0 to {count - 1}, got {list(indices)}")
        return taken

    @property
    def head_hidden_size(self) -> int:
        """Width of what `forward_head(pre_logits=True)` returns; as in timm, in front of an MLP head too."""
        return self.num_features

    def get_classifier(self) -> nn.Module:
        """The module that maps pooled features to logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a freshly initialised one; everything else is kept.

        Args:
            num_classes: 0 removes it.
            global_pool: `avg`, `token` (the class token), `""` for no pooling (the model then returns normalised
                features), or `None` to leave it.

        Raises:
            ValueError: A wrong number or another pooling; the model is unchanged.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer of at least 0, got {num_classes!r}")
        pool = self.head.global_pool if global_pool is None else global_pool
        allowed = ("avg", "token", "") if self.config.class_token else ("avg", "")
        if pool not in allowed:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, allowed))}, got {pool!r}")
        if pool == "" and num_classes > 0:
            raise ValueError(f"a classifier needs pooled features: give global_pool={self.config.head.pool!r}")
        num_classes = int(num_classes)
        head = self.config.head.model_copy(update={"pool": pool} if pool else None)  # a config cannot say: none
        self.config = self.config.model_copy(update={"num_classes": num_classes, "head": head})
        self.num_classes = num_classes
        self.pretrained_cfg.pop("label_names", None)  # the new classifier's classes have no names yet
        self.head.global_pool = pool
        self.head.config = self.config
        self.head.reset(num_classes)
        device, dtype = self.stem.conv.weight.device, self.stem.conv.weight.dtype
        self.head.fc.to(device=device, dtype=dtype).train(self.head.training)
        self.pretrained_cfg["num_classes"] = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in backward instead of keeping its activations."""
        for index in range(len(self.stages)):
            self._stage(index).grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse or self.isotropic:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head\.norm", (99999,)),
            ]
        return {"stem": r"^stem|^embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names exempt from weight decay beside the one-dimensional ones, which timm's factory exempts anyway.

        Learned positions and tokens, as in timm.
        """
        return {f"embed.{name}" for name, _ in self.embed.named_parameters()}


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


def build_token_mixer(config: MetaFormerConfig, stage: int) -> TokenMixer:
    """The token mixer of one stage."""
    mixer = TOKEN_MIXERS[config.per_stage(config.token_mixer)[stage]]
    return mixer.build(config.dims[stage], config.feature_size(stage), config)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear layers and convolutions, zero biases, as in PoolFormer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _channels_first(x: Tensor, tokens: bool) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view; token sequences (B, N, C) as they are."""
    return x if tokens else x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor, tokens: bool) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view; token sequences (B, N, C) as they are."""
    return x if tokens else x.permute(0, 2, 3, 1)


def _run_channels_last(stage: nn.Module, tokens: bool, x: Tensor) -> Tensor:
    """A stage in its inner layout, (B, H, W, C) or (B, N, C)."""
    return _channels_last(stage(_channels_first(x, tokens)), tokens)


def _kind(branch: nn.Module) -> str:
    return str(getattr(branch, "kind", ""))
