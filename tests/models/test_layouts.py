"""models/layouts.py: other layouts give equal logits, both ways, and published ones follow the originals."""

import logging
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from files.errors import ConfigError
from models.factory import create_model
from models.layouts import from_original, from_timm, timm_head, to_timm
from models.loading import load_into
from models.metaformer import MetaFormer
from models.registry import model_config
from tests.models.parts import IN_TIMM, ISOTROPIC, in_original_layout, randomised, relative

VITS = [n for n in ISOTROPIC if model_config(n).token_mixer == "attention"]
MLPS = [n for n in ISOTROPIC if n not in VITS]

# class token, LayerScale, registers and fc_norm, average pooling in the grid, class token with average pooling
FEW_VITS = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_wee_patch16_reg1_gap_256",
            "vit_medium_patch16_gap_240", "vit_small_patch14_reg4_dinov2"]  # fmt: skip

SMALL = ["poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18"]
BASIC = ["identityformer_s12", "randformer_s12"]


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
