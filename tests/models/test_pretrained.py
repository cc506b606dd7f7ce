"""models/pretrained.py: other layouts give equal logits, both ways; what is published loads, what does not fit is refused."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import CONFIGS
from files.errors import ConfigError
from models.factory import create_model
from models.layouts import from_original, from_timm, timm_head, to_timm
from models.loading import load_into
from models.metaformer import MetaFormer
from models.registry import list_models, model_config, published_config

IN_TIMM = [n for family in ("poolformer_?[0-9]*", "poolformerv2", "convformer", "caformer")
           for n in list_models(f"{family}*") if not n.endswith("_n4")]  # fmt: skip
ISOTROPIC = [n for n in list_models() if timm.is_model(n) and n not in IN_TIMM]
VITS = [n for n in ISOTROPIC if model_config(n).token_mixer == "attention"]
MLPS = [n for n in ISOTROPIC if n not in VITS]
# class token, LayerScale, registers and fc_norm, average pooling in the grid, class token with average pooling
FEW_VITS = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_wee_patch16_reg1_gap_256",
            "vit_medium_patch16_gap_240", "vit_small_patch14_reg4_dinov2"]  # fmt: skip
SMALL = ["poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18"]
BASIC = ["identityformer_s12", "randformer_s12"]


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


@torch.no_grad()
def deviations(name: str, sizes: list[tuple[int, int]], in_chans: int, num_classes: int) -> list[float]:
    """Relative differences of features and logits at each size between timm's model and ours with its weights."""
    theirs = randomised(timm.create_model(name, in_chans=in_chans, num_classes=num_classes))
    head = timm_head(model_config(name))
    ours = create_model(name, in_chans=in_chans, num_classes=num_classes, head=head).eval()
    load_into(ours, theirs.state_dict(), "timm", replace_classifier=False)
    out = []
    for height, width in sizes:
        x = torch.randn(1, in_chans, height, width, generator=torch.Generator().manual_seed(1))
        a, b = ours.forward_features(x), theirs.forward_features(x)  # type: ignore[operator]
        out += [relative(a, b), relative(ours.forward_head(a), theirs.forward_head(b))]  # type: ignore[operator]
        assert out[-1] == relative(ours(x), theirs(x))
    return out


# ---- timm -------------------------------------------------------------------------------------------------------------


def test_all_models_of_timm_are_compared():
    assert len(IN_TIMM) == len(set(IN_TIMM)) == 18
    assert set(IN_TIMM) == {n for n in timm.list_models(module="metaformer")}
    assert all(model_config(n).pretrained for n in IN_TIMM)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_logits_equal_timms(name, in_chans):
    assert max(deviations(name, [(64, 96)], in_chans, num_classes=7)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TIMM)
def test_logits_equal_timms_at_full_size(name):
    found = deviations(name, [(224, 224), (288, 288), (192, 256)], 3, num_classes=1000)
    found += [d for c in (1, 4) for d in deviations(name, [(224, 224)], c, num_classes=10)]
    print(f"{name}: {max(found):.1e}")
    assert max(found) < 1e-5


@pytest.mark.parametrize("name", ["poolformer_s12", "convformer_s18"])
def test_without_timms_head_logits_differ(name):
    theirs = randomised(timm.create_model(name, num_classes=7))
    ours = create_model(name, num_classes=7).eval()
    lines = load_into(ours, theirs.state_dict(), "timm", replace_classifier=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(ours.forward_features(x), theirs.forward_features(x)) < 1e-5  # type: ignore[operator]
        assert not torch.equal(ours(x), theirs(x)) and relative(ours(x), theirs(x)) > 1e-6
    assert any(f"head={timm_head(ours.config)}" in line for line in lines)
    again = create_model(name, num_classes=7, head=timm_head(ours.config)).eval()
    assert len(load_into(again, theirs.state_dict(), "timm", replace_classifier=False)) == 1
    assert timm_head(again.config) == {}


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in IN_TIMM if n not in SMALL)]
)
def test_back_conversion_is_bit_equal(name):
    config = model_config(name)
    theirs = randomised(timm.create_model(name, num_classes=3)).state_dict()
    back = to_timm(from_timm(theirs), config)
    assert list(back) == list(theirs)
    assert all(back[k].shape == v.shape and torch.equal(back[k], v) for k, v in theirs.items())
    with torch.device("meta"):
        ours = MetaFormer(config.model_copy(update={"num_classes": 3}))
    assert {k: v.shape for k, v in from_timm(theirs).items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert {k: v.shape for k, v in to_timm(ours.state_dict(), config).items()} == {
        k: v.shape for k, v in theirs.items()
    }


# ---- timm's ViT, MLP-Mixer and ResMLP ---------------------------------------------------------------------------------


@torch.no_grad()
def isotropic_deviation(
    name: str, size: tuple[int, int] | None = None, in_chans: int = 3, depth: int | None = None
) -> float:
    """Relative difference of features and logits between timm's model and ours, after both conversions were compared.

    Args:
        name: The model.
        size: Height and width of the images; default the model's.
        in_chans: Channels of the images.
        depth: Blocks; default the model's. timm's MLPs have no such setting.
    """
    config = model_config(name)
    height, width = size or config.height_width
    theirs_only: dict = {"depth": depth} if depth else {}
    theirs_only |= {"img_size": (height, width)} if size else {}
    theirs = randomised(timm.create_model(name, in_chans=in_chans, num_classes=7, **theirs_only))
    ours = create_model(
        name, in_chans=in_chans, num_classes=7, image_size=[height, width], depths=[depth] if depth else config.depths
    ).eval()
    published = theirs.state_dict()
    assert load_into(ours, published, "timm", replace_classifier=False) == ["weights from timm"]
    for state in (from_timm(published), ours.state_dict()):
        back = to_timm(state, ours.config)
        assert set(back) == set(published) and all(torch.equal(back[k], v) for k, v in published.items())
    assert list(to_timm(from_timm(published), ours.config)) == list(published)
    assert timm_head(ours.config) == {}

    x = torch.randn(2, in_chans, height, width, generator=torch.Generator().manual_seed(1))
    a = ours.forward_features(x)
    rows = a if a.ndim == 3 else a.flatten(2).transpose(1, 2)  # (B, N, C)
    normed = ours.head.norm(rows) if ours.head.norm_first else rows  # timm's features are normalised there
    return max(relative(normed, theirs.forward_features(x)), relative(ours(x), theirs(x)))  # type: ignore[operator]


@pytest.mark.parametrize("name", FEW_VITS)
def test_logits_equal_those_of_timms_vit(name):
    assert isotropic_deviation(name, size=None if "dinov2" not in name else (56, 56), depth=2) < 1e-5


def test_class_token_with_average_pooling_equals_timms():
    assert isotropic_deviation("eva_large_patch14_196", size=(56, 56), depth=1) < 1e-5


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224"])
def test_isotropic_models_at_other_sizes_and_channels(name, in_chans):
    assert isotropic_deviation(name, size=(96, 64), in_chans=in_chans) < 1e-5


@pytest.mark.parametrize("name", ["mixer_s16_224", "resmlp_12_224"])
def test_logits_equal_those_of_timms_mlps(name):
    assert isotropic_deviation(name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS)
def test_logits_equal_those_of_every_vit_of_timm(name):
    """Of full width at the published image size; two blocks, since all are alike."""
    found = isotropic_deviation(name, depth=2)
    print(f"{name}: {found:.1e}")
    assert found < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*MLPS, "vit_tiny_patch16_224", "deit3_medium_patch16_224", "vit_mediumd_patch16_reg4_gap_256",
             "vit_base_patch16_224", "vit_small_patch16_36x1_224"],
)  # fmt: skip
def test_logits_equal_those_of_whole_isotropic_models(name):
    found = isotropic_deviation(name)
    print(f"{name}: {found:.1e}")
    assert found < 1e-5


