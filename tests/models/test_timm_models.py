"""models/timm_models.py: models of timm and torchvision are built, changed, saved and loaded as ours are."""

from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from files.errors import ConfigError
from models.factory import class_names_of, create_model, saved_config
from models.loading import trained_foreign
from models.weights import load_weights, save_weights
from stochastic_depth.blocks import find_blocks
from stochastic_depth.setting import set_drop_path

SMALL: dict[str, Any] = {"image_size": 32, "in_chans": 1, "num_classes": 5}
IMAGES = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(folder: Path, name: str, **arguments: Any) -> tuple[Path, Any]:
    torch.manual_seed(1)
    model = create_model(name, **{**SMALL, **arguments}).eval()
    save_weights(folder / "best", model.state_dict(), saved_config(model))
    return folder / "best", model


@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/vit_tiny_patch16_224", "torchvision/resnet18"])
def test_what_is_saved_loads_here(name: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, name, class_names=list("abcde"))
    again = create_model(name, checkpoint=folder, **SMALL).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert class_names_of(again) == list("abcde")
    found = trained_foreign(load_weights(folder)[1] or {})
    assert found is not None and found[0] == name
    assert torch.equal(create_model(found[0], checkpoint=folder, **found[1]).eval()(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_what_is_saved_loads_in_timm(name: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, name, class_names=list("abcde"))
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(IMAGES), model(IMAGES))
    cfg = theirs.pretrained_cfg
    assert tuple(cfg["input_size"]) == (1, 32, 32) and list(cfg["label_names"]) == list("abcde")


def test_another_number_of_classes_replaces_the_classifier(tmp_path: Path, caplog) -> None:
    folder, model = saved(tmp_path, "timm/resnet18")
    other: Any = create_model("timm/resnet18", checkpoint=folder, image_size=32, in_chans=3, num_classes=3)
    assert other.num_classes == 3 and other(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert torch.equal(other.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    assert "classifier of 5 classes replaced by a new one of 3" in caplog.text
    assert "first convolution adapted from 1 to 3 input channels" in caplog.text
    with pytest.raises(ConfigError, match=r"weights have 5 classes: build with num_classes=5"):
        create_model("timm/resnet18", checkpoint=folder, in_chans=1)


def test_renamed_classes_replace_the_classifier(tmp_path: Path, caplog) -> None:
    folder, model = saved(tmp_path, "timm/resnet18", class_names=list("abcde"))
    other: Any = create_model("timm/resnet18", checkpoint=folder, in_chans=1, class_names=list("abcdf"))
    assert not torch.equal(other.fc.weight, model.fc.weight) and "though of as many" in caplog.text


def test_positions_of_another_size_are_resampled_and_that_is_said(tmp_path: Path, caplog) -> None:
    folder, _ = saved(tmp_path, "timm/vit_tiny_patch16_224")
    other: Any = create_model("timm/vit_tiny_patch16_224", checkpoint=folder, **{**SMALL, "image_size": 64})
    assert other.pos_embed.shape[1] == 17 and other(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    assert "pos_embed resampled from 1 x 5 x 192 to 1 x 17 x 192" in caplog.text


def test_a_layout_of_as_many_numbers_is_not_called_resampled(tmp_path: Path, caplog) -> None:
    """timm reads patches that were projected by a linear layer."""
    folder, model = saved(tmp_path, "timm/vit_tiny_patch16_224")
    state = model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    save_weights(folder, state, saved_config(model))
    again = create_model("timm/vit_tiny_patch16_224", checkpoint=folder, **SMALL).eval()
    assert torch.equal(again(IMAGES), model(IMAGES)) and "resampled" not in caplog.text


@pytest.mark.slow  # torchvision has no small one
def test_torchvisions_positions_are_resampled_as_torchvision_does(tmp_path: Path, caplog) -> None:
    folder, model = saved(tmp_path, "torchvision/vit_b_32", image_size=64)
    other: Any = create_model("torchvision/vit_b_32", checkpoint=folder, **{**SMALL, "image_size": 96})
    expected = interpolate_embeddings(96, 32, OrderedDict(model.state_dict()))["encoder.pos_embedding"]
    assert torch.equal(other.encoder.pos_embedding, expected) and expected.shape[1] == 10
    assert "encoder.pos_embedding resampled from 1 x 5 x 768 to 1 x 10 x 768" in caplog.text
    assert other.eval()(torch.zeros(1, 1, 96, 96)).shape == (1, 5)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "timm/resnet18")
    with pytest.raises(
        ConfigError, match="weights of 'timm/resnet18', another architecture than 'torchvision/resnet18'"
    ):
        create_model("torchvision/resnet18", checkpoint=folder, **SMALL)
    with pytest.raises(ConfigError, match="weights of 'resnet18', which is not in the zoo"):
        create_model("poolformer_s12", checkpoint=folder)


def test_ours_load_from_a_run_of_timms(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, "timm/caformer_s18")
    ours = create_model("caformer_s18", checkpoint=folder, head={"mlp_norm_eps": 1e-6}, **SMALL).eval()
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))


def test_the_rate_and_mode_are_set() -> None:
    model = create_model("timm/swin_tiny_patch4_window7_224", depths=(1, 1), image_size=56)
    assert model(torch.randn(2, 3, 56, 56)).shape == (2, 1000)
    rates = [getattr(m, "drop_prob", 0.0) for m in model.modules()]
    assert set(rates) == {0.0}, "timm's own default is 0.1, ours 0"
    model = create_model("torchvision/resnet18", drop_path_rate=0.2, drop_path_mode="skip", image_size=32)
    modules = [m for block in find_blocks(model) for m in block.drop_paths.values()]
    assert max(m.drop_prob for m in modules) == pytest.approx(0.2) and {m.mode for m in modules} == {"skip"}
    with pytest.raises(ConfigError, match="VGG has no residual block"):
        create_model("timm/vgg11", drop_path_rate=0.1)


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "swin_t", "maxvit_t"])
@pytest.mark.parametrize("rate", [None, 0.0])
def test_torchvisions_own_rates_are_no_default(name: str, rate: float | None) -> None:
    with torch.device("meta"):
        model = create_model(f"torchvision/{name}", drop_path_rate=rate)
    assert {m.p for m in model.modules() if isinstance(m, StochasticDepth)} == {0.0}


