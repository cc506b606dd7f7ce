"""What tests of weights in other layouts share: models moved away from their initial values, and compared."""

import re
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from models.factory import create_model
from models.metaformer import MetaFormer
from models.registry import list_models

IN_TIMM = [n for family in ("poolformer_?[0-9]*", "poolformerv2", "convformer", "caformer")
           for n in list_models(f"{family}*") if not n.endswith("_n4")]  # fmt: skip

ISOTROPIC = [n for n in list_models() if timm.is_model(n) and n not in IN_TIMM]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every vector away from its initial value: at a layer scale of 1e-5 nearly any error would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == parameter.shape[-1] or name.endswith(("_token", "pos_embed")):
                bias = name.endswith(("bias", "beta", "_token", "pos_embed"))
                values = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(values - 0.5 if bias else values + 0.5)
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference by the largest value, of finite and varied tensors."""
    assert ours.shape == theirs.shape and ours.isfinite().all() and theirs.isfinite().all() and theirs.std() > 1e-3
    return float((ours - theirs).abs().max() / theirs.abs().max())


def in_original_layout(model: MetaFormer) -> dict[str, Tensor]:
    """Our state dict under the names and shapes of the repository that published the model."""
    out = {}
    v1 = model.config.name.startswith("poolformer_")
    for key, value in model.state_dict().items():
        key = re.sub(r"^head\.norm\.", "norm.", key)
        key = re.sub(r"^head\.fc\.", "head.", key)
        if v1:
            key = key.replace("stem.conv.", "patch_embed.proj.")
            key = re.sub(r"^stages\.(\d)\.downsample\.conv\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj.", key)
            key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}.", key)
            key = re.sub(r"layer_scale(\d)\.scale$", r"layer_scale_\1", key)
            value = value[:, :, None, None] if re.search(r"mlp\.fc\d\.weight$", key) else value
        else:
            key = key.replace("stem.conv.", "downsample_layers.0.conv.").replace(
                "stem.norm.", "downsample_layers.0.post_norm."
            )
            key = re.sub(r"^stages\.(\d)\.downsample\.conv\.", r"downsample_layers.\1.conv.", key)
            key = re.sub(r"^stages\.(\d)\.downsample\.norm\.", r"downsample_layers.\1.pre_norm.", key)
            key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        out[key] = value
    return out


# every mixer, norm and scale; blocks are few, because those of a stage are alike
SHORT = {"depths": [1, 1, 1, 1], "image_size": 64}


def built(name: str, **overrides) -> MetaFormer:
    """A model whose vectors are all away from their initial values: at those, most folding is invisible."""
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.numel() == parameter.shape[-1]:
                parameter.copy_(torch.rand_like(parameter) + (-0.5 if key.endswith("bias") else 0.5))
    return model.eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


KINDS = {
    "poolformer_s12": SHORT,  # LayerScale behind pooling, group norms with bias
    "poolformerv2_s12": SHORT,  # ResScale, group norms without
    "identityformer_s12": SHORT,
    "randformer_s12": SHORT,
    "caformer_s18": SHORT,  # separable convolutions, attention, StarReLU
    "deit3_small_patch16_224": {"depths": [2]},  # LayerScale behind attention with bias
    "mixer_s16_224": {"depths": [2]},
    "resmlp_12_224": {"depths": [2]},  # affine instead of norms
}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def make(folder: Path, mark: str) -> Path:
    folder.mkdir()
    (folder / "mark").write_text(mark)
    return folder