@pytest.mark.parametrize(
    "name", [*FEW_VITS, "vit_gigantic_patch14_224", "mixer_l16_224", "resmlp_big_24_224",
             *(pytest.param(n, marks=pytest.mark.slow) for n in ISOTROPIC)],
)  # fmt: skip
def test_isotropic_models_have_timms_parameters(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    expected = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in to_timm(ours.state_dict(), ours.config).items()} == expected
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    found: Any = theirs.pretrained_cfg
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "fixed_input_size"):
        assert ours.pretrained_cfg[key] == found[key], key


def test_distilled_weights_are_refused():
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=7)
    ours = create_model("deit_tiny_patch16_224", depths=[1], num_classes=7)
    with pytest.raises(
        ConfigError, match=r"embed.pos_embed has shape \[1, 198, 192\], expected \[1, 197, 192\] \(and 3"
    ):
        load_into(ours, theirs.state_dict(), "there", replace_classifier=False)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_positions_are_resampled_as_timm_does(name):
    theirs = randomised(timm.create_model(name, depth=1, num_classes=7))
    ours = create_model(name, depths=[1], num_classes=7, image_size=[96, 160]).eval()
    side = model_config(name).feature_size(0)[0]
    lines = load_into(ours, theirs.state_dict(), "there", replace_classifier=False)
    assert lines[1:] == [f"position embedding resampled from {side} x {side} to 6 x 10"]
    theirs.set_input_size((96, 160))  # type: ignore[operator]
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


def test_positions_that_are_no_square_are_refused():
    state = dict(create_model("deit_tiny_patch16_224", depths=[1], image_size=[96, 160]).state_dict())
    with pytest.raises(ConfigError, match=r"embed.pos_embed has shape \[1, 61, 192\], expected \[1, 197, 192\]"):
        load_into(create_model("deit_tiny_patch16_224", depths=[1]), state, "there", replace_classifier=False)


def test_a_spatial_mlp_of_another_image_size_is_refused():
    state = create_model("mixer_s32_224", depths=[1]).state_dict()
    ours = create_model("mixer_s32_224", depths=[1], image_size=256)
    with pytest.raises(ConfigError, match=r"(?s)token_mixer.fc1.weight has shape.*of one size: 256 is not that of the"):
        load_into(ours, state, "there", replace_classifier=False)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resmlp_12_224"])
def test_a_folder_of_timms_isotropic_model_is_a_checkpoint(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="models")
    theirs = randomised(timm.create_model(name, num_classes=5))
    folder = timm_folder(tmp_path / "theirs", theirs, name)
    ours = create_model(name, checkpoint=folder, num_classes=5).eval()
    assert caplog.messages == [f"weights from {folder}"]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
    with pytest.raises(ConfigError, match=f"weights of '{name}', another architecture than 'caformer_s18'"):
        create_model("caformer_s18", checkpoint=folder)


