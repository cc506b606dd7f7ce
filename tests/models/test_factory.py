"""models/factory.py: what create_model builds, from which weights, and what it refuses without half a change."""

import logging
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import timm
import torch

from configs import CONFIGS
from files.errors import ConfigError
from layers.drop_path import DropPath
from models.config import HeadConfig, MetaFormerConfig, PatchConfig, override_config
from models.counting import count_parameters
from models.factory import class_difference, class_names_of, create_model, set_class_names, trained_class_names
from models.loading import trained_config
from models.metaformer import MetaFormerBlock
from models.registry import model_config, register_model, unregister_model
from models.timm_registry import register_with_timm
from models.weights import load_weights, save_weights

SMALL = "caformer_n4"


def saved(folder, name=SMALL, **overrides):
    """A folder as a run writes it to `best`, and the model in it."""
    model = create_model(name, **overrides)
    save_weights(folder / "best", model.state_dict(), {"model": model.config.model_dump()})
    return folder / "best", model


def equal(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- building ---------------------------------------------------------------------------------------------------------


def test_defaults():
    model = create_model("poolformer_n4")
    assert model.training and model.num_classes == 1000 and model.config.in_chans == 3
    drop_paths = [m for m in model.modules() if isinstance(m, DropPath)]
    assert {d.drop_prob for d in drop_paths} == {0.0} and {d.mode for d in drop_paths} == {"mask"}


def test_a_path_is_a_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "models" / "caformer_n4.yaml").read_text())
    torch.manual_seed(0)
    mine = create_model(str(path))
    torch.manual_seed(0)
    assert equal(mine.state_dict(), create_model(SMALL).state_dict()) and mine.config.name == "mine"


def test_overrides_reach_the_model():
    model = create_model(
        "poolformer_n4", num_classes=7, in_chans=4, drop_path_rate=0.5, drop_path_mode="skip", depths=[1, 3],
        head={"order": "pool_norm"}, act="silu",
    )  # fmt: skip
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 7)
    assert model.depths == (1, 3) and not model.head.norm_first and model.config.head.norm == "group_norm"
    *_, last = (m for m in model.modules() if isinstance(m, MetaFormerBlock))
    assert last.drop_path2.drop_prob == 0.5 and last.drop_path2.mode == "skip"
    assert isinstance(last.mlp.act, torch.nn.SiLU)


def test_the_same_seed_gives_the_same_weights_at_every_rate():
    torch.manual_seed(0)
    a = create_model(SMALL)
    torch.manual_seed(0)
    b = create_model(SMALL, drop_path_rate=0.5, drop_path_mode="batch")
    assert equal(a.state_dict(), b.state_dict())


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        model = create_model("caformer_b36", drop_path_rate=0.3)
    assert all(p.is_meta for p in model.parameters())


