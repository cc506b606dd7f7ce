"""models/timm_facts.py: names of timm's and torchvision's models, and what they tell without a model being built."""

import pytest
import torchvision

from files.errors import ConfigError
from models import create_model, is_model, list_models, register_with_timm
from models.factory import model_facts
from models.timm_facts import is_foreign, split_name


def test_names_are_listed_by_their_library() -> None:
    assert list_models("timm/convnext_att?") == ["timm/convnext_atto"]
    assert list_models("torchvision/resnet1?") == ["torchvision/resnet18"]
    assert "timm/resnet18.a1_in1k" in list_models("timm/resnet18.*")
    assert list_models("torchvision/resnet50.*")[0] == "torchvision/resnet50.IMAGENET1K_V1"
    assert not any(is_foreign(name) for name in list_models())
    assert is_model("timm/resnet18") and is_model("timm/resnet18.a1_in1k") and not is_model("torchvision/resnet19")
    assert split_name("timm/resnet18.a1_in1k") == ("timm", "resnet18", "a1_in1k")


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "timm/convnext_ato": "did you mean 'timm/convnext_atto'",
        "torchvision/resnet19": "did you mean 'torchvision/resnet18'",
        "resnet18": "did you mean 'timm/resnet18'",
        "timm/": r"unknown model 'timm/'; `python -m models 'timm/\*'` lists them",
        "timm/.a1_in1k": r"unknown model 'timm/.a1_in1k'; `python -m models 'timm/\*'` lists them",
        "torchvision/": r"unknown model 'torchvision/'; `python -m models 'torchvision/\*'` lists them",
        "torchvision/v": r"unknown model 'torchvision/v'; `python -m models",
        "timm/resnet18.a1_in": "did you mean 'a1_in1k'",
        "torchvision/resnet18.V2": "it has: IMAGENET1K_V1",
    }.items(),
)
def test_unknown_names_suggest_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_model(name)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/resnet18", "torchvision/convnext_tiny"])
def test_the_facts_are_what_the_model_will_carry(name: str) -> None:
    arguments = {"num_classes": 5, "in_chans": 1, "image_size": 64, "crop_pct": 0.8}
    facts = model_facts(name, **arguments)
    cfg = create_model(name, **arguments).pretrained_cfg
    assert {key: cfg[key] for key in facts.pretrained_cfg} == facts.pretrained_cfg
    assert cfg["input_size"] == (1, 64, 64) and cfg["num_classes"] == 5 and cfg["crop_pct"] == 0.8
    assert cfg["mean"] == pytest.approx((0.449,) if "vit" not in name else (0.5,), abs=1e-3)
    again = model_facts(name, num_classes=5, **facts.arguments)
    assert again == facts


def test_torchvision_facts_are_those_of_its_weights() -> None:
    cfg = model_facts("torchvision/resnet50.IMAGENET1K_V1").pretrained_cfg
    assert cfg["input_size"] == (3, 224, 224) and cfg["crop_pct"] == 224 / 256 and cfg["interpolation"] == "bilinear"
    assert cfg["num_classes"] == 1000 and cfg["mean"] == (0.485, 0.456, 0.406)
    assert model_facts("torchvision/resnet50").pretrained_cfg["crop_pct"] == pytest.approx(224 / 232)


def test_every_name_has_facts() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        assert model_facts(f"torchvision/{name}").pretrained_cfg["num_classes"] == 1000
    register_with_timm()
    names = list_models("timm/*")
    assert len(names) > 1000 and "timm/dpz_caformer_s18" not in names  # ours has a name of its own
    for name in names:
        assert len(model_facts(name).pretrained_cfg["input_size"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": "a"}, "image_size: expected"),
        ({"img_size": 32, "image_size": 64}, "img_size is 32, but image_size is 64"),
        ({"features_only": True}, "only classifiers"),
        ({"stochastic_depth_prob": 0.2}, "stochastic_depth_prob: the rate of stochastic depth is drop_path_rate"),
        ({"checkpoint_path": "x"}, "did you mean 'checkpoint'"),
        ({"mean": [0.1, 0.2]}, "mean: must have one value"),
        ({"crop_pct": 2.0}, "crop_pct"),
    ],
)
def test_wrong_facts_are_refused(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        model_facts("timm/vit_tiny_patch16_224", **arguments)


def test_our_models_tell_the_same_way() -> None:
    facts = model_facts("poolformer_s12", num_classes=3)
    assert facts.drop_path_rate == 0.1 and facts.pretrained_cfg["num_classes"] == 3
    assert model_facts("poolformer_s12", num_classes=3, **facts.arguments) == facts