def test_pretrained_vit_without_a_classifier(published, caplog):
    caplog.set_level(logging.INFO, logger="models")
    theirs = randomised(timm.create_model("vit_small_patch16_224", num_classes=0))
    published(theirs)
    name = "vit_small_patch16_224.dino"
    ours = create_model(name, pretrained=True, num_classes=5).eval()
    assert published.asked == [name]
    assert caplog.messages == [f"weights from timm {name}", "no classifier in the weights: a new one of 5 classes"]
    assert ours.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)  # this tag's, not the model's default
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours.forward_head(ours.forward_features(x), pre_logits=True), theirs(x)) < 1e-5


# ---- the original repositories ----------------------------------------------------------------------------------------
# Their models as plain functions of a state dict in their layout, written from their definitions.


def original_poolformer(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """sail-sg/poolformer: models/poolformer.py; (B, C, H, W) throughout."""

    def weights(key: str) -> tuple[Tensor, Tensor]:
        return state[f"{key}.weight"], state[f"{key}.bias"]

    x = F.conv2d(x, *weights("patch_embed.proj"), stride=4, padding=2)
    for place in range(7):
        if place % 2:
            x = F.conv2d(x, *weights(f"network.{place}.proj"), stride=2, padding=1)
            continue
        for block in range(sum(re.fullmatch(rf"network\.{place}\.\d+\.norm1\.weight", k) is not None for k in state)):
            p = f"network.{place}.{block}"
            y = F.group_norm(x, 1, *weights(f"{p}.norm1"))
            y = F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False) - y
            x = x + state[f"{p}.layer_scale_1"][:, None, None] * y
            y = F.group_norm(x, 1, *weights(f"{p}.norm2"))
            y = F.conv2d(F.gelu(F.conv2d(y, *weights(f"{p}.mlp.fc1"))), *weights(f"{p}.mlp.fc2"))
            x = x + state[f"{p}.layer_scale_2"][:, None, None] * y
    x = F.group_norm(x, 1, *weights("norm")).mean(dim=(2, 3))
    return F.linear(x, *weights("head"))


def original_metaformer(state: dict[str, Tensor], x: Tensor, *, pooling: bool, norm_dims: tuple[int, ...]) -> Tensor:
    """sail-sg/metaformer: metaformer_baselines.py; (B, H, W, C) inside."""

    def norm(x: Tensor, key: str, dims: tuple[int, ...] = (-1,)) -> Tensor:
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(dims, keepdim=True) + 1e-6) * state[f"{key}.weight"]

    def star_relu(x: Tensor, key: str) -> Tensor:
        return state[f"{key}.scale"] * F.relu(x) ** 2 + state[f"{key}.bias"]

    def mix(x: Tensor, p: str) -> Tensor:
        batch, height, width, dim = x.shape
        if f"{p}.random_matrix" in state:
            flat = torch.einsum("mn,bnc->bmc", state[f"{p}.random_matrix"], x.reshape(batch, -1, dim))
            return flat.reshape(x.shape)
        if f"{p}.dwconv.weight" in state:
            x = star_relu(F.linear(x, state[f"{p}.pwconv1.weight"]), f"{p}.act1").permute(0, 3, 1, 2)
            x = F.conv2d(x, state[f"{p}.dwconv.weight"], padding=3, groups=x.shape[1])
            return F.linear(x.permute(0, 2, 3, 1), state[f"{p}.pwconv2.weight"])
        if f"{p}.qkv.weight" in state:
            qkv = F.linear(x, state[f"{p}.qkv.weight"]).reshape(batch, height * width, 3, dim // 32, 32)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(dim=-1) @ v
            return F.linear(y.transpose(1, 2).reshape(x.shape), state[f"{p}.proj.weight"])
        if pooling:
            y = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
            return y.permute(0, 2, 3, 1) - x
        return x

    for stage in range(4):
        p = f"downsample_layers.{stage}"
        x = x if stage == 0 else norm(x, f"{p}.pre_norm").permute(0, 3, 1, 2)
        stride, padding = (4, 2) if stage == 0 else (2, 1)
        x = F.conv2d(x, state[f"{p}.conv.weight"], state[f"{p}.conv.bias"], stride=stride, padding=padding)
        x = x.permute(0, 2, 3, 1)
        x = norm(x, f"{p}.post_norm") if stage == 0 else x
        for block in range(sum(re.fullmatch(rf"stages\.{stage}\.\d+\.norm1\.weight", k) is not None for k in state)):
            p = f"stages.{stage}.{block}"
            y = mix(norm(x, f"{p}.norm1", norm_dims), f"{p}.token_mixer")
            x = state.get(f"{p}.res_scale1.scale", torch.tensor(1.0)) * x + y
            y = star_relu(F.linear(norm(x, f"{p}.norm2", norm_dims), state[f"{p}.mlp.fc1.weight"]), f"{p}.mlp.act")
            x = state.get(f"{p}.res_scale2.scale", torch.tensor(1.0)) * x + F.linear(y, state[f"{p}.mlp.fc2.weight"])
    x = norm(x.mean(dim=(1, 2)), "norm") + state["norm.bias"]
    if "head.weight" in state:
        return F.linear(x, state["head.weight"], state["head.bias"])
    x = F.relu(F.linear(x, state["head.fc1.weight"], state["head.fc1.bias"])) ** 2
    x = F.layer_norm(x, x.shape[-1:], state["head.norm.weight"], state["head.norm.bias"], eps=1e-5)
    return F.linear(x, state["head.fc2.weight"], state["head.fc2.bias"])


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


@pytest.mark.parametrize("name", [*SMALL, *BASIC])
def test_published_layouts_load_and_follow_the_originals(name, tmp_path, caplog):
    shape = {"num_classes": 7, "image_size": 64, "depths": [1, 1, 3, 2]}
    made = randomised(create_model(name, **shape))
    assert isinstance(made, MetaFormer)
    published = in_original_layout(made)
    # the files' names: poolformer_s12.pth.tar, convformer_s18.pth
    repository, suffix = ("poolformer", ".pth.tar") if name == "poolformer_s12" else ("metaformer", ".pth")
    file = tmp_path / f"{name}{suffix}"
    torch.save({"state_dict": published} if suffix == ".pth" else published, file)
    caplog.set_level(logging.INFO)
    ours = create_model(name, checkpoint=file, **shape).eval()
    assert caplog.messages == [f"weights from {file}, in the layout of sail-sg/{repository}"]
    x = torch.randn(2, 3, 64, 64)
    if name == "poolformer_s12":
        expected = original_poolformer(published, x)
    else:
        dims = (-1,) if name in ("convformer_s18", "caformer_s18") else (1, 2, 3)
        expected = original_metaformer(published, x, pooling=name.startswith("pool"), norm_dims=dims)
    with torch.no_grad():
        assert relative(ours(x), expected) < 1e-5
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in ours.state_dict().items())


