"""models/loading.py: weights are loaded whole or not at all, of every form that is read; what does not fit is refused."""

import json
import logging
import re
import shlex

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from files.errors import ConfigError
from models.factory import create_model
from models.layouts import timm_head
from models.loading import load_into
from models.registry import model_config
from tests.models.parts import in_original_layout, randomised, relative


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
