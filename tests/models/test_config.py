"""models/config.py: every shipped YAML builds and is what was published; each mistake in one is named with its place."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from configs import CONFIGS
from files.errors import ConfigError
from models.config import MetaFormerConfig, load_model_config, override_config
from models.counting import count_parameters
from models.metaformer import MetaFormer
from stochastic_depth.compute import count_macs

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


def test_channel_statistics_are_one_value_or_one_per_channel(tmp_path):
    config = load_model_config(write(tmp_path, GOOD + "in_chans: 2\nmean: [0.1, 0.9]\nstd: [0.5]\n"))
    assert config.channel_stats() == ([0.1, 0.9], [0.5, 0.5])
    grey = load_model_config(write(tmp_path, GOOD + "in_chans: 1\n"))  # the defaults are ImageNet's, averaged
    assert grey.mean == pytest.approx([0.449]) and grey.std == pytest.approx([0.226])
    other = override_config(config, {"in_chans": 1, "std": [0.2]}, "test")
    assert other.mean == [0.5] and other.std == [0.2]
    assert override_config(other, other.model_dump(), "test") == other
    with pytest.raises(ConfigError, match=r"test: mean: must have one value, .* in_chans 2, got \[1.0, 2.0, 3.0\]"):
        override_config(config, {"mean": [1.0, 2.0, 3.0]}, "test")


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
        (("[32, 64]", "[32, 64, 64]"), "mine.yaml:2: dims: has 3 entries, depths has 2 stages"),
        (("[pooling, attention]", "[pooling]"), "mine.yaml:3: token_mixer: has 1 entry, depths has 2 stages"),
        (("attention]", "atention]"), "mine.yaml:3: token_mixer[1]: expected 'pooling'"),
        (("head_dim: 16", "head_dim: 24"), "mine.yaml:4: head_dim: dims[1] = 64 is not divisible by head_dim 24"),
        (("64]", "40]"), "mine.yaml:4: head_dim: dims[1] = 40 is not divisible by head_dim 16"),
        (
            ("downsample", "# downsample"),
            "mine.yaml:2: dims: change between stages, [32, 64], but downsample is missing",
        ),
        (("stride: 2", "strid: 2"), "mine.yaml:5: stem.strid: unknown key; did you mean 'stem.stride'?"),
        (("stem: {kernel_size: 3, stride: 2, padding: 1}\n", ""), "stem: required key is missing"),
        (("image_size: 32", "image_size: [32, 32, 32]"), "image_size: must be one number or [height, width]"),
        (("image_size: 32", "image_size: 1\nstem2: 1"), "unknown key"),
        (("image_size: 32", "pool_size: 4"), "mine.yaml:7: pool_size: must be odd"),
        (("image_size: 32", "std: [0.0, 1.0, 1.0]"), "mine.yaml:7: std: must be positive"),
        (("image_size: 32", "std: []"), "mine.yaml:7: std: must have one value, or one for each of in_chans 3, got []"),
        (("image_size: 32", "mean: []"), "mine.yaml:7: mean: must have one value, or one for each of in_chans 3"),
        (
            ("image_size: 32", "mean: [0.1, 0.9]"),
            "mine.yaml:7: mean: must have one value, or one for each of in_chans 3",
        ),
        (
            ("image_size: 32", "in_chans: 1\nstd: [1.0, 1.0, 1.0]"),
            "mine.yaml:8: std: must have one value, or one for each",
        ),
        (("image_size: 32", "name: ''"), "mine.yaml:7: name: must not be empty"),
        (("image_size: 32", 'name: "a\\nb"'), "mine.yaml:7: name: must be a plain name, without line breaks"),
        (("image_size: 32", "name: ' a'"), "mine.yaml:7: name: must be a plain name, without line breaks or spaces"),
        (
            ("image_size: 32", "mlp_ratio: 1e-9"),
            "mine.yaml:7: mlp_ratio: 1e-09 hidden channels per channel leave none of 32",
        ),
        (
            ("pooling, attention]\nhead_dim: 16", "attention, sep_conv]\nconv_expansion: 0.01"),
            "mine.yaml:4: conv_expansion: 0.01 hidden channels per channel leave none of 64 channels",
        ),
        (
            ("image_size: 32", "drop_path_rate: 0.3"),
            "mine.yaml:7: drop_path_rate: unknown key; a rate is no part of a model: it is drop_path_rate of create_model",
        ),
        (("image_size: 32", "name: ../../mine"), "mine.yaml:7: name: must be a plain name, not a path"),
        (("image_size: 32", "mlp_ratio: .nan"), "mine.yaml:7: mlp_ratio: expected a finite number"),
        (
            ("image_size: 32", "layer_scale: [1e-5, 1e-5, 1e-5]"),
            "mine.yaml:7: layer_scale: has 3 entries, depths has 2",
        ),
        (
            ("image_size: 32", "image_size: 32\nres_scale: [1.0]"),
            "mine.yaml:8: res_scale: has 1 entry, depths has 2 stages",
        ),
        (("image_size: 32", "norm: [layer_norm]"), "mine.yaml:7: norm: has 1 entry, depths has 2 stages"),
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
        (("class_token: true", "class_token: false"), "mine.yaml:6: pos_embed: 'all' needs a class token or"),
        (
            ("pos_embed: all\nclass_token: true", "pos_embed: patches"),
            "mine.yaml:7: head.pool: 'token' needs class_token: true",
        ),
        (
            ("attention", "pooling"),
            "mine.yaml:3: token_mixer: class and register tokens go with attention and identity only, not with pooling",
        ),
        (("attention", "spatial_mlp"), "go with attention and identity only, not with spatial_mlp"),
        (("[2]\ndims: [32]", "[1, 1]\ndims: [32, 64]"), "mine.yaml:2: dims: change between stages, [32, 64], but"),
        (("pos_embed: all", "pos_embed: al"), "mine.yaml:6: pos_embed: expected 'none', 'patches' or 'all'"),
        (("class_token: true", "class_tokens: true"), "class_tokens: unknown key; did you mean 'class_token'?"),
        (("image_size: 32", "register_tokens: -1"), "mine.yaml:9: register_tokens: must be at least 0, got -1"),
        (("image_size: 32", "spatial_hidden: 0"), "mine.yaml:9: spatial_hidden: must be at least 1, got 0"),
        (
            ("[2]\ndims: [32]", "[1, 1]\ndims: [32, 64]\ndownsample: {kernel_size: 3, stride: 2, padding: 1}"),
            "mine.yaml:2: dims: class and register tokens need stages of one width, got [32, 64]",
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
    with pytest.raises(ConfigError, match=r"mine\.yaml:7: image_size: image_size 4 is too small for 2 stages"):
        load_model_config(write(tmp_path, text))
    text = GOOD.replace("image_size: 32", "").replace("{kernel_size: 3, stride: 2", "{kernel_size: 3, stride: 200")
    with pytest.raises(ConfigError, match=r"mine\.yaml:5: stem: image_size 224 is too small for 2 stages of this stem"):
        load_model_config(write(tmp_path, text.replace("padding: 1", "padding: 0")))


def test_a_key_left_at_its_default_has_no_line(tmp_path):
    text = GOOD.replace("head_dim: 16\n", "").replace("[32, 64]", "[32, 40]")
    with pytest.raises(ConfigError, match=r"mine.yaml:2: dims: dims\[1\] = 40 is not divisible by head_dim 32"):
        load_model_config(write(tmp_path, text))


WITHOUT_MIXER = [("[pooling, attention]", "identity"), ("head_dim: 16\n", "")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("pooling, attention", "pooling, pooling")],
            "mine.yaml:4: head_dim: has no effect: no stage's token_mixer is",
        ),
        (
            [("pooling, attention", "attention, attention"), ("image_size", "pool_size: 5\nimage_size")],
            "7: pool_size: has",
        ),
        ([*WITHOUT_MIXER, ("image_size", "qkv_bias: true\nimage_size")], "mine.yaml:6: qkv_bias: has no effect"),
        ([*WITHOUT_MIXER, ("image_size", "proj_bias: true\nimage_size")], "mine.yaml:6: proj_bias: has no effect"),
        (
            [("image_size", "conv_kernel_size: 3\nimage_size")],
            "conv_kernel_size: has no effect: no stage's token_mixer is",
        ),
        ([("image_size", "conv_expansion: 4\nimage_size")], "mine.yaml:7: conv_expansion: has no effect"),
        ([("image_size", "spatial_hidden: 9\nimage_size")], "mine.yaml:7: spatial_hidden: has no effect"),
        ([("[32, 64]", "[32, 32]")], "mine.yaml:6: downsample: has no effect: all stages are of one width"),
        (
            [("image_size", "head: {mlp_norm_eps: 1e-6}\nimage_size")],
            "7: head.mlp_norm_eps: has no effect: head.kind is",
        ),
        (
            [("image_size", "head:\n  norm: none\n  norm_eps: 1e-3\nimage_size")],
            "mine.yaml:9: head.norm_eps: has no effect",
        ),
        ([("image_size", "head: {norm: affine, norm_eps: 1e-3}\nimage_size")], "effect: head.norm is affine"),
        (
            [("image_size", "head: {norm: none, order: norm_pool}\nimage_size")],
            "mine.yaml:7: head.order: has no effect",
        ),
    ],
)
def test_a_key_without_effect_is_named_with_its_place(tmp_path, changes, message):
    text = GOOD
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_model_config(write(tmp_path, text))


def test_a_default_without_effect_is_no_mistake(tmp_path):
    text = GOOD.replace("[pooling, attention]", "identity").replace(
        "head_dim: 16", "head_dim: 32\nspatial_hidden: null"
    )
    config = load_model_config(write(tmp_path, text + "conv_expansion: 2.0\nhead: {mlp_norm_eps: 1e-5}\n"))
    assert config.head_dim == 32


def test_an_override_without_effect_is_refused_and_what_it_left_behind_is_not():
    config = load_model_config(CONFIGS / "models" / "caformer_n4.yaml")
    assert config.head_dim == 16 and config.conv_kernel_size == 3
    pooling = override_config(config, {"token_mixer": "pooling", "pool_size": 5}, "test")
    assert pooling.head_dim == 16, "lost its effect by another key"
    # a run's config.yaml and config.json hold every key
    assert override_config(config, pooling.model_dump(), "test") == pooling
    assert MetaFormerConfig.model_validate(pooling.model_dump()) == pooling
    with pytest.raises(ConfigError, match=r"^test: head_dim: has no effect: no stage's token_mixer is attention$"):
        override_config(config, {"token_mixer": "pooling", "head_dim": 8}, "test")
    with pytest.raises(ConfigError, match=r"^test: head\.mlp_norm_eps: has no effect: head\.kind is linear$"):
        override_config(config, {"head": {"mlp_norm_eps": 1e-6}}, "test")


def test_overrides_may_be_tuples_and_numbers_of_numpy():
    config = load_model_config(CONFIGS / "models" / "caformer_n4.yaml")
    given = {"depths": (1, np.int64(2)), "image_size": (32, 48), "num_classes": np.int32(3), "in_chans": np.int64(1),
             "mlp_ratio": np.float32(0.5), "drop_rate": np.float64(0.25), "head": {"norm_eps": np.float64(1e-3)}}  # fmt: skip
    changed = override_config(config, given, "test")
    plain = {"depths": [1, 2], "image_size": [32, 48], "num_classes": 3, "in_chans": 1, "mlp_ratio": 0.5,
             "drop_rate": 0.25, "head": {"norm_eps": 1e-3}}  # fmt: skip
    assert changed == override_config(config, plain, "test")
    assert yaml.safe_load(yaml.safe_dump(changed.model_dump())) == changed.model_dump()
    for value in (np.array(3.5), True, np.True_):
        with pytest.raises(ConfigError, match=r"num_classes: expected an integer, got "):
            override_config(config, {"num_classes": value}, "test")
    with pytest.raises(ConfigError, match=r'depths: expected a list, got "ndarray \[1 1\]"'):
        override_config(config, {"depths": np.array([1, 1])}, "test")


def test_published_facts_follow_the_weights():
    config = load_model_config(CONFIGS / "models" / "caformer_s18.yaml")
    assert config.published_for("sail_in1k") == config.published
    tuned = config.published_for("sail_in1k_384")
    assert tuned is not None and config.published is not None
    assert (tuned.top1, tuned.macs, tuned.drop_path_rate, tuned.finetune_384) == (85.0, 13.4, 0.3, None)
    assert (tuned.params, tuned.source) == (config.published.params, config.published.source)
    assert config.published_for("sail_in22k_ft_in1k_384") is None and config.published_for("sail_in22k") is None
    deit = load_model_config(CONFIGS / "models" / "deit3_base_patch16_224.yaml")
    assert deit.published_for("fb_in22k_ft_in1k") is None


def test_overrides_merge_into_sections():
    config = load_model_config(CONFIGS / "models" / "poolformer_s12.yaml", {"head": {"norm_eps": 1e-3}})
    assert (config.head.order, config.head.norm, config.head.norm_eps) == ("norm_pool", "group_norm", 1e-3)
    changed = override_config(config, {"head": {"order": "pool_norm"}, "depths": [1, 1, 1, 1]}, "test")
    assert (changed.head.order, changed.head.norm_eps, changed.depths) == ("pool_norm", 1e-3, [1, 1, 1, 1])
    assert config.head.order == "norm_pool"
    for word in ("input_size", "img_size"):
        with pytest.raises(ConfigError, match=f"^test: {word}: unknown key; did you mean 'image_size'"):
            override_config(config, {word: 32}, "test")
    with pytest.raises(ConfigError, match=r"test: head\.ordr: unknown key; did you mean 'head\.order'"):
        override_config(config, {"head": {"ordr": "pool_norm"}}, "test")


def test_a_config_survives_yaml_and_is_read_only():
    for path in FILES:
        config = load_model_config(path)
        assert override_config(config, yaml.safe_load(yaml.safe_dump(config.model_dump())), "test") == config
    with pytest.raises(ValueError, match="frozen"):
        config.depths = [1]