def test_random_mixing_weights_stay_frozen(tmp_path):
    made = create_model("randformer_s12", num_classes=2, image_size=64)
    torch.save(in_original_layout(made), tmp_path / "rand.pth")
    ours = create_model("randformer_s12", num_classes=2, image_size=64, checkpoint=tmp_path / "rand.pth")
    matrices = {k: p for k, p in ours.named_parameters() if k.endswith("random_matrix")}
    assert len(matrices) == 8 and not any(p.requires_grad for p in matrices.values())
    assert all(torch.equal(p, made.state_dict()[k]) for k, p in matrices.items())


def test_other_layouts_are_not_mistaken_for_an_originals():
    with pytest.raises(ValueError, match="sail-sg/poolformer or sail-sg/metaformer"):
        from_original(create_model("poolformer_n4").state_dict())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.module.", "net.",
     "timm_model.", "student.backbone.", "module.backbone.timm_model."],
)  # fmt: skip
def test_what_wrappers_put_before_names_is_taken_off(prefix):
    made = create_model("poolformer_s12", num_classes=2, depths=[1, 1, 1, 1])
    ours = create_model("poolformer_s12", num_classes=2, depths=[1, 1, 1, 1])
    for state, layout in ((made.state_dict(), ""), (in_original_layout(made), ", in the layout of sail-sg/poolformer")):
        wrapped = {prefix + key: value for key, value in state.items()}
        lines = load_into(ours, wrapped, "there", replace_classifier=False)
        assert lines == [f"weights from there{layout}, without {prefix!r} before all names"]
        assert all(torch.equal(v, made.state_dict()[k]) for k, v in ours.state_dict().items())
        wrapped["stem.extra"] = torch.ones(1)  # not before all
        with pytest.raises(ConfigError, match=r"weights do not fit poolformer_s12: stem\.conv\.weight is missing"):
            load_into(ours, wrapped, "there", replace_classifier=False)