def test_a_rate_can_be_given_after_building_at_rate_0() -> None:
    model = create_model("torchvision/convnext_tiny", num_classes=5)
    assert set_drop_path(model, 0.3, input_size=(3, 32, 32)).rates[-1] == pytest.approx(0.3)
    rates = [m.drop_prob for block in find_blocks(model) for m in block.drop_paths.values()]
    assert rates[0] == 0.0 and rates[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_mode_given_at_rate_0_holds_for_rates_set_later(rate: float | None) -> None:
    model = create_model(
        "timm/vit_tiny_patch16_224", depth=2, image_size=32, drop_path_rate=rate, drop_path_mode="skip"
    )
    result = set_drop_path(model, 0.5)
    assert result.notes == ["4 drop-path modules: skips per branch"]
    assert create_model("timm/vgg11", num_classes=3, drop_path_rate=rate, drop_path_mode="skip").num_classes == 3


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "resnet18"])
def test_torchvisions_word_for_the_rate_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model torchvision/{name}: stochastic_depth_prob: .* drop_path_rate of"):
        create_model(f"torchvision/{name}", stochastic_depth_prob=0.2)


@pytest.mark.parametrize("rate", [None, 0.0, 0.1])
def test_a_wrong_mode_is_refused_at_every_rate(rate: float | None) -> None:
    with pytest.raises(ConfigError, match="model timm/resnet18: mode must be one of mask, skip, batch, got 'skpi'"):
        create_model("timm/resnet18", drop_path_rate=rate, drop_path_mode="skpi")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [False, "", True, 1.5])
def test_what_is_no_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"model torchvision/resnet18: rate must be a number in \[0, 1\], got"):
        create_model("torchvision/resnet18", drop_path_rate=rate)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "squeezenet1_0", "mobilenet_v3_small"])
def test_torchvisions_have_a_classifier_that_can_be_replaced(name: str) -> None:
    model = create_model(f"torchvision/{name}", num_classes=5, in_chans=1, image_size=64).eval()
    images = torch.randn(2, 1, 64, 64)
    assert model(images).shape == (2, 5) and model.num_classes == 5
    copied = deepcopy(model)
    copied.reset_classifier(3)
    assert copied(images).shape == (2, 3) and copied.pretrained_cfg["num_classes"] == copied.num_classes == 3
    assert model(images).shape == (2, 5), "a copy's classifier is its own"
    copied.reset_classifier(0)
    assert isinstance(copied.get_classifier(), torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("timm/convnext_atto", {"kernel_size": 3}, "unknown argument 'kernel_size'; did you mean 'kernel_sizes'"),
        ("torchvision/swin_t", {"drop_path_prob": 0.3}, "'drop_path_prob'; did you mean 'drop_path_rate'"),
        ("timm/vit_tiny_patch16_224", {"num_head": 3}, "unknown argument 'num_head'; did you mean 'num_heads'"),
        ("torchvision/resnet18", {"wdth": 3}, "unknown argument 'wdth'"),
        ("timm/test_resnet", {"input_size": 32}, "unknown argument 'input_size'; did you mean 'image_size'?"),
        ("timm/convnext_atto", {"depths": "a"}, "cannot be built so: TypeError"),
        ("torchvision/vit_b_16", {"image_size": [32, 64]}, "takes square images only"),
    ],
)
def test_wrong_arguments_are_refused(name, arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        create_model(name, **arguments)


def test_published_weights_that_cannot_be_had_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fail)
    with pytest.raises(ConfigError, match=r"published weights timm resnet18.a1_in1k could not be loaded: no network"):
        create_model("timm/resnet18", pretrained=True)
    with pytest.raises(ConfigError, match="unknown argument 'wdth'"):
        create_model("timm/resnet18", pretrained=True, wdth=2)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("timm/resnet18", {"num_classes": 5}, ["classifier of 1,000 classes replaced by a new one of 5"]),
        ("timm/resnet18", {"num_classes": 1000, "image_size": 96}, []),
        ("timm/vit_tiny_patch16_224.augreg_in21k", {"num_classes": 21843, "image_size": 96, "in_chans": 1},
         ["first convolution adapted from 3 to 1 input channels",
          "what belongs to positions resampled from images of 224 x 224 to 96 x 96"]),
        ("torchvision/resnet18", {"num_classes": 5, "in_chans": 2},
         ["first convolution adapted from 3 to 2 input channels",
          "classifier of 1,000 classes replaced by a new one of 5"]),
    ],
)  # fmt: skip
def test_what_a_library_adapts_of_published_weights_is_said(
    name: str, arguments: dict, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    from_timm, from_torchvision = timm.create_model, torchvision.models.get_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: from_timm(name, **rest))
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, **rest: from_torchvision(name, **rest))
    with caplog.at_level("INFO", logger="models"):
        create_model(name, pretrained=True, **arguments)
    assert caplog.messages == [f"published weights of {name}", *said]
    assert [record.levelname for record in caplog.records] == ["INFO", *["WARNING"] * len(said)]


def fail(*_: object, **__: object) -> None:
    raise OSError("no network")
