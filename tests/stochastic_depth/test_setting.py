"""set_drop_path on live models: rates, modes, schedules, and what is refused, with nothing changed."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch

from layers.drop_path import BREAK_EVEN, MODES
from layers.rates import PROFILES, drop_path_rates
from layers.schedule import DropPathSchedule
from models import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.proof import verify_skip
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import break_even_of, set_drop_path
from tests.stochastic_depth.parts import (
    BRANCH_MACS,
    DEPTHS,
    LINEAR,
    NET_MACS,
    SIZE,
    PlainNet,
    build,
    drop_paths,
    poolformer,
    quiet_norms,
    rates_of,
    settings_of,
    size_of,
    traces,
)


@pytest.mark.parametrize("profile", PROFILES)
def test_sets_every_block_of_a_model_built_at_rate_zero(profile: Any) -> None:
    model = poolformer()
    keys = list(model.state_dict())
    result = set_drop_path(model, 0.4, profile=profile)
    assert rates_of(model) == result.rates == drop_path_rates(0.4, DEPTHS, profile)
    assert [b.name for b in result.blocks] == [b.name for b in find_blocks(model)]
    assert list(model.state_dict()) == keys


def test_is_what_create_model_does() -> None:
    model = poolformer()
    set_drop_path(model, 0.4, mode="skip")
    assert settings_of(model) == settings_of(poolformer(drop_path_rate=0.4, drop_path_mode="skip"))
    assert rates_of(model) == pytest.approx(LINEAR)


def test_a_list_of_rates() -> None:
    model = poolformer()
    rates = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert set_drop_path(model, None, profile=rates).rates == rates == rates_of(model)


@pytest.mark.parametrize("rates", [np.linspace(0, 0.4, 5), torch.linspace(0, 0.4, 5), tuple(torch.linspace(0, 0.4, 5))])
def test_arrays_and_tensors_of_rates(rates: Any) -> None:
    model = poolformer()
    assert set_drop_path(model, None, profile=rates).rates == pytest.approx(LINEAR)
    assert rates_of(model) == pytest.approx(LINEAR)
    assert set_drop_path(model, rates[-1]).rates == pytest.approx(LINEAR)
    assert rates_of(poolformer(drop_path_rate=rates[-1])) == pytest.approx(LINEAR)
    blocks = set_drop_path(model, 0.1, break_even={"mlp": rates[-1]}).blocks
    assert break_even_of(blocks)["mlp"] == pytest.approx(0.4)


def test_a_second_call_replaces_the_first() -> None:
    model = PlainNet()
    late = DropPathSchedule(kind="late", cutoff=5)
    set_drop_path(model, 0.4, profile="constant", mode="skip", schedule=late, break_even=0.9)
    model(torch.randn(4, 3, 8, 8))
    result = set_drop_path(model, 0.2, mode="skip")
    fresh = PlainNet()
    set_drop_path(fresh, 0.2, mode="skip")
    assert settings_of(model) == settings_of(fresh)
    assert result.schedule == DropPathSchedule()
    set_drop_path(model, 0.3)
    assert {m.mode for m in drop_paths(model)} == {"skip"}, "no mode leaves it as it is"


def test_zero_turns_stochastic_depth_off() -> None:
    torch.manual_seed(0)
    model, x = poolformer(), torch.randn(4, 3, 32, 32)
    expected = model.eval()(x)
    set_drop_path(model.train(), 1.0, profile="constant")
    assert not torch.allclose(model(x), expected, atol=1e-6)
    set_drop_path(model, 0)
    assert rates_of(model) == [0.0] * 5
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: Any) -> None:
    model = poolformer()
    set_drop_path(model, 0.4, mode=mode)
    assert {m.mode for m in drop_paths(model)} == {mode}


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_mean_and_expected_macs_are_reached(rate: float) -> None:
    model = create_model("caformer_n4", num_classes=5)
    mean = set_drop_path(model, rate, profile="linear_from_first", rate_is="mean").rates
    assert sum(mean) / len(mean) == pytest.approx(rate, abs=1e-6)
    set_drop_path(model, rate, profile="cosine", rate_is="expected_macs", mode="skip", break_even=0.0)
    assert drop_path_report(model).compute_saved == pytest.approx(rate, abs=1e-6)


def test_expected_macs_of_a_model_that_does_not_tell_its_input_size() -> None:
    model = PlainNet()
    with pytest.raises(ValueError, match=r"counting compute needs input_size=\(C, H, W\)"):
        set_drop_path(model, 0.1, rate_is="expected_macs")
    rates = set_drop_path(model, 0.1, profile="constant", rate_is="expected_macs", input_size=(3, 8, 8)).rates
    assert rates == pytest.approx([0.1 * NET_MACS / (4 * BRANCH_MACS)] * 4)


def test_a_new_rate_reaches_a_model_that_is_compiled_already() -> None:
    torch.manual_seed(0)
    model, x = PlainNet(), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    full = model.eval()(x)
    without_blocks = model.head(model.stem(x).mean(dim=(2, 3)))
    model.train()
    for rate, expected in [(0.0, full), (1.0, without_blocks), (0.0, full)]:
        set_drop_path(compiled, rate, profile="constant")  # type: ignore[arg-type]
        torch.testing.assert_close(compiled(x), expected)


def test_break_even_defaults_to_the_constants() -> None:
    blocks = find_blocks(create_model("caformer_n4", num_classes=5))
    assert break_even_of(blocks) == {kind: BREAK_EVEN[kind] for kind in ("sep_conv", "attention", "mlp")}


def test_break_even_by_one_number() -> None:
    model = poolformer()
    blocks = set_drop_path(model, 0.4, mode="skip", break_even=0.25).blocks
    assert break_even_of(blocks) == {"pooling": 0.25, "mlp": 0.25}
    assert [m.skips for m in drop_paths(model)] == [False] * 6 + [True] * 4


def test_break_even_by_kind() -> None:
    model = poolformer()
    blocks = set_drop_path(model, 0.4, mode="skip", break_even={"mlp": 0.15}).blocks
    assert break_even_of(blocks) == {"pooling": BREAK_EVEN["pooling"], "mlp": 0.15}
    assert [m.skips for m in drop_paths(model) if m.kind == "mlp"] == [False, False, True, True, True]
    blocks = set_drop_path(model, 0.4).blocks
    assert break_even_of(blocks) == {"pooling": BREAK_EVEN["pooling"], "mlp": BREAK_EVEN["mlp"]}


@pytest.mark.parametrize(
    ("rate", "settings", "message"),
    [
        (1.5, {}, r"rate must be a number in \[0, 1\], got 1.5"),
        (math.nan, {}, r"rate must be a number in \[0, 1\], got nan"),
        (None, {}, "a list of rates is given as the profile"),
        (np.linspace(0, 0.1, 5), {}, "a list of rates is given as the profile"),
        (torch.tensor(1.7), {}, r"rate must be a number in \[0, 1\], got tensor\(1.7"),
        (0.1, {"schedule": "early"}, "schedule must be a DropPathSchedule, got 'early'"),
        (0.1, {"schedule": lambda step: 2.0}, r"multiplier must be a number in \[0, 1\], got 2.0"),
        (0.1, {"profile": "linaer"}, "profile must be one of"),
        (None, {"profile": [0.1] * 4}, "has 4 entries, the model 5 blocks"),
        (0.3, {"profile": [0.1] * 5}, "contradicts the list"),
        (0.1, {"rate_is": "median"}, "rate_is must be one of"),
        (0.8, {"rate_is": "mean"}, "cannot reach mean 0.8"),
        (0.9, {"rate_is": "expected_macs"}, "cannot reach expected_macs 0.9"),
        (0.1, {"mode": "skp"}, "mode must be one of mask, skip, batch, got 'skp'"),
        (0.1, {"break_even": 1.5}, r"break_even must be a number in \[0, 1\], got 1.5"),
        (0.1, {"break_even": {"mlp": math.nan}}, r"break_even of mlp must be a number in \[0, 1\], got nan"),
        (0.1, {"break_even": {"attention": 0.1}}, "no branch of kind 'attention'; this model has mlp, pooling"),
    ],
)
def test_what_is_wrong_changes_nothing(rate: Any, settings: dict[str, Any], message: str) -> None:
    model = poolformer()
    set_drop_path(model, 0.2, mode="skip", break_even=0.01, schedule=DropPathSchedule(kind="early", cutoff=9)).set_step(
        4
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    before = settings_of(model)
    with pytest.raises(ValueError, match=message):
        set_drop_path(model, rate, **settings)
    assert settings_of(model) == before
    assert before[-1][:5] == (0.2, 0.5, "skip", 0.01, 2)


def test_set_step_applies_the_schedule() -> None:
    model = poolformer()
    depth = set_drop_path(model, 0.4, schedule=DropPathSchedule(kind="ramp", cutoff=5))
    assert {m.rate for m in drop_paths(model)} == {0.0}, "set to step 0"
    for step, multiplier in [(0, 0.0), (1, 0.25), (4, 1.0), (99, 1.0), (2, 0.5)]:
        assert depth.set_step(step) == pytest.approx(0.4 * multiplier)
        assert rates_of(model) == pytest.approx(LINEAR), "the nominal rates stay"
        got = [m.rate for block in depth.blocks for m in block.drop_paths.values()]
        assert got == pytest.approx([r * multiplier for r in LINEAR for _ in range(2)])


def test_late_drop_path_is_the_plain_model_before_its_cutoff() -> None:
    torch.manual_seed(0)
    model, x = poolformer(), torch.randn(4, 3, 32, 32)
    expected = model.eval()(x)
    model.train()
    late = DropPathSchedule(kind="late", cutoff=3)
    depth = set_drop_path(model, 1.0, profile="constant", schedule=late)
    for step in range(3):
        assert depth.set_step(step) == 0.0
        torch.testing.assert_close(model(x), expected)
    assert depth.set_step(3) == 1.0
    assert not torch.allclose(model(x), expected, atol=1e-6)


WRONG: list[tuple[object, dict, str]] = [
    (1.7, {}, r"rate must be a number in \[0, 1\], got 1.7"),
    (None, {"profile": [0.1, 0.2]}, "has 2 entries, the model 3 blocks"),
    (0.8, {"rate_is": "mean"}, "cannot reach mean 0.8"),
    (0.99, {"rate_is": "expected_macs"}, "cannot reach expected_macs 0.99"),
    (0.3, {"rate_is": "median"}, "rate_is must be one of"),
    (0.3, {"break_even": {"sep_conv": 0.1}}, "no branch of kind 'sep_conv'"),
    (0.3, {"break_even": 2.0}, "break_even must be a number"),
    (0.3, {"mode": "skp"}, "mode must be one of"),
    (0.3, {"schedule": "early"}, "schedule must be a DropPathSchedule, got 'early'"),
    (0.3, {"schedule": lambda step: 3.0}, r"multiplier must be a number in \[0, 1\], got 3.0"),
    (0.3, {"input_size": (1, 8, 8)}, r"forward pass on images of \(1, 8, 8\) failed"),
]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("rate", "settings", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_what_is_refused_changes_nothing(rate: float, settings: dict, message: str, converted: bool) -> None:
    name = "vit_tiny_patch16_224"
    model = build(name, drop_path_rate=0.2).train()
    if converted:
        if "input_size" in settings:
            pytest.skip("needs no forward pass any more")
        set_drop_path(model, 0.5, mode="batch", input_size=size_of(name)).set_step(1)
        model(torch.randn(2, *size_of(name)))
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        set_drop_path(model, rate, **{"mode": "skip", "input_size": size_of(name), **settings})
    assert traces(model) == before


def test_an_interruption_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import stochastic_depth.proof as foreign

    model = build("resnet18", drop_path_rate=0.2)
    before = traces(model)
    installed: list[object] = []

    def interrupted(*args: object) -> None:
        if installed:
            raise KeyboardInterrupt
        installed.append(original(*args))

    original = foreign._install
    monkeypatch.setattr(foreign, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_drop_path(model, 0.3, mode="skip", input_size=SIZE)
    assert installed and traces(model) == before


@pytest.mark.parametrize("built_there", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_inference_mode_changes_nothing(name: str, built_there: bool) -> None:
    model = None if built_there else build(name)
    with torch.inference_mode():
        model = model or build(name)
        notes = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name)).notes
        assert verify_skip(quiet_norms(model.train()), torch.randn(4, *size_of(name))) < 1e-4
    assert notes == set_drop_path(build(name), 0.5, profile="constant", mode="skip", input_size=size_of(name)).notes
    set_drop_path(model, 0.4, profile="constant")
    if not built_there:  # else its weights cannot be trained
        model(torch.randn(5, *size_of(name))).sum().backward()
    assert {m.samples_seen for m in drop_paths(model)} == {0 if built_there else 5}
    with torch.inference_mode():
        ours = poolformer(drop_path_mode="skip")
    set_drop_path(ours, 0.3)
    assert {m.mode for m in drop_paths(ours)} == {"skip"}


@pytest.mark.parametrize("mode", ["skip", "batch"])
def test_a_model_without_numbers_is_not_tried_out(mode: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=3)
    before = traces(model)
    with pytest.raises(ValueError, match=r"ResNet: conv1.weight is on the meta device, .* or set mode='mask'"):
        set_drop_path(model, 0.2, mode=mode, input_size=(3, 32, 32))
    assert traces(model) == before
    set_drop_path(model, 0.2, mode="mask", input_size=(3, 32, 32))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        buffer.fill_(1)
    assert "8 drop-path modules: skips per branch" in set_drop_path(model, 0.2, mode=mode, input_size=(3, 32, 32)).notes


@pytest.mark.parametrize("size", [32, "32", (3, "a", 3), (3, 0, 32)])
def test_what_is_no_size_is_refused(size: Any) -> None:
    model, foreign = poolformer(), build("resnet18")
    message = r"input_size must be \(C, H, W\), whole numbers of at least 1, got "
    for call in (lambda m: set_drop_path(m, 0.2, input_size=size), lambda m: drop_path_report(m, input_size=size)):
        for given in (model, foreign):
            with pytest.raises(ValueError, match=message):
                call(given)


def test_what_is_no_model_or_no_schedule_is_refused() -> None:
    for call in (lambda: set_drop_path("resnet18", 0.2), lambda: drop_path_report("resnet18")):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
            call()
    with pytest.raises(ValueError, match="schedule must be a DropPathSchedule, got <class"):
        set_drop_path(poolformer(), 0.2, schedule=DropPathSchedule)
    with pytest.raises(ValueError, match=r"no branch of kind 'poling'; .*; did you mean 'pooling'"):
        set_drop_path(poolformer(), 0.2, break_even={"poling": 0.1})