def test_the_names_of_wrappers_are_those_of_torch(tmp_path):
    """DDP, torch.compile, AveragedModel and a module that holds the network, one in another."""
    made = create_model("caformer_n4", num_classes=2)
    holder = nn.Module()
    holder.add_module("model", torch.compile(torch.optim.swa_utils.AveragedModel(made)))  # pyright: ignore
    torch.save({"state_dict": holder.state_dict()}, tmp_path / "x.ckpt")
    ours = create_model("caformer_n4", num_classes=2, checkpoint=tmp_path / "x.ckpt")
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", ["mmpretrain", "mmpretrain, timm's backbone", "transformers"])
def test_poolformers_of_others_follow_the_original(layout, prefix, tmp_path, caplog):
    """mmpretrain's PoolFormer with LinearClsHead, and transformers' PoolFormerForImageClassification."""
    shape = {"num_classes": 7, "image_size": 64, "depths": [1, 1, 3, 2]}
    made = randomised(create_model("poolformer_s12", **shape))
    assert isinstance(made, MetaFormer)
    original = in_original_layout(made)
    if layout == "transformers":
        renamed = {in_transformers_layout(key): value for key, value in original.items()}
        assert "poolformer.encoder.block.3.1.output.conv2.bias" in renamed
        said = "in the layout of transformers' PoolFormer" + (
            f", without {prefix!r} before all names" if prefix else ""
        )
    elif layout == "mmpretrain":
        # norm6 behind the seventh of `network`
        renamed = {re.sub("^norm", "backbone.norm6", re.sub("^head", "head.fc", key)): v for key, v in original.items()}
        renamed = {key if key.startswith(("head", "back")) else f"backbone.{key}": v for key, v in renamed.items()}
        said = f"in the layout of sail-sg/poolformer, without '{prefix}backbone.' before all names but the head's"
    else:
        renamed = {
            k if k.startswith("head.fc") else f"backbone.timm_model.{k}": v for k, v in made.state_dict().items()
        }
        with pytest.raises(
            ConfigError, match=r"its network's names begin with 'backbone\.timm_model\.', and beside it is"
        ):
            load_into(made, renamed, "there", replace_classifier=False)
        return
    file = tmp_path / "pytorch_model.bin"
    torch.save({f"{prefix}{key}": value for key, value in renamed.items()}, file)
    caplog.set_level(logging.INFO)
    ours = create_model("poolformer_s12", checkpoint=tmp_path, **shape).eval()
    assert caplog.messages == [f"weights from {tmp_path}, {said}"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(ours(x), original_poolformer(original, x)) < 1e-5


def in_transformers_layout(key: str) -> str:
    """A name of sail-sg/poolformer as transformers has it."""
    key = key.replace("patch_embed.proj.", "network.-1.proj.")
    key = re.sub(
        r"^network\.(-?\d)\.proj\.",
        lambda m: f"poolformer.encoder.patch_embeddings.{(int(m[1]) + 1) // 2}.projection.",
        key,
    )
    key = re.sub(r"^network\.(\d)\.", lambda m: f"poolformer.encoder.block.{int(m[1]) // 2}.", key)
    key = key.replace(".norm1.", ".before_norm.").replace(".norm2.", ".after_norm.").replace(".mlp.fc", ".output.conv")
    return re.sub("^head", "classifier", key)


def test_networks_that_nothing_chooses_are_refused_with_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, other = (create_model("caformer_n4", num_classes=2) for _ in range(2))
    several = {f"student.{k}": v for k, v in other.state_dict().items()}
    several |= {f"teacher.module.{k}": v for k, v in made.state_dict().items()}
    beside = {f"model.{k}": v for k, v in made.state_dict().items()} | {"criterion.weight": torch.ones(2)}
    for state, message in (
        (several, "it holds 2 networks: 'student.', 'teacher.module.'"),
        (beside, "its network's names begin with 'model.', and beside it is criterion.weight"),
    ):
        torch.save({"state_dict": state}, "x.ckpt")
        with pytest.raises(
            ConfigError, match=rf"stem\.norm\.weight is missing .*\n{message}; to save one alone: "
        ) as error:
            create_model("caformer_n4", num_classes=2, checkpoint="x.ckpt")
        command = shlex.split(str(error.value).partition("to save one alone: ")[2])
        assert command[:2] == ["python", "-c"]
        exec(command[2], {})
        ours = create_model("caformer_n4", num_classes=2, checkpoint="weights.pth")
        assert all(torch.equal(v, made.state_dict()[k]) for k, v in ours.state_dict().items())


def test_a_layout_that_is_not_read_is_said():
    state = timm.create_model("resnet18", num_classes=2).state_dict()
    with pytest.raises(
        ConfigError, match=r"is missing .*\nlayouts that are read are ours, timm's, and those of sail-sg/pool"
    ):
        load_into(create_model("caformer_n4"), state, "there", replace_classifier=False)


# ---- fitting weights to a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_input_channels_are_adapted_by_timms_rule(in_chans):
    source = create_model("caformer_n4", num_classes=5)
    ours = create_model("caformer_n4", num_classes=5, in_chans=in_chans)
    lines = load_into(ours, source.state_dict(), "there", replace_classifier=False, adapt_input=True)
    assert lines[1] == f"first convolution adapted from 3 to {in_chans} input channels"
    weight, adapted = source.stem.conv.weight, ours.stem.conv.weight
    if in_chans == 1:
        assert torch.equal(adapted, weight.sum(dim=1, keepdim=True))
    else:
        repeated = torch.cat([weight, weight], dim=1)[:, :in_chans]
        torch.testing.assert_close(adapted, repeated * (3 / in_chans))
    assert torch.equal(ours.head.fc.weight, source.head.fc.weight)  # type: ignore[arg-type]


def test_grey_weights_become_coloured():
    source = create_model("caformer_n4", in_chans=1)
    ours = create_model("caformer_n4")
    load_into(ours, source.state_dict(), "there", replace_classifier=False, adapt_input=True)
    torch.testing.assert_close(ours.stem.conv.weight.sum(dim=1, keepdim=True), source.stem.conv.weight)


def test_classifier_is_replaced_only_where_asked():
    source = create_model("caformer_n4", num_classes=5)
    ours = create_model("caformer_n4", num_classes=3)
    fresh = ours.head.fc.weight.clone()  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"(?s)head.fc.weight has shape \[5, 64\].*num_classes=5"):
        load_into(ours, source.state_dict(), "there", replace_classifier=False)
    lines = load_into(ours, source.state_dict(), "there", replace_classifier=True)
    assert lines == ["weights from there", "classifier of 5 classes replaced by a new one of 3"]
    assert torch.equal(ours.head.fc.weight, fresh)  # type: ignore[arg-type]
    assert torch.equal(ours.stem.conv.weight, source.stem.conv.weight)


def test_mlp_head_keeps_all_but_its_last_layer():
    source = create_model("caformer_n4", num_classes=5, head={"kind": "mlp"})
    ours = create_model("caformer_n4", num_classes=3, head={"kind": "mlp"})
    load_into(ours, source.state_dict(), "there", replace_classifier=True)
    theirs = source.state_dict()
    same = {k for k, v in ours.state_dict().items() if k.startswith("head.fc.") and v.shape == theirs[k].shape}
    assert same == {"head.fc.fc1.weight", "head.fc.fc1.bias", "head.fc.norm.weight", "head.fc.norm.bias"}
    assert all(torch.equal(ours.state_dict()[k], theirs[k]) for k in same)


