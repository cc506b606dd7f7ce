"""models/published.py: published weights come through timm's hub code, its cache and its offline behaviour."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from configs import CONFIGS
from files.errors import ConfigError
from models.factory import create_model
from tests.models.parts import randomised, relative


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
        "classifier of 1,000 classes replaced by a new one of 5",
    ]
    assert ours.pretrained_cfg["input_size"] == (1, 384, 384) and ours.num_classes == 5
    assert ours.pretrained_cfg["tag"] == "sail_in22k_ft_in1k_384"
    state = theirs.state_dict()
    assert torch.equal(ours.stem.conv.weight, state["stem.conv.weight"].sum(dim=1, keepdim=True))
    assert torch.equal(ours.head.fc.fc1.weight, state["head.fc.fc1.weight"])  # type: ignore[union-attr]


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
        ("WARNING", "classifier of 1,000 classes replaced by a new one of 5"),
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
