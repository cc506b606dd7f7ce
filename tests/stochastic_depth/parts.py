"""What tests of this folder share: small models of ours, of timm and of torchvision, and blocks of nobody's."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from layers.drop_path import DropPath
from models import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.proof import randomise_scales

DEPTHS, DIMS = [1, 1, 2, 1], [16, 32, 48, 64]
LINEAR = [0.0, 0.1, 0.2, 0.3, 0.4]  # of 0.4 over the five blocks

# Multiply-accumulates of `PlainNet` for one image of 3 x 8 x 8, by hand.
STEM_MACS = 16 * 3 * 3 * 3 * 4  # 4 x 4 positions, kernel 3 x 3, 3 -> 4 channels

BRANCH_MACS = 16 * 4 * 4  # a linear layer over 4 channels at each position
HEAD_MACS = 4 * 5
NET_MACS = STEM_MACS + 4 * BRANCH_MACS + HEAD_MACS


class PlainBlock(nn.Module):
    """One linear branch; counts the samples that it dropped by looking at its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = DropPath(kind="mlp")
        self.seen = self.dropped = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path.residual(x, self.fc)
        if self.training and not torch.compiler.is_compiling():
            self.seen += len(x)
            self.dropped += int((out == x).flatten(1).all(dim=1).sum())
        return out


class PlainNet(nn.Module):
    """A strided convolution, two stages of two blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stages = nn.Sequential(*(nn.Sequential(PlainBlock(), PlainBlock()) for _ in range(2)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x).permute(0, 2, 3, 1))  # (B, 4, 4, C)
        return self.head(x.mean(dim=(1, 2)))


def poolformer(**settings: Any) -> nn.Module:
    return create_model("poolformer_s12", depths=DEPTHS, dims=DIMS, image_size=32, num_classes=5, **settings)


def drop_paths(model: nn.Module) -> list[DropPath]:
    return [m for m in model.modules() if isinstance(m, DropPath)]


def settings_of(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (m.drop_prob, m.multiplier, m.mode, m.break_even, m.samples_seen, m.samples_dropped) for m in drop_paths(model)
    ]


def rates_of(model: nn.Module) -> list[float]:
    """Of the blocks, whose two modules must agree."""
    pairs = [{m.drop_prob for m in block.drop_paths.values()} for block in find_blocks(model)]
    assert all(len(pair) == 1 for pair in pairs)
    return [pair.pop() for pair in pairs]


SIZE = (3, 64, 64)

# name, settings that make it small, and the roles that its drop-path modules find
SMALL: dict[str, tuple[dict[str, object], set[str]]] = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48}, {"branch"}),
    "deit3_small_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48}, {"branch"}),
    "beit_base_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}, {"branch"}),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 3}, {"branch"}),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}, {"branch"}),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
        {"branch"},
    ),
    "tiny_vit_5m_224": ({"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}, {"branch"}),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}, {"branch"}),
    "resnest14d": ({"layers": (1, 1, 1, 1)}, {"branch"}),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, {"branch"}),
    "caformer_s18": ({}, {"branch"}),
    "poolformer_s12": ({}, {"branch"}),
    "mixer_s16_224": ({"img_size": 64}, {"branch"}),
    "resnet18": ({"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}, {"branch"}),
}  # fmt: skip

METAFORMER: dict = {"depths": (1, 1, 2, 1), "dims": (32, 32, 64, 64)}

SMALL_CLASSES: dict[str, tuple[type, dict]] = {
    "caformer_s18": (timm.models.metaformer.MetaFormer, METAFORMER),
    "poolformer_s12": (timm.models.metaformer.MetaFormer, METAFORMER),
    "mixer_s16_224": (timm.models.mlp_mixer.MlpMixer, {"num_blocks": 3, "embed_dim": 48}),
}


def smaller(
    self: nn.Module, original: Callable[..., None], sizes: dict[str, object], *args: object, **kwargs: object
) -> None:
    original(self, *args, **{**kwargs, **sizes})


def build(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if name in SMALL_CLASSES:  # timm's functions fix these sizes
            cls, sizes = SMALL_CLASSES[name]
            patch.setattr(cls, "__init__", partialmethod(smaller, cls.__init__, sizes))
        model = timm.create_model(name, num_classes=5, **SMALL[name][0], **more)
    randomise_scales(model)
    return model


def size_of(name: str) -> tuple[int, int, int]:
    size = SMALL[name][0].get("img_size", 64)
    assert isinstance(size, int)
    return 3, size, size


def output_and_gradients(model: nn.Module, images: Tensor, seed: int) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(images)
    out.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach(), *gradients]


def quiet_norms(model: nn.Module) -> nn.Module:
    """Batch norms in eval: the statistics of a smaller batch are another thing than which samples are computed."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    more = {"image_size": 64} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, num_classes=5, **more)
    randomise_scales(model)
    return model


# name: how to build it, and a module inside the branch that each kind of drop-path module ends
COMPUTED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=5), {"drop_path": "conv2"}),
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), {"drop_path_bn2": "conv1"}),
    "timm vit": (lambda: build("vit_tiny_patch16_224"), {"drop_path1": "attn.proj", "drop_path2": "mlp.fc1"}),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5),
        {"drop_path_mlp": "mlp.0"},
    ),
    "timm convnext": (lambda: build("convnext_atto"), {"drop_path": "conv_dw"}),
    "torchvision convnext": (
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=5),
        {"stochastic_depth": "block.0"},
    ),
    "ours": (lambda: create_model("caformer_n4", num_classes=5), {"drop_path2": "mlp.fc1"}),
}


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.flatten(1)[:, :8])


class Residual(nn.Module):
    """x + drop_path(mlp(x)) with somebody's module, under somebody's name."""

    def __init__(self, drop: nn.Module | None, attribute: str = "drop_path") -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.attribute = attribute
        setattr(self, attribute, drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.attribute)(self.mlp(x))


class Net(nn.Module):
    """Blocks on (B, 8)."""

    size = (3, 8, 8)

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 8, 8), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).flatten(2))
        for block in self.blocks:
            x = block(x)
        return x

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, L) -> what blocks work on."""
        return x.mean(2)


def copied_drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """The function that transformers and others carry along."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    random_tensor = keep_prob + torch.rand((x.shape[0], *(1,) * (x.ndim - 1)), dtype=x.dtype, device=x.device)
    return x.div(keep_prob) * random_tensor.floor_()


def traces(model: nn.Module) -> list[object]:
    """All that an unfinished conversion could leave: modules, hooks, attributes, settings."""
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs)]
        settings = (
            (module.drop_prob, module.rate, module.mode, module.samples_seen) if isinstance(module, DropPath) else ()
        )
        found.append((name, id(module), module.training, sorted(vars(module)), list(module._modules), hooks, settings))
    return found