def test_classifier_left_out_and_brought_in():
    source = create_model("caformer_n4", num_classes=5)
    features = create_model("caformer_n4", num_classes=0)
    lines = load_into(features, source.state_dict(), "there", replace_classifier=True)
    assert lines[1] == "classifier of 5 classes left out"
    ours = create_model("caformer_n4", num_classes=3)
    lines = load_into(ours, features.state_dict(), "there", replace_classifier=True)
    assert lines[1] == "no classifier in the weights: a new one of 3 classes"
    assert torch.equal(ours.stem.conv.weight, source.stem.conv.weight)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: s.pop("stages.1.blocks.1.norm2.weight"), r"stages.1.blocks.1.norm2.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"extra is not in the model"),
        (lambda s: s.update({"head.norm.weight": torch.ones(3)}), r"head.norm.weight has shape \[3\], expected \[64\]"),
        (lambda s: s.clear(), r"stem.norm.weight is missing \(and \d+ more\)"),
        (
            lambda s: s.update({"head.fc.weight": torch.tensor(1.0)}),
            r"head.fc.weight has shape \[\], expected \[5, 64\]",
        ),
        (lambda s: s.update({"head.fc.bais": s.pop("head.fc.bias")}), r"head.fc.bias is missing \(and 1 more\)"),
        (
            lambda s: s.update({k: v.to(torch.complex64) for k, v in s.items()}),
            r"\S+ holds torch.complex64, expected fl",
        ),
        (
            lambda s: s.update({"head.fc.bias": torch.ones(5, dtype=torch.int64)}),
            r"head.fc.bias holds torch.int64, exp",
        ),
    ],
    ids=["missing", "unknown", "shape", "empty", "scalar", "name", "complex", "integer"],
)
def test_what_does_not_fit_changes_nothing(fault, message):
    ours = create_model("caformer_n4", num_classes=5)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = dict(create_model("caformer_n4", num_classes=5).state_dict())
    fault(state)
    for adapt in (False, True):
        with pytest.raises(ConfigError, match=f"^there: weights do not fit caformer_n4: {message}[^\n]*$"):
            load_into(ours, state, "there", replace_classifier=adapt, adapt_input=adapt)
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.fc.weight", torch.ones(5, 64).to_sparse(), "there: head.fc.weight must be a dense tensor, is torch.spa"),
        (
            "head.fc.weight",
            torch.ones(5, 64, device="meta"),
            "there: head.fc.weight must be a dense tensor, is on the m",
        ),
        (1, torch.ones(1), "there: not a state dict: its key 1 is not text"),
    ],
    ids=["sparse", "meta", "key"],
)
def test_what_is_no_dense_tensor_changes_nothing(key, value, message):
    ours = create_model("caformer_n4", num_classes=5)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = {**create_model("caformer_n4", num_classes=5).state_dict(), key: value}
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_into(ours, state, "there", replace_classifier=True)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("shape", [[], [4], [1, 4], [1, 1, 4, 192]])
def test_positions_of_another_form_are_refused(shape):
    ours = create_model("deit_tiny_patch16_224", depths=[1])
    state = {**ours.state_dict(), "embed.pos_embed": torch.ones(shape)}
    with pytest.raises(ConfigError, match=re.escape(f"embed.pos_embed has shape {shape}, expected [1, 197, 192]")):
        load_into(ours, state, "there", replace_classifier=False)


def test_random_mixing_of_another_image_size_is_refused():
    shape: dict = {"depths": [1, 1, 1, 1], "num_classes": 5}
    state = create_model("randformer_s12", image_size=64, **shape).state_dict()
    ours = create_model("randformer_s12", image_size=96, **shape)
    with pytest.raises(
        ConfigError,
        match=r"random_matrix has shape \[16, 16\], expected \[36, 36\] .*\n"
        "random mixing takes images of one size: 96 is not that of the weights$",
    ):
        load_into(ours, state, "there", replace_classifier=False)


def test_other_input_channels_are_refused_unless_asked():
    ours = create_model("caformer_n4")
    with pytest.raises(ConfigError, match="the weights have 1 input channels: name in_chans to adapt them"):
        load_into(ours, create_model("caformer_n4", in_chans=1).state_dict(), "there", replace_classifier=False)


# ---- published weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Makes timm's own loader find weights in a folder, as if it had downloaded them; returns what was asked for."""
    asked = []

    def offer(model: nn.Module) -> None:
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), file)
        create = timm.create_model

        def create_from_file(name: str, *, pretrained: bool) -> nn.Module:
            asked.append(name)
            return create(name, pretrained=pretrained, pretrained_cfg_overlay={"file": str(file)})

        monkeypatch.setattr(timm, "create_model", create_from_file)

    offer.asked = asked
    return offer


