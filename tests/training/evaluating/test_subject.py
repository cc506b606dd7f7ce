"""What a user names as a model: found, or refused in words."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from files.errors import ConfigError
from models.factory import class_names_of, create_model
from models.weights import load_weights, save_weights, weights_sha256
from tests.training.evaluating.conftest import FLOWERS
from training.checkpoint import latest_checkpoint
from training.evaluating.subject import Choice, Subject, find_subject, image_spec

LAST, RAW = Choice(checkpoint="last"), Choice(ema=False)


def sha(subject: Subject) -> str:
    return weights_sha256(subject.build().state_dict())


def test_the_weights_of_a_run(digits_run: Path) -> None:
    newest = latest_checkpoint(digits_run / "checkpoints")
    assert newest is not None
    expected = {
        "best, average of weights": weights_sha256(load_weights(digits_run / "best")[0]),
        f"average of weights of step {newest.step}": weights_sha256(newest.shared["ema"]),
        f"raw weights of step {newest.step}": weights_sha256(newest.shared["model"]),
    }
    found = [find_subject(str(digits_run), choice) for choice in (Choice(), LAST, RAW)]
    assert {subject.weights: sha(subject) for subject in found} == expected
    assert len(set(expected.values())) >= 2, "so that a mix-up would be seen"
    for subject in found:
        assert subject.config is not None and subject.config.data.dataset == "digits"
        assert class_names_of(subject.build()) == [str(i) for i in range(10)]
        assert not subject.build().training


@pytest.mark.parametrize("place", ["best", "best/model.safetensors", "checkpoints/*"])
def test_what_lies_in_a_run_knows_its_data(place: str, digits_run: Path) -> None:
    path = sorted(digits_run.glob(place))[-1]
    subject = find_subject(str(path), Choice())
    assert subject.config is not None and subject.config.data.dataset == "digits"
    subject.build()


def test_size_and_crop_are_what_the_user_says(digits_run: Path) -> None:
    for choice in (Choice(image_size=12, crop_pct=0.9), Choice(checkpoint="last", image_size=12, crop_pct=0.9)):
        spec = image_spec(find_subject(str(digits_run), choice).build())
        assert spec.input_size == (1, 12, 12) and spec.crop_pct == 0.9
    spec = image_spec(find_subject("timm/test_vit", Choice(image_size=64)).build())
    assert spec.input_size == (3, 64, 64)


def test_a_folder_that_timm_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model: Any = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 64, 64), "mean": (0.4,), "std": (0.3,)}
    timm.models.save_for_hf(model, str(tmp_path), model_config={"label_names": FLOWERS}, safe_serialization=True)
    subject = find_subject(str(tmp_path), Choice())
    assert subject.source == "timm/test_resnet"
    built = subject.build()
    spec = image_spec(built)
    assert (spec.input_size, spec.mean, class_names_of(built)) == ((1, 64, 64), (0.4,), FLOWERS)
    assert weights_sha256(built.state_dict()) == weights_sha256(model.state_dict())


@pytest.mark.parametrize("name", ["poolformer_s12", "timm/test_resnet"])
def test_bare_weights_take_the_model_that_is_named(name: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"depths": [1, 1, 1, 1]} if name == "poolformer_s12" else {}
    torch.save(create_model(name, num_classes=7, **arguments).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="--model NAME"):
        find_subject(str(tmp_path / "w.pth"), Choice())
    if name == "timm/test_resnet":
        assert find_subject(str(tmp_path / "w.pth"), Choice(model=name)).build().num_classes == 7
    else:
        with pytest.raises(ConfigError, match="weights do not fit"):
            find_subject(str(tmp_path / "w.pth"), Choice(model=name)).build()


@pytest.mark.parametrize(
    ("text", "choice", "parts"),
    [
        ("convformer_n5", {}, ["unknown model 'convformer_n5'", "did you mean 'convformer_n4'?"]),
        ("timm/resnet19", {}, ["unknown model 'timm/resnet19'", "did you mean 'timm/resnet18'?"]),
        ("RUN/../digit", {}, ["no such run, weights or model", "did you mean 'digits'?"]),
        ("RUN", {"pretrained": True}, ["--pretrained is for a model's name"]),
        ("RUN", {"model": "convformer_n4"}, ["leave out --model"]),
        ("RUN/best", {"ema": False}, ["no run folder", "--no-ema has no effect"]),
        ("convformer_n4", {"checkpoint": "last"}, ["no run folder", "--checkpoint last has no effect"]),
        ("convformer_n4", {"model": "convformer_n4"}, ["--model says which model weights are of"]),
        ("RUN/best/config.json", {}, ["cannot read weights from .json"]),
        ("swin", {}, ["unknown model 'swin'"]),
        ("torchvision/squeezenet1_1", {"image_size": 8}, ["takes no images of 8 x 8 pixels: "]),
        ("torchvision/vit_b_16", {"image_size": 225}, ["cannot be built so", "indivisible by patch size"]),
        ("RUN", {"image_size": 0}, ["--image-size: must be from 1 to 1048576 pixels"]),
        ("RUN", {"crop_pct": 1.2}, ["--crop-pct: must be in [0.01, 1], got 1.2"]),
        ("RUN", {"checkpoint": "best", "ema": False}, ["--no-ema takes the raw weights"]),
    ],
)
def test_mistakes(text: str, choice: dict, parts: list[str], digits_run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_subject(text.replace("RUN", str(digits_run)), Choice(**choice)).build()
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert len(str(caught.value).splitlines()) <= 3


def test_a_run_without_what_is_asked_for(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((digits_run / "config.yaml").read_bytes())
    for choice, told in ((Choice(), "no 'best' yet"), (LAST, "no whole checkpoint yet")):
        with pytest.raises(ConfigError, match=told):
            find_subject(str(tmp_path), choice)


def test_weights_of_another_model_are_refused(digits_run: Path, tmp_path: Path) -> None:
    state, saved = load_weights(digits_run / "best")
    assert saved is not None
    state.pop(sorted(state)[0])
    save_weights(tmp_path / "best", state, {k: v for k, v in saved.items() if not k.endswith("sha256")})
    with pytest.raises(ConfigError, match="weights do not fit"):
        find_subject(str(tmp_path / "best"), Choice()).build()