def test_count_parameters():
    model = create_model("randformer_s12", depths=[1, 1, 1, 1], image_size=64)
    assert count_parameters(model)[1] == 16**2 + 4**2
    assert sum(count_parameters(model)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "caformer_n5"}, "unknown model 'caformer_n5'; did you mean 'caformer_n4'?"),
        (
            {"drop_path": 0.1},
            "model caformer_n4: drop_path: unknown key; a rate is no part of a model: it is drop_path_r",
        ),
        ({"depth": [1, 1]}, "model caformer_n4: depth: unknown key; did you mean 'depths'?"),
        ({"head": {"knid": "mlp"}}, "model caformer_n4: head.knid: unknown key; did you mean 'head.kind'?"),
        ({"head_dim": 24}, "model caformer_n4: head_dim: dims[1] = 64 is not divisible by head_dim 24"),
        ({"depths": [1, 1, 1]}, "model caformer_n4: dims: has 2 entries, depths has 3 stages"),
        ({"token_mixer": ["pooling"]}, "model caformer_n4: token_mixer: has 1 entry, depths has 2 stages"),
        ({"token_mixer": "atention"}, "did you mean 'attention'"),
        ({"name": "../../etc/passwd"}, "unknown model '../../etc/passwd'"),
        ({"in_chans": 0}, "model caformer_n4: in_chans: must be at least 1, got 0"),
        ({"num_classes": -1}, "model caformer_n4: num_classes: must be at least 0, got -1"),
        ({"num_classes": "10"}, "model caformer_n4: num_classes: expected an integer"),
        ({"drop_path_rate": 1.5}, "model caformer_n4: "),
        ({"drop_path_rate": float("nan")}, "model caformer_n4: "),
        ({"drop_path_rate": torch.linspace(0, 0.1, 4)}, "model caformer_n4: rate must be a number"),
        ({"drop_path_mode": "skp"}, "model caformer_n4: mode must be one of mask, skip, batch, got 'skp'"),
        ({"pretrained": True, "checkpoint": "x"}, "pretrained=True and checkpoint are two sources of weights"),
        ({"pretrained": True}, "model 'caformer_n4' has no published weights in timm"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        create_model(**{"name": SMALL, **arguments})
    assert str(error.value).count("\n") <= 2


# ---- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pth", "state_dict", "model"])
def test_checkpoints_of_every_kind(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO, logger="models")
    path, source = saved(tmp_path, num_classes=5)
    state = source.state_dict()
    if kind == "safetensors":
        path = path / "model.safetensors"
    elif kind != "folder":
        path = tmp_path / "weights.pth"
        torch.save(state if kind == "pth" else {kind: state}, path)
    assert equal(create_model(SMALL, checkpoint=path, num_classes=5).state_dict(), state)
    assert equal(create_model(SMALL, checkpoint=str(path), num_classes=5).state_dict(), state)
    assert caplog.messages == [f"weights from {path}"] * 2


def test_fine_tuning_replaces_the_head_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="models")
    path, source = saved(tmp_path, num_classes=5, in_chans=1)
    model = create_model(SMALL, checkpoint=path, num_classes=3, in_chans=3, drop_path_rate=0.2)
    assert caplog.messages == [
        f"weights from {path}",
        "first convolution adapted from 1 to 3 input channels",
        "classifier of 5 classes replaced by a new one of 3",
    ]
    state = source.state_dict()
    changed = {k for k, v in model.state_dict().items() if v.shape != state[k].shape or not torch.equal(v, state[k])}
    assert changed == {"stem.conv.weight", "head.fc.weight", "head.fc.bias"}


def test_other_classes_are_refused_unless_named(tmp_path):
    path, _ = saved(tmp_path, num_classes=5)
    with pytest.raises(
        ConfigError, match=r"(?s)head.fc.weight has shape \[5, 64\], expected \[1000, 64\].*num_classes=5"
    ):
        create_model(SMALL, checkpoint=path)


def test_other_channels_are_refused_unless_named(tmp_path):
    path, _ = saved(tmp_path, num_classes=5, in_chans=1)
    with pytest.raises(ConfigError, match="the weights have 1 input channels: name in_chans to adapt them"):
        create_model(SMALL, checkpoint=path, num_classes=5)
    assert create_model(SMALL, checkpoint=path, num_classes=5, in_chans=3).config.in_chans == 3


def test_weights_of_another_architecture(tmp_path):
    path, _ = saved(tmp_path, num_classes=5)
    alone = shutil.copy(path / "model.safetensors", tmp_path / "alone.safetensors")
    for named in (path, path / "model.safetensors"):
        with pytest.raises(ConfigError, match=r"weights of 'caformer_n4', another architecture than 'poolformer_n4'"):
            create_model("poolformer_n4", checkpoint=named, num_classes=5)
    with pytest.raises(ConfigError, match=r"weights do not fit poolformer_n4: .* \(and \d+ more\)"):
        create_model("poolformer_n4", checkpoint=alone, num_classes=5)
    with pytest.raises(ConfigError, match=r"weights do not fit caformer_n4: depths was \[2, 2\], is \[2, 1\]$"):
        create_model(SMALL, checkpoint=path, num_classes=5, depths=[2, 1])
    with pytest.raises(ConfigError, match=r"stages\.1\.blocks\.1\..* is not in the model \(and 7 more\)"):
        create_model(SMALL, checkpoint=alone, num_classes=5, depths=[2, 1])