@pytest.mark.parametrize("head", [{}, {"order": "pool_norm", "norm": "layer_norm"}], ids=["ours", "timms"])
def test_pretrained_poolformer(published, caplog, head):
    caplog.set_level(logging.INFO, logger="models")
    theirs = randomised(timm.create_model("poolformer_s12"))
    published(theirs)
    ours = create_model("poolformer_s12", pretrained=True, head=head).eval()
    assert published.asked == ["poolformer_s12.sail_in1k"]
    said = [
        "the head normalises before pooling, as the original; the same weights with "
        "head={'order': 'pool_norm', 'norm': 'layer_norm'} give timm's logits"
    ]
    changed = [
        "head.order is pool_norm, in the model of the weights it was norm_pool",
        "head.norm is layer_norm, in the model of the weights it was group_norm",
    ]
    assert caplog.messages == ["weights from timm poolformer_s12.sail_in1k", *(changed if head else said)]
    assert [record.levelname for record in caplog.records] == ["INFO", *["WARNING"] * (2 if head else 1)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        difference = relative(ours(x), theirs(x))
    assert difference < 1e-5 if head else difference > 1e-3


def test_pretrained_with_a_tag_new_classes_and_grey_images(published, caplog):
    caplog.set_level(logging.INFO, logger="models")
    theirs = randomised(timm.create_model("caformer_s18"))
    published(theirs)
    name = "caformer_s18.sail_in22k_ft_in1k_384"
    ours = create_model(name, pretrained=True, in_chans=1, num_classes=5)
    assert published.asked == [name]
    assert caplog.messages == [
        f"weights from timm {name}",
        "the head has a norm of eps 1e-5, as the original; the same weights with head={'mlp_norm_eps': 1e-06} "
        "give timm's logits",
        "first convolution adapted from 3 to 1 input channels",
        "classifier of 1000 classes replaced by a new one of 5",
    ]
    assert ours.pretrained_cfg["input_size"] == (1, 384, 384) and ours.num_classes == 5
    assert ours.pretrained_cfg["tag"] == "sail_in22k_ft_in1k_384"
    state = theirs.state_dict()
    assert torch.equal(ours.stem.conv.weight, state["stem.conv.weight"].sum(dim=1, keepdim=True))
    assert torch.equal(ours.head.fc.fc1.weight, state["head.fc.fc1.weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tag", "classes", "size"),
    [("sail_in1k", 1000, 224), ("sail_in22k_ft_in1k_384", 1000, 384), ("sail_in22k", 21841, 224)],
)
def test_a_tag_sets_classes_and_image_size(tag, classes, size):
    with torch.device("meta"):
        model = create_model(f"convformer_s18.{tag}")
        other = create_model(f"convformer_s18.{tag}", num_classes=3, image_size=[96, 160])
    assert model.num_classes == classes and model.pretrained_cfg["input_size"] == (3, size, size)
    assert model.pretrained_cfg["tag"] == tag
    assert other.num_classes == 3 and other.pretrained_cfg["input_size"] == (3, 96, 160)


def test_every_tag_is_known_to_timm():
    tags = {f"{n}.{tag}" for n in list_models() for tag in model_config(n).pretrained}
    published = {t for n in (*IN_TIMM, *ISOTROPIC) for t in timm.list_models(f"{n}.*", pretrained=True)}
    assert tags == published >= set(timm.list_models(module="metaformer", pretrained=True))
    for module, left_out in (("mlp_mixer", ("gm",)), ("deit", ("_distilled_", "_384"))):
        names = [n for n in timm.list_models(module=module) if not any(part in n for part in left_out)]
        assert names and set(names) <= set(ISOTROPIC)
    for name in tags:
        base, _, tag = name.partition(".")
        config, theirs = model_config(name), timm.models.get_pretrained_cfg(name)
        assert theirs is not None and config.pretrained[0] == tag
        assert (3, *config.height_width) == theirs.input_size and config.num_classes == theirs.num_classes
        assert config.crop_pct == theirs.crop_pct and config.interpolation == theirs.interpolation
        assert tuple(config.mean) == theirs.mean and tuple(config.std) == theirs.std
        assert published_config(model_config(base), tag) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("caformer_s18.sail_in1k_348", "did you mean 'sail_in1k_384'"),
        ("randformer_s12.sail_in1k", "has no published weights 'sail_in1k'; it has: none"),
        ("caformer_s81.sail_in1k", "unknown model 'caformer_s81.sail_in1k'; did you mean 'caformer_s18'"),
    ],
)
def test_unknown_tags(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model(name)


def test_models_without_published_weights_say_so():
    with pytest.raises(ConfigError, match="'identityformer_s12' has no published weights in timm; give checkpoint"):
        create_model("identityformer_s12", pretrained=True)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("poolformerv2_s12", {"token_mixer": "identity"}, "token_mixer was pooling, is identity"),
        ("poolformerv2_s12", {"pool_size": 5}, "pool_size was 3, is 5"),
        ("poolformerv2_s12", {"stem": {"stride": 2}}, "stem.stride was 4, is 2"),
        ("vit_small_patch16_224.dino", {"head_dim": 32}, "head_dim was 64, is 32"),
    ],
)
def test_published_weights_are_for_the_published_architecture(published, name, override, message):
    published(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=f"^published weights of {name}: weights do not fit [^:]*: {message}$"):
        create_model(name, pretrained=True, **override)
    assert published.asked == []  # found before anything is fetched


def test_published_weights_in_a_yaml_of_ones_own(published, tmp_path):
    text = (CONFIGS / "models" / "poolformer_s12.yaml").read_text()
    (tmp_path / "poolformer_s12.yaml").write_text(text.replace("act: gelu", "act: relu"))
    with pytest.raises(ConfigError, match="act was gelu, is relu"):
        create_model(str(tmp_path / "poolformer_s12.yaml"), pretrained=True)
    theirs = timm.create_model("poolformer_s12")
    published(theirs)
    (tmp_path / "poolformer_s12.yaml").write_text(text)
    ours = create_model(str(tmp_path / "poolformer_s12.yaml"), pretrained=True, mean=[0.5], std=[0.5])
    assert torch.equal(ours.stem.conv.weight, theirs.state_dict()["stem.conv.weight"])


# ---- the hub's cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Puts weights where Hugging Face keeps what it has downloaded, without a network; returns the file."""
    # both are read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, model: nn.Module) -> Path:
        folder = tmp_path / "hub" / f"models--timm--{name}"
        file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
        file.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        safetensors.torch.save_file(model.state_dict(), file)
        return file

    return put


