"""models/config.py: every shipped YAML builds and is what was published; each mistake in one is named with its place."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

from configs import CONFIGS
from layers.stochastic_depth import count_macs
from models.config import MetaFormerConfig, load_model_config, override_config
from models.factory import count_parameters
from models.metaformer import MetaFormer
from models.strict_yaml import ConfigError

FILES = sorted((CONFIGS / "models").glob("*.yaml"))
FAMILIES = {
    "poolformer": ("s12", "s24", "s36", "m36", "m48"),
    "poolformerv2": ("s12", "s24", "s36", "m36", "m48"),
    "identityformer": ("s12", "s24", "s36", "m36", "m48"),
    "randformer": ("s12", "s24", "s36", "m36", "m48"),
    "convformer": ("s18", "s36", "m36", "b36"),
    "caformer": ("s18", "s36", "m36", "b36"),
}


METAFORMERS = {f"{family}_{size}" for family, sizes in FAMILIES.items() for size in sizes}


def on_meta(config: MetaFormerConfig) -> MetaFormer:
    with torch.device("meta"):
        return MetaFormer(config)


def half_a_digit(published: float) -> float:
    """Half a unit of the last digit of a published figure."""
    decimals = len(str(published).partition(".")[2])
    return 0.5 * 10**-decimals + 1e-9


# ---- the shipped files ------------------------------------------------------------------------------------------------


def test_all_published_models_are_here():
    names = {p.stem for p in FILES}
    published = {p.stem for p in FILES if load_model_config(p).published}
    assert len(METAFORMERS) == 28 and published >= METAFORMERS
    # the rest are timm's isotropic models under their own names, and small ones of ours, never published
    ours = {n for n in names - METAFORMERS if not timm.is_model(n)}
    assert {"caformer_n4", "poolformer_n4"} <= ours and all(n.endswith("_n4") for n in ours) and not ours & published


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_parameters_and_macs_are_the_published_ones(path):
    config = load_model_config(path)
    model = on_meta(config)
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")).shape == (2, config.num_classes)
    facts = config.published
    if facts is None:
        return
    trainable, frozen = (n / 1e6 for n in count_parameters(model))
    assert trainable == pytest.approx(facts.params, rel=0.01)
    assert abs(frozen - (facts.frozen_params or 0.0)) <= half_a_digit(facts.frozen_params or 0.0)
    assert bool(frozen) == bool(facts.frozen_params)
    assert facts.macs is not None
    assert count_macs(model).total / 1e9 == pytest.approx(facts.macs, rel=0.02, abs=half_a_digit(facts.macs))
    tuned = facts.finetune_384
    assert (tuned is not None) == ("sail_in1k_384" in config.pretrained)
    if tuned is not None:
        macs = count_macs(model, (3, 384, 384)).total / 1e9
        assert macs == pytest.approx(tuned.macs, rel=0.02, abs=half_a_digit(tuned.macs))


def test_published_facts_are_those_of_the_papers():
    facts = {p.stem: f for p in FILES if (f := load_model_config(p).published)}
    # README of sail-sg/metaformer and sail-sg/poolformer (top-1), their training scripts (drop-path rates)
    top1 = {
        "poolformer": (77.2, 80.3, 81.4, 82.1, 82.5),
        "poolformerv2": (78.0, 80.7, 81.6, 82.2, 82.6),
        "identityformer": (74.6, 78.2, 79.3, 80.0, 80.4),
        "randformer": (76.6, 78.2, 79.5, 81.2, 81.4),
        "convformer": (83.0, 84.1, 84.5, 84.8),
        "caformer": (83.6, 84.5, 85.2, 85.5),
    }
    rates = {
        "poolformer": (0.1, 0.1, 0.2, 0.3, 0.4),
        "poolformerv2": (0.1, 0.1, 0.2, 0.3, 0.4),
        "identityformer": (0.1, 0.1, 0.2, 0.3, 0.4),
        "randformer": (0.1, 0.1, 0.2, 0.3, 0.3),
        "convformer": (0.2, 0.3, 0.4, 0.6),
        "caformer": (0.15, 0.3, 0.4, 0.6),
    }
    tuned = {
        "convformer": ((84.4, 0.3), (85.4, 0.5), (85.6, 0.8), (85.7, 0.8)),
        "caformer": ((85.0, 0.3), (85.7, 0.5), (86.2, 0.7), (86.4, 0.8)),
    }
    for family, sizes in FAMILIES.items():
        found = [facts[f"{family}_{size}"] for size in sizes]
        assert tuple(f.top1 for f in found) == top1[family]
        assert tuple(f.drop_path_rate for f in found) == rates[family]
        at_384 = tuple((f.finetune_384.top1, f.finetune_384.drop_path_rate) for f in found if f.finetune_384)
        assert at_384 == tuned.get(family, ())


def test_published_facts_of_deit_are_those_of_its_readmes():
    facts = {p.stem: f for p in FILES if (f := load_model_config(p).published)}
    # facebookresearch/deit: README_deit.md and main.py's default rate; README_revenge.md, tables and commands
    for size, top1 in (("tiny", 72.2), ("small", 79.9), ("base", 81.8)):
        found = facts[f"deit_{size}_patch16_224"]
        assert (found.top1, found.drop_path_rate) == (top1, 0.1)
    for size, top1, rate in (("small", 81.4, 0.05), ("base", 83.8, 0.2), ("large", 84.9, 0.45), ("huge", 85.2, 0.6)):
        found = facts[f"deit3_{size}_patch{14 if size == 'huge' else 16}_224"]
        assert (found.top1, found.drop_path_rate) == (top1, rate)


def test_input_of_the_published_models_is_imagenets():
    for path in FILES:
        config = load_model_config(path)
        if path.stem in METAFORMERS:
            crop = {"poolformer_s": 0.9, "poolformer_m": 0.95}.get(path.stem[:12], 1.0)
            assert (config.crop_pct, config.image_size, config.interpolation) == (crop, 224, "bicubic")
            assert config.mean == [0.485, 0.456, 0.406] and config.std == [0.229, 0.224, 0.225]


# ---- derived values ---------------------------------------------------------------------------------------------------


def test_feature_sizes_follow_the_convolutions():
    config = load_model_config(CONFIGS / "models" / "poolformer_s12.yaml", {"image_size": [224, 160]})
    assert [config.feature_size(i) for i in range(4)] == [(56, 40), (28, 20), (14, 10), (7, 5)]
    model = on_meta(config)
    features = model.forward_intermediates(torch.empty(1, 3, 224, 160, device="meta"), intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features] == [config.feature_size(i) for i in range(4)]


def test_stages_of_equal_width_keep_the_size():
    config = load_model_config(CONFIGS / "models" / "poolformer_n4.yaml", {"dims": [48, 48]})
    assert config.feature_size(1) == config.feature_size(0) == (16, 16)
    assert on_meta(config).forward_features(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 48, 16, 16)


def test_channel_statistics_follow_the_input_channels():
    config = load_model_config(CONFIGS / "models" / "poolformer_s12.yaml")
    assert config.channel_stats() == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = override_config(config, {"in_chans": 4}, "test").channel_stats()
    assert mean == pytest.approx([0.449] * 4, abs=1e-9) and std == pytest.approx([0.226] * 4, abs=1e-9)


def test_one_value_or_one_per_stage():
    config = load_model_config(CONFIGS / "models" / "caformer_s18.yaml")
    assert config.per_stage(config.token_mixer) == ["sep_conv", "sep_conv", "attention", "attention"]
    assert config.per_stage(config.norm) == ["layer_norm_no_bias"] * 4
    assert config.per_stage(config.res_scale) == [None, None, 1.0, 1.0]


# ---- reading and refusing ---------------------------------------------------------------------------------------------


GOOD = """\
depths: [2, 2]
dims: [32, 64]
token_mixer: [pooling, attention]
head_dim: 16
stem: {kernel_size: 3, stride: 2, padding: 1}
downsample: {kernel_size: 3, stride: 2, padding: 1}
image_size: 32
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_name_is_the_files_unless_given(tmp_path):
    assert load_model_config(write(tmp_path, GOOD)).name == "mine"
    assert load_model_config(write(tmp_path, GOOD + "name: other\n")).name == "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("depths:", "deptsh:"), "mine.yaml:1: deptsh: unknown key; did you mean 'depths'?"),
        (("[2, 2]", "[2, two]"), "mine.yaml:1: depths[1]: expected an integer"),
        (("[2, 2]", "[2, true]"), "mine.yaml:1: depths[1]: expected an integer"),
        (("[2, 2]", "[2, 0]"), "mine.yaml:1: depths[1]: must be at least 1"),
        (("[32, 64]", "[32, 64, 64]"), "depths has 2 stages and dims 3"),
        (("[pooling, attention]", "[pooling]"), "token_mixer has 1 entries, depths has 2 stages"),
        (("attention]", "atention]"), "mine.yaml:3: token_mixer[1]: expected 'pooling'"),
        (("head_dim: 16", "head_dim: 24"), "dims[1] = 64 is not divisible by head_dim 24"),
        (("stride: 2", "strid: 2"), "mine.yaml:5: stem.strid: unknown key; did you mean 'stem.stride'?"),
        (("stem: {kernel_size: 3, stride: 2, padding: 1}\n", ""), "stem: required key is missing"),
        (("image_size: 32", "image_size: [32, 32, 32]"), "image_size: must be one number or [height, width]"),
        (("image_size: 32", "image_size: 1\nstem2: 1"), "unknown key"),
        (("image_size: 32", "pool_size: 4"), "mine.yaml:7: pool_size: must be odd"),
        (("image_size: 32", "std: [0.0, 1.0, 1.0]"), "std must be positive"),
        (("image_size: 32", "name: ../../mine"), "mine.yaml:7: name: must be a plain name, not a path"),
        (("image_size: 32", "mlp_ratio: .nan"), "mine.yaml:7: mlp_ratio: expected a finite number"),
        (("image_size: 32", "layer_scale: [1e-5, 1e-5, 1e-5]"), "layer_scale has 3 entries, depths has 2 stages"),
        (("image_size: 32", "num_classes: '10'"), "mine.yaml:7: num_classes: expected an integer"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, change, message):
    before, after = change
    assert before in GOOD
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_model_config(write(tmp_path, GOOD.replace(before, after, 1)))
    assert "mine.yaml" in str(error.value) and str(error.value).count("\n") <= 2