def test_equal_shapes_of_another_token_mixer_are_refused(tmp_path):
    path, _ = saved(tmp_path, token_mixer="identity")
    assert create_model(SMALL, token_mixer=["identity", "identity"], checkpoint=path) is not None
    with pytest.raises(ConfigError, match="token_mixer was identity, is pooling"):
        create_model(SMALL, token_mixer="pooling", checkpoint=path)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("caformer_n4", {"head_dim": 32}, "head_dim was 16, is 32"),
        ("caformer_n4", {"act": "gelu"}, "act was star_relu, is gelu"),
        ("poolformer_n4", {"act": "relu"}, "act was gelu, is relu"),
        ("poolformer_n4", {"pool_size": 5}, "pool_size was 3, is 5"),
        ("poolformer_n4", {"norm": "layer_norm"}, "norm was group_norm, is layer_norm"),
        ("poolformer_n4", {"norm": ["group_norm", "affine"]}, r"norm was group_norm, is \['group_norm', 'affine'\]"),
        ("poolformer_n4", {"stem": {"stride": 4}}, "stem.stride was 2, is 4"),
        ("poolformer_n4", {"stem": {"padding": 0}}, "stem.padding was 1, is 0"),
        ("poolformer_n4", {"downsample": {"stride": 1}}, "downsample.stride was 2, is 1"),
        ("convformer_n4", {"conv_kernel_size": 5}, "conv_kernel_size was 3, is 5"),
        ("deit_tiny_patch16_224", {"pos_embed": "none"}, "pos_embed was all, is none"),
    ],
)
def test_what_shapes_do_not_tell_is_refused(tmp_path, name, override, message):
    path, _ = saved(tmp_path, name)
    with pytest.raises(ConfigError, match=rf"best: weights do not fit {name}: {message}$"):
        create_model(name, checkpoint=path, **override)


FREE = {"name", "num_classes", "in_chans", "image_size", "layer_scale", "res_scale", "drop_rate", "pretrained"}
SAID = {"crop_pct", "interpolation", "mean", "std"}
PATCH = {"kernel_size": 5, "stride": 4, "padding": 2, "norm": "affine"}
OTHER = {  # another value of every other key of the schema, by a model in which it has an effect
    SMALL: {
        "depths": [2, 3], "dims": [32, 96], "token_mixer": "sep_conv", "norm": "affine", "act": "gelu", "mlp_ratio": 3.0,
        "mlp_bias": True, "conv_kernel_size": 5, "conv_expansion": 3.0, "head_dim": 32, "qkv_bias": True,
        "proj_bias": True, "stem": PATCH, "downsample": PATCH,
        "head": {"order": "norm_pool", "norm": "affine", "norm_eps": 0.1, "kind": "mlp"},
    },
    "poolformer_n4": {"pool_size": 5},
    "deit_tiny_patch16_224": {"pos_embed": "patches", "head": {"pool": "avg"}},
    "vit_wee_patch16_reg1_gap_256": {"class_token": True, "register_tokens": 2},
    "mixer_s32_224": {"spatial_hidden": None},
    "convformer_s18": {"head": {"mlp_norm_eps": 0.1}},
}  # fmt: skip


def test_every_key_of_the_schema_is_compared(tmp_path):
    compared = set()
    for name, others in OTHER.items():
        config = model_config(name)
        shape = {"depths": [1] * len(config.depths), "image_size": config.image_size}
        weights = create_model(name, **shape).state_dict()
        for key, value in others.items():
            for part, other in value.items() if isinstance(value, dict) else [("", value)]:
                said = override_config(config, {**shape, key: {part: other} if part else other}, "").model_dump()
                save_weights(tmp_path / "best", weights, {"model": said})
                with pytest.raises(ConfigError, match=rf"best: weights do not fit {name}: {key}\.?{part} was "):
                    create_model(name, checkpoint=tmp_path / "best", **shape)
                compared.add(f"{key}.{part}".strip("."))
    sections = {"stem": PatchConfig, "downsample": PatchConfig, "head": HeadConfig}
    keys = {f"{key}.{part}" for key, section in sections.items() for part in section.model_fields}
    assert compared == keys | MetaFormerConfig.model_fields.keys() - sections.keys() - FREE - SAID - {"published"}