def test_weights_in_the_hubs_cache(cached, caplog):
    caplog.set_level(logging.INFO, logger="models")
    name = "deit_tiny_patch16_224"
    theirs = randomised(timm.create_model(name))
    cached(f"{name}.fb_in1k", theirs)
    ours = create_model(name, pretrained=True).eval()
    assert caplog.messages == [f"weights from timm {name}.fb_in1k"]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
    caplog.clear()
    ours = create_model(name, pretrained=True, num_classes=5, in_chans=1).eval()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"weights from timm {name}.fb_in1k"),
        ("WARNING", "first convolution adapted from 3 to 1 input channels"),
        ("WARNING", "classifier of 1000 classes replaced by a new one of 5"),
    ]
    grey = theirs.state_dict()["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(ours.stem.conv.weight, grey) and ours(x[:, :1]).shape == (1, 5)


def test_a_tag_in_the_hubs_cache(cached):
    name = "vit_tiny_patch16_224.augreg_in21k"
    theirs = randomised(timm.create_model(name))
    cached(name, theirs)
    ours = create_model(name, pretrained=True)
    assert ours.num_classes == 21843 and ours.pretrained_cfg["tag"] == "augreg_in21k"
    assert torch.equal(ours.head.fc.weight, theirs.state_dict()["head.weight"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^published weights vit_tiny_patch16_224\.augreg_in21k_ft_in1k could not"):
        create_model("vit_tiny_patch16_224", pretrained=True)  # another tag's are not taken instead


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_damage_in_the_hubs_cache_costs_one_line(cached, tmp_path, size):
    file = cached("deit_tiny_patch16_224.fb_in1k", timm.create_model("deit_tiny_patch16_224"))
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        ConfigError,
        match=r"^published weights deit_tiny_patch16_224\.fb_in1k could not be loaded: .* \(delete the damaged "
        rf"models--timm--deit_tiny_patch16_224\.fb_in1k in {tmp_path / 'hub'}\)$",
    ) as error:
        create_model("deit_tiny_patch16_224", pretrained=True)
    assert "\n" not in str(error.value)


def test_offline_costs_one_line(tmp_path):
    """As a user has it: from the environment, in a process of its own."""
    code = (
        "import models\ntry: models.create_model('poolformer_s12', pretrained=True)\nexcept ValueError as e: print(e)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=CONFIGS.parent, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("published weights poolformer_s12.sail_in1k could not be loaded: ")
    assert done.stdout.count("\n") == 1 and "cannot find the requested files in the local cache" in done.stdout
    assert done.stdout.endswith(f" (looked in {tmp_path}/hub; on a machine without a network set HF_HUB_OFFLINE=1)\n")


# ---- folders of timm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True, "both"])
@pytest.mark.parametrize("name", ["caformer_s18", "deit_tiny_patch16_224"])
def test_what_timm_saves_for_the_hub_is_a_checkpoint(name, safe, tmp_path):
    size: dict = {"img_size": 64} if name.startswith("deit") else {}
    theirs = randomised(timm.create_model(name, num_classes=5, **size))
    timm.models.save_for_hf(theirs, str(tmp_path / "hub"), safe_serialization=safe)
    shape: dict = {"num_classes": 5, "head": timm_head(model_config(name))} | ({"image_size": 64} if size else {})
    ours = create_model(name, checkpoint=tmp_path / "hub", **shape).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


def test_a_folder_of_transformers_timm_wrapper_is_a_checkpoint(tmp_path):
    """Its names begin with timm_model; its config.json names timm's architecture."""
    theirs = randomised(timm.create_model("caformer_s18", num_classes=5))
    folder = timm_folder(tmp_path / "theirs", theirs, "caformer_s18", prefix="timm_model.")
    ours = create_model("caformer_s18", checkpoint=folder, num_classes=5, head={"mlp_norm_eps": 1e-6}).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
    with pytest.raises(ConfigError, match="weights of 'caformer_s18', another architecture than 'convformer_s18'"):
        create_model("convformer_s18", checkpoint=folder, num_classes=5)


def timm_folder(folder, model: nn.Module, architecture: str, prefix: str = ""):
    folder.mkdir()
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_s18"])
def test_a_folder_of_timm_is_a_checkpoint(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="models")
    theirs = randomised(timm.create_model(name, num_classes=5))
    folder = timm_folder(tmp_path / "theirs", theirs, name)
    ours = create_model(name, checkpoint=folder, num_classes=5, head=timm_head(model_config(name))).eval()
    assert caplog.messages == [f"weights from {folder}"]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


def test_a_folder_of_timm_with_another_head_is_said(tmp_path, caplog):
    name = "poolformer_s12"
    folder = timm_folder(tmp_path / "theirs", timm.create_model(name, num_classes=5), name)
    caplog.set_level(logging.WARNING, logger="models")
    create_model(name, checkpoint=folder, num_classes=5)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("the head normalises before pooling")
    with pytest.raises(ConfigError, match=r"head\.norm was layer_norm, is group_norm\n.*head={'norm': 'group_norm'}$"):
        create_model(name, checkpoint=folder, num_classes=5, head={"order": "pool_norm"})


def test_a_folder_of_another_architecture_is_refused_although_its_shapes_fit(tmp_path):
    folder = timm_folder(tmp_path / "theirs", timm.create_model("poolformerv2_s12", num_classes=5), "poolformerv2_s12")
    with pytest.raises(
        ConfigError, match="weights of 'poolformerv2_s12', another architecture than 'identityformer_s12'"
    ):
        create_model("identityformer_s12", checkpoint=folder, num_classes=5)
    folder = timm_folder(tmp_path / "resnet", nn.Linear(1, 1), "resnet50")
    with pytest.raises(ConfigError, match="weights of 'resnet50', which is not in the zoo"):
        create_model("identityformer_s12", checkpoint=folder)