VIT = """\
depths: [2]
dims: [32]
token_mixer: attention
head_dim: 16
stem: {kernel_size: 8, stride: 8, padding: 0}
pos_embed: all
class_token: true
head: {pool: token}
image_size: 32
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class_token: true", "class_token: false"), "pos_embed 'all' needs a class token or register tokens"),
        (("pos_embed: all\nclass_token: true", "pos_embed: patches"), "head.pool 'token' needs class_token: true"),
        (("attention", "pooling"), "class and register tokens go with attention and identity only, not with pooling"),
        (("attention", "spatial_mlp"), "go with attention and identity only, not with spatial_mlp"),
        (("[2]\ndims: [32]", "[1, 1]\ndims: [32, 64]"), "downsample is missing: dims [32, 64] change between stages"),
        (("pos_embed: all", "pos_embed: al"), "mine.yaml:6: pos_embed: expected 'none', 'patches' or 'all'"),
        (("class_token: true", "class_tokens: true"), "class_tokens: unknown key; did you mean 'class_token'?"),
        (("image_size: 32", "register_tokens: -1"), "mine.yaml:9: register_tokens: must be at least 0, got -1"),
        (("image_size: 32", "spatial_hidden: 0"), "mine.yaml:9: spatial_hidden: must be at least 1, got 0"),
        (
            ("[2]\ndims: [32]", "[1, 1]\ndims: [32, 64]\ndownsample: {kernel_size: 3, stride: 2, padding: 1}"),
            "class and register tokens need stages of one width, got dims [32, 64]",
        ),
    ],
)
def test_mistakes_with_tokens(tmp_path, change, message):
    before, after = change
    assert before in VIT and load_model_config(write(tmp_path, VIT)).num_prefix_tokens == 1
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_model_config(write(tmp_path, VIT.replace(before, after, 1)))
    assert "mine.yaml" in str(error.value) and str(error.value).count("\n") <= 2


def test_a_fixed_image_size_follows_from_what_belongs_to_positions(tmp_path):
    assert load_model_config(write(tmp_path, VIT)).fixed_size
    plain = VIT.replace("pos_embed: all", "pos_embed: none")
    assert not load_model_config(write(tmp_path, plain)).fixed_size
    fixed = {p.stem for p in FILES if load_model_config(p).fixed_size}
    assert {"randformer_s12", "mixer_s32_224", "resmlp_12_224", "vit_base_patch16_gap_224"} <= fixed
    assert not fixed & {"caformer_s18", "identityformer_s12", "poolformer_s12"}


def test_images_too_small_for_the_stages(tmp_path):
    text = GOOD.replace("padding: 1", "padding: 0").replace("image_size: 32", "image_size: 4")
    with pytest.raises(ConfigError, match="image_size 4 is too small for 2 stages"):
        load_model_config(write(tmp_path, text))


def test_overrides_merge_into_sections():
    config = load_model_config(CONFIGS / "models" / "poolformer_s12.yaml", {"head": {"norm_eps": 1e-3}})
    assert (config.head.order, config.head.norm, config.head.norm_eps) == ("norm_pool", "group_norm", 1e-3)
    changed = override_config(config, {"head": {"order": "pool_norm"}, "depths": [1, 1, 1, 1]}, "test")
    assert (changed.head.order, changed.head.norm_eps, changed.depths) == ("pool_norm", 1e-3, [1, 1, 1, 1])
    assert config.head.order == "norm_pool"
    with pytest.raises(ConfigError, match=r"test: head\.ordr: unknown key; did you mean 'head\.order'"):
        override_config(config, {"head": {"ordr": "pool_norm"}}, "test")


def test_a_config_survives_yaml_and_is_read_only():
    for path in FILES:
        config = load_model_config(path)
        assert override_config(config, yaml.safe_load(yaml.safe_dump(config.model_dump())), "test") == config
    with pytest.raises(ValueError, match="frozen"):
        config.depths = [1]