def test_only_what_the_user_names_of_the_head_may_differ(tmp_path, caplog):
    name, head = "poolformer_n4", {"order": "pool_norm", "norm": "layer_norm"}
    path, _ = saved(tmp_path, name, head=head)
    with pytest.raises(
        ConfigError,
        match=r"head.order was pool_norm, is norm_pool \(and 1 more\)\n.* name it: head={'order': 'norm_pool'}$",
    ):
        create_model(name, checkpoint=path)
    caplog.set_level(logging.WARNING, logger="models")
    create_model(name, checkpoint=path, head=head)
    assert caplog.messages == []
    create_model(name, checkpoint=path, head={"order": "norm_pool", "norm": "group_norm"})
    assert caplog.messages == [
        "head.order is norm_pool, in the model of the weights it was pool_norm",
        "head.norm is group_norm, in the model of the weights it was layer_norm",
    ]


def test_other_images_are_said(tmp_path, caplog):
    path, _ = saved(tmp_path, in_chans=1, mean=[0.3], std=[0.2], layer_scale=None, drop_rate=0.5)
    caplog.set_level(logging.WARNING, logger="models")
    create_model(SMALL, checkpoint=path, in_chans=1, mean=[0.3], std=[0.2], image_size=64)
    assert caplog.messages == []
    create_model(SMALL, checkpoint=path, in_chans=1, crop_pct=0.9)
    assert caplog.messages == [
        "crop_pct is 0.9, in the model of the weights it was 1.0",
        "mean is [0.5], in the model of the weights it was [0.3]",
        "std is [0.5], in the model of the weights it was [0.2]",
    ]
    caplog.clear()
    create_model(SMALL, checkpoint=path, in_chans=3)
    assert caplog.messages == ["first convolution adapted from 1 to 3 input channels"]


def test_as_many_positions_in_other_rows_are_refused(tmp_path):
    shape: dict = {"depths": [1], "image_size": [32, 128]}
    for name in ("deit_tiny_patch16_224", "resmlp_12_224"):
        path, _ = saved(tmp_path, name, **shape)
        for size in ([128, 32], 64):
            with pytest.raises(ConfigError, match=re.escape(f"image_size was [32, 128], is {size}")):
                create_model(name, checkpoint=path, depths=[1], image_size=size)
        assert create_model(name, checkpoint=path, **shape) is not None
    path, _ = saved(tmp_path, image_size=[32, 128])  # has no positions of its own
    assert create_model(SMALL, checkpoint=path, image_size=64) is not None


def test_what_was_changed_is_seen_in_plain_python(tmp_path):
    path, _ = saved(tmp_path, num_classes=5)
    code = f"import models; models.create_model({SMALL!r}, checkpoint={str(path)!r}, num_classes=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (done.returncode, done.stderr) == (0, "classifier of 5 classes replaced by a new one of 3\n")


def test_a_model_of_ones_own_takes_the_weights_of_its_origin(tmp_path):
    path, source = saved(tmp_path)
    register_model(source.config, "mine")
    try:
        assert equal(create_model("mine", checkpoint=path).state_dict(), source.state_dict())
    finally:
        unregister_model("mine")


