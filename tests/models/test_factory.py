"""models/factory.py: what create_model builds, from which weights, and what it refuses without half a change."""

import logging
import re
import warnings

import pytest
import safetensors.torch
import torch

from configs import CONFIGS
from layers.drop_path import DropPath
from models.factory import count_parameters, create_model
from models.metaformer import MetaFormerBlock
from models.registry import register_model, unregister_model
from models.strict_yaml import ConfigError
from models.weights import save_weights

SMALL = "caformer_n4"


def saved(folder, **overrides):
    """A folder as a run writes it to `best`, and the model in it."""
    model = create_model(SMALL, **overrides)
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
        ({"token_mixer": ["pooling"]}, "model caformer_n4: token_mixer: has 1 entries, depths has 2 stages"),
        ({"token_mixer": "atention"}, "did you mean 'attention'"),
        ({"name": "../../etc/passwd"}, "unknown model '../../etc/passwd'"),
        ({"in_chans": 0}, "model caformer_n4: in_chans: must be at least 1, got 0"),
        ({"num_classes": -1}, "model caformer_n4: num_classes: must be at least 0, got -1"),
        ({"num_classes": "10"}, "model caformer_n4: num_classes: expected an integer"),
        ({"drop_path_rate": 1.5}, "model caformer_n4: "),
        ({"drop_path_rate": float("nan")}, "model caformer_n4: "),
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
    with pytest.raises(ConfigError, match=r"weights of 'caformer_n4', another architecture than 'poolformer_n4'"):
        create_model("poolformer_n4", checkpoint=path, num_classes=5)
    with pytest.raises(ConfigError, match=r"weights do not fit poolformer_n4: .* \(and \d+ more\)"):
        create_model("poolformer_n4", checkpoint=path / "model.safetensors", num_classes=5)
    with pytest.raises(ConfigError, match=r"stages\.1\.blocks\.1\..* is not in the model \(and 7 more\)"):
        create_model(SMALL, checkpoint=path, num_classes=5, depths=[2, 1])


def test_equal_shapes_of_another_token_mixer_are_refused(tmp_path):
    path, _ = saved(tmp_path, token_mixer="identity")
    assert create_model(SMALL, token_mixer=["identity", "identity"], checkpoint=path) is not None
    with pytest.raises(ConfigError, match="token_mixer was identity, is pooling"):
        create_model(SMALL, token_mixer="pooling", checkpoint=path)


def test_settings_that_shapes_do_not_tell_are_said(tmp_path, caplog):
    path, _ = saved(tmp_path)
    caplog.set_level(logging.INFO, logger="models")
    create_model(SMALL, checkpoint=path, head_dim=32)
    assert caplog.messages == [f"weights from {path}", "head_dim is 32, the weights were trained with 16"]


def test_a_model_of_ones_own_takes_the_weights_of_its_origin(tmp_path):
    path, source = saved(tmp_path)
    register_model(source.config, "mine")
    try:
        assert equal(create_model("mine", checkpoint=path).state_dict(), source.state_dict())
    finally:
        unregister_model("mine")


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
