"""Both sides of a comparison compute the same and drop at the same rates, and it is noticed where they do not."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

from benchmarks import sides
from benchmarks.sides import Pair, Setting, build_model, build_side, check_equal, check_rates, make_pair
from files.errors import ConfigError, Failure
from layers.drop_path import DropPath

SETTINGS = [Setting(0.0), Setting(0.4), Setting(0.4, "constant")]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """ViT-Tiny on both sides."""
    return make_pair("vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def foreign() -> Pair:
    """A small model of timm, with our stochastic depth and its own."""
    return make_pair("timm/test_vit")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poolformer_s12", "convformer_s18", "timm/swin_tiny_patch4_window7_224"])
def test_sides_that_are_measured_compute_the_same(name: str) -> None:
    assert make_pair(name).foreign == name.startswith("timm/")


def test_names_are_looked_up_on_both_sides() -> None:
    for name, message in (
        ("caformer_n4", "timm has no such model"),
        ("timm/poolformer_s13", "timm has no such model"),
        ("poolformer_s13", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_pair(name)


def test_other_logits_are_noticed(pair: Pair) -> None:
    other = replace(pair, ours=copy.deepcopy(pair.ours))
    setattr(other.ours.head.norm, "eps", 1.0)  # noqa: B010
    with pytest.raises(Failure, match="logits differ by"):
        check_equal(other)


def test_other_gradients_are_noticed(pair: Pair) -> None:
    other = replace(pair, ours=copy.deepcopy(pair.ours))
    other.ours.head.drop = nn.Dropout(0.5)  # the same in evaluation
    with pytest.raises(Failure, match=r"gradients of .* differ by"):
        check_equal(other)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("which", ["pair", "foreign"])
def test_sides_have_equal_weights_and_rates(which: str, setting: Setting, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(which)
    ours, theirs = build_model(pair, "skipping", setting), build_model(pair, "timm", setting)
    rates = sides.our_rates(ours)
    check_rates(pair.name, rates, sides.their_rates(theirs))
    assert max(rates) == pytest.approx(setting.rate)
    assert min(rates) == (setting.rate if setting.profile == "constant" else 0.0)
    assert {m.mode for m in ours.modules() if isinstance(m, DropPath)} == {"skip"}
    own = [m.drop_prob for m in theirs.modules() if isinstance(m, TimmDropPath)]
    assert len(own) == sum(rate > 0 for rate in rates), "timm leaves an identity at rate 0"
    converted = pair.convert(ours.state_dict())
    assert all(torch.equal(value, converted[key]) for key, value in theirs.state_dict().items())


def test_other_rates_are_noticed() -> None:
    check_rates("a", [0.0, 0.1], [0.0, 0.1])
    for theirs in ([0.0, 0.2], [0.0]):
        with pytest.raises(Failure, match="a: other drop rates"):
            check_rates("a", [0.0, 0.1], theirs)


def test_a_step_trains_and_decays_the_same_weights(pair: Pair) -> None:
    images, targets = torch.randn(2, *pair.size), torch.tensor([0, 1])
    built = {
        name: build_side(pair, name, Setting(0.4), "bfloat16", images, targets) for name in (*sides.OURS, *sides.THEIRS)
    }
    decayed = {
        name: sorted(
            (group["weight_decay"], sum(p.numel() for p in group["params"])) for group in side.optimizer.param_groups
        )
        for name, side in built.items()
    }
    assert decayed["masked"] == decayed["skipping"] == decayed["timm"] == decayed["timm channels_last"]
    assert len(decayed["timm"]) == 2 and {group["lr"] for group in built["timm"].optimizer.param_groups} == {1e-5}
    assert built["timm channels_last"].images.is_contiguous(memory_format=torch.channels_last)
    for name in ("skipping", "timm channels_last"):
        model = built[name].model
        before = [p.clone() for p in model.parameters()]
        built[name].step()
        assert all(p.grad is None for p in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_default_models_are_on_both_sides() -> None:
    from benchmarks.step import MODELS, QUICK

    for name in {*MODELS, *(case.model for case in QUICK)}:
        sides.check_name(name)
        assert timm.is_model(name.removeprefix("timm/"))


def test_settings_have_names() -> None:
    assert [str(setting) for setting in SETTINGS] == ["0", "0.4 linear", "0.4 constant"]