# ---- the model that weights are of ------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True, "both"])  # False is timm's default
def test_a_folder_of_our_model_in_timm_is_a_checkpoint(tmp_path, caplog, safe):
    register_with_timm()
    size: dict = {"num_classes": 5, "in_chans": 1, "img_size": 48}
    theirs = timm.create_model("dpz_convformer_n4", depths=[1, 2], **size)
    timm.models.save_for_hf(theirs, str(tmp_path / "hub"), safe_serialization=safe)
    assert (tmp_path / "hub" / "pytorch_model.bin").exists() == (safe is not True)
    caplog.clear()
    _, said = load_weights(tmp_path / "hub")
    config = trained_config(said or {}, "hub")
    assert config is not None and config.name == "convformer_n4" and config.depths == [1, 2]
    assert (config.num_classes, config.in_chans, config.height_width) == (5, 1, (48, 48))
    ours = create_model("convformer_n4", checkpoint=tmp_path / "hub", num_classes=5, in_chans=1, depths=[1, 2])
    assert equal(ours.state_dict(), theirs.state_dict()) and caplog.messages == []
    with pytest.raises(ConfigError, match=r"weights do not fit convformer_n4: depths was \[1, 2\], is \[2, 2\]"):
        create_model("convformer_n4", checkpoint=tmp_path / "hub", num_classes=5, in_chans=1)
    with pytest.raises(ConfigError, match="weights of 'convformer_n4', another architecture than 'caformer_n4'"):
        create_model("caformer_n4", checkpoint=tmp_path / "hub", num_classes=5)


def test_the_model_of_a_folder(tmp_path):
    _, source = saved(tmp_path, num_classes=5, depths=[1, 3])
    assert trained_config(load_weights(tmp_path / "best")[1] or {}, "best") == source.config
    theirs = {
        "architecture": "poolformer_s12",
        "num_classes": 5,
        "model_args": {"in_chans": 1},
        "pretrained_cfg": {
            "input_size": [3, 96, 64],
            "crop_pct": 0.5,
            "interpolation": "random",
            "mean": [0.5],
            "tag": "x",
        },
    }
    config, shipped = trained_config(theirs, "folder"), model_config("poolformer_s12")
    assert config is not None and (config.num_classes, config.in_chans, config.image_size) == (5, 1, [96, 64])
    assert (config.crop_pct, config.mean, config.interpolation) == (0.5, [0.5], shipped.interpolation)
    assert (config.head.order, config.head.norm, config.depths) == ("pool_norm", "layer_norm", shipped.depths)
    assert trained_config({}, "folder") is None and trained_config({"architecture": 3, "model": "x"}, "folder") is None
    for said, message in (
        (
            {"architecture": "caformer_s81"},
            "weights of 'caformer_s81', which is not in the zoo; did you mean 'caformer_s18'",
        ),
        ({"architecture": "samvit_base_patch16_224"}, "which is not in the zoo"),
        ({"architecture": "caformer_s18", "num_classes": "5"}, "model caformer_s18: num_classes: expected an integer"),
        ({"model": {"depths": "many"}}, "model: depths: expected a list"),
        ({"model": {"layers": 3}}, "model: "),
    ):
        with pytest.raises(ConfigError, match=f"^folder: .*{message}"):
            trained_config(said, "folder")


class Malicious:
    def __reduce__(self):
        return (warnings.warn, ("this code ran",))


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "pickle", "suffix"])
def test_damaged_weights_are_refused(tmp_path, damage, recwarn):
    path, _ = saved(tmp_path)
    file = path / "model.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        path = tmp_path / "bset"
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "pickle":
        path = tmp_path / "weights.pth"
        torch.save({"stem.conv.weight": Malicious()}, path)
    else:
        path = tmp_path / "weights.npz"
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        create_model(SMALL, checkpoint=path)
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).count("\n") <= 2
    assert not any("this code ran" in str(w.message) for w in recwarn)


def test_half_precision_weights_are_cast(tmp_path):
    _, source = saved(tmp_path)
    half = {k: v.half() for k, v in source.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    model = create_model(SMALL, checkpoint=tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(v, half[k].float()) for k, v in model.state_dict().items())


# ---- names of classes -------------------------------------------------------------------------------------------------

PETS = ["cat", "dog", "fox"]


def named(folder, names=PETS, *, key="class_names"):
    """A folder of weights that names its classes, as a run leaves it."""
    model = create_model(SMALL, num_classes=len(PETS))
    save_weights(folder / "best", model.state_dict(), {"model": model.config.model_dump(), key: names})
    return folder / "best", model


def test_names_set_the_number_of_classes_and_are_kept():
    model = create_model(SMALL, class_names=PETS)
    assert model.num_classes == 3 and class_names_of(model) == PETS == model.pretrained_cfg["label_names"]
    assert class_names_of(create_model(SMALL, num_classes=5, class_names=PETS)) == PETS, "logits without a class"
    assert class_names_of(create_model(SMALL)) is None
    model.reset_classifier(3)
    assert class_names_of(model) is None, "a new classifier has no names yet"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "'a' is given twice"),
        (["a", ""], "must be a list of names, got ''"),
        (["a", 3], "must be a list of names, got 3"),
        ("ab", "must be a list of names, got 'ab'"),
        (3, "must be a list of names, got 3"),
        (True, "must be a list of names, got True"),
        ({"a": 1}, "must be a list of names, got {'a': 1}"),
        ([], r"must be a list of names, got \[\]"),
        (list("abcd"), "4 names for a model of 3 classes"),
    ],
)
def test_names_that_cannot_be(names, words):
    with pytest.raises(ConfigError, match=f"class_names: {words}"):
        create_model(SMALL, num_classes=3, class_names=names)
    if "must be" in words:
        with pytest.raises(ConfigError, match=f"class_names: {words}"):
            create_model(SMALL, class_names=names)
    model = create_model(SMALL, class_names=PETS)
    with pytest.raises(ConfigError, match=words):
        set_class_names(model, names)
    assert class_names_of(model) == PETS


def test_weights_bring_their_names(tmp_path):
    folder, model = named(tmp_path)
    again = create_model(model.config, checkpoint=folder)
    assert class_names_of(again) == PETS and equal(again.state_dict(), model.state_dict())
    assert class_names_of(create_model(SMALL, checkpoint=folder, num_classes=4)) is None, "a new classifier"
    assert class_names_of(create_model(SMALL, checkpoint=folder, num_classes=3)) == PETS
    same = create_model(SMALL, checkpoint=folder, class_names=PETS)
    assert equal(same.state_dict(), model.state_dict())


@pytest.mark.parametrize("key", ["class_names", "label_names"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "dog", "hen"], "classes gone: 'fox', new: 'hen'"),
        (["dog", "cat", "fox"], "the same classes in another order: class 0 was 'cat', is 'dog'"),
    ],
)
def test_other_classes_of_the_same_number_get_a_new_classifier(tmp_path, caplog, names, words, key):
    folder, model = named(tmp_path, key=key)
    tuned = create_model(SMALL, checkpoint=folder, class_names=names)
    before, after = model.state_dict(), tuned.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed and all(k.startswith("head.fc.") for k in changed)
    assert f"classifier of 3 classes replaced by a new one of 3, though of as many: {words}" in caplog.text
    assert class_names_of(tuned) == names


def test_names_are_not_compared_where_there_are_none(tmp_path, caplog):
    folder, model = saved(tmp_path, num_classes=3)
    tuned = create_model(SMALL, checkpoint=folder, class_names=PETS)
    assert equal(tuned.state_dict(), model.state_dict()) and class_names_of(tuned) == PETS
    assert "replaced" not in caplog.text
    folder, _ = named(tmp_path / "more")
    create_model(SMALL, checkpoint=folder, class_names=["cat", "dog"])
    assert "classifier of 3 classes replaced by a new one of 2" in caplog.text
    assert "as many" not in caplog.text


def test_how_names_differ():
    assert class_difference(PETS, PETS) is None and class_difference(PETS, tuple(PETS)) is None
    many = [f"n{i}" for i in range(9)]
    assert class_difference([], many) == "classes new: 'n0', 'n1', 'n2', 'n3', 'n4' and 4 more"
    assert class_difference(PETS, PETS[:1]) == "classes gone: 'dog', 'fox'"
    for wrong in (
        {},
        {"class_names": "cat"},
        {"class_names": [1, 2]},
        {"label_names": {"0": "cat"}},
        {"class_names": []},
    ):
        assert trained_class_names(wrong) is None
