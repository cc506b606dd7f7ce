"""set_drop_path, count_macs and drop_path_report on live models, wrapped or not."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layers.drop_path import BREAK_EVEN, MODES, DropPath
from layers.rates import PROFILES, drop_path_rates
from layers.schedule import DropPathSchedule
from models import create_model
from stochastic_depth.blocks import NoBlocksError, find_blocks, stage_depths, unwrap
from stochastic_depth.compute import count_macs
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import break_even_of, set_drop_path

DEPTHS, DIMS = [1, 1, 2, 1], [16, 32, 48, 64]
LINEAR = [0.0, 0.1, 0.2, 0.3, 0.4]  # of 0.4 over the five blocks

# Multiply-accumulates of `Net` for one image of 3 x 8 x 8, by hand.
STEM_MACS = 16 * 3 * 3 * 3 * 4  # 4 x 4 positions, kernel 3 x 3, 3 -> 4 channels
BRANCH_MACS = 16 * 4 * 4  # a linear layer over 4 channels at each position
HEAD_MACS = 4 * 5
NET_MACS = STEM_MACS + 4 * BRANCH_MACS + HEAD_MACS


class NetBlock(nn.Module):
    """One linear branch; counts the samples that it dropped by looking at its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = DropPath(kind="mlp")
        self.seen = self.dropped = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path.residual(x, self.fc)
        if self.training and not torch.compiler.is_compiling():
            self.seen += len(x)
            self.dropped += int((out == x).flatten(1).all(dim=1).sum())
        return out


class Net(nn.Module):
    """A strided convolution, two stages of two blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stages = nn.Sequential(*(nn.Sequential(NetBlock(), NetBlock()) for _ in range(2)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x).permute(0, 2, 3, 1))  # (B, 4, 4, C)
        return self.head(x.mean(dim=(1, 2)))


def poolformer(**settings: Any) -> nn.Module:
    return create_model("poolformer_s12", depths=DEPTHS, dims=DIMS, image_size=32, num_classes=5, **settings)


def drop_paths(model: nn.Module) -> list[DropPath]:
    return [m for m in model.modules() if isinstance(m, DropPath)]


def settings_of(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (m.drop_prob, m.multiplier, m.mode, m.break_even, m.samples_seen, m.samples_dropped) for m in drop_paths(model)
    ]


def rates_of(model: nn.Module) -> list[float]:
    """Of the blocks, whose two modules must agree."""
    pairs = [{m.drop_prob for m in block.drop_paths.values()} for block in find_blocks(model)]
    assert all(len(pair) == 1 for pair in pairs)
    return [pair.pop() for pair in pairs]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- finding blocks -------------------------------------------------------------------------------------------------


def test_blocks_and_stages_of_a_model() -> None:
    blocks = find_blocks(poolformer())
    assert [b.name for b in blocks] == [
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.blocks.0",
    ]
    assert all(list(b.drop_paths) == ["drop_path1", "drop_path2"] for b in blocks)
    assert stage_depths(poolformer(), blocks) == DEPTHS


def test_blocks_compiled_one_by_one_are_the_same_blocks() -> None:
    plain, compiled = Net(), Net()
    for stage in compiled.stages:
        assert isinstance(stage, nn.Sequential)
        for i in range(2):
            stage[i] = torch.compile(stage[i], backend="eager")  # type: ignore[assignment]
    assert [b.name for b in find_blocks(compiled)] == [b.name for b in find_blocks(plain)]
    assert set_drop_path(compiled, 0.4, profile="stagewise").rates == [0.0, 0.0, 0.4, 0.4]


@pytest.mark.parametrize("use", [find_blocks, lambda model: set_drop_path(model, 0.1)])
def test_a_model_without_blocks_is_refused(use: Any) -> None:
    with pytest.raises(NoBlocksError, match="Sequential has no residual block with a DropPath"):
        use(nn.Sequential(nn.Linear(2, 2)))


def test_a_report_on_a_model_without_blocks_says_so() -> None:
    report = drop_path_report(nn.Sequential(nn.Linear(2, 2)))
    assert report.blocks == [] and report.warnings == [] and report.expected_depth == 0
    assert "Sequential has no residual block" in str(report) and report.to_csv().startswith("block,name,")


# ---- set_drop_path --------------------------------------------------------------------------------------------------


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
    model = Net()
    late = DropPathSchedule(kind="late", cutoff=5)
    set_drop_path(model, 0.4, profile="constant", mode="skip", schedule=late, break_even=0.9)
    model(torch.randn(4, 3, 8, 8))
    result = set_drop_path(model, 0.2, mode="skip")
    fresh = Net()
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
    model = Net()
    with pytest.raises(ValueError, match=r"counting compute needs input_size=\(C, H, W\)"):
        set_drop_path(model, 0.1, rate_is="expected_macs")
    rates = set_drop_path(model, 0.1, profile="constant", rate_is="expected_macs", input_size=(3, 8, 8)).rates
    assert rates == pytest.approx([0.1 * NET_MACS / (4 * BRANCH_MACS)] * 4)


# ---- wrapped models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", ["ddp", "compile", "compiled ddp", "ddp of compiled", "compiled in place"])
def test_wrapped_models(wrapping: str, process_group: None) -> None:
    model = poolformer()
    wrapped: Any = model
    if wrapping == "compiled in place":
        model.compile(backend="eager")
    if "compile" in wrapping and wrapping not in ("compiled ddp", "compiled in place"):
        wrapped = torch.compile(wrapped, backend="eager")
    if "ddp" in wrapping:
        wrapped = DistributedDataParallel(wrapped)
    if wrapping == "compiled ddp":
        wrapped = torch.compile(wrapped, backend="eager")
    assert unwrap(wrapped) is model
    set_drop_path(wrapped, 0.4, profile="stagewise", mode="skip")
    assert rates_of(model) == drop_path_rates(0.4, DEPTHS, "stagewise")
    assert count_macs(wrapped).total == count_macs(poolformer()).total
    assert [b.name for b in drop_path_report(wrapped).blocks] == [b.name for b in find_blocks(model)]


def test_a_new_rate_reaches_a_model_that_is_compiled_already() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    full = model.eval()(x)
    without_blocks = model.head(model.stem(x).mean(dim=(2, 3)))
    model.train()
    for rate, expected in [(0.0, full), (1.0, without_blocks), (0.0, full)]:
        set_drop_path(compiled, rate, profile="constant")  # type: ignore[arg-type]
        torch.testing.assert_close(compiled(x), expected)


# ---- break-even rates -----------------------------------------------------------------------------------------------


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


# ---- refused, with nothing changed ----------------------------------------------------------------------------------


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


# ---- schedule -------------------------------------------------------------------------------------------------------


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


# ---- count_macs -----------------------------------------------------------------------------------------------------


def test_macs_by_hand() -> None:
    model = Net()
    macs = count_macs(model, (3, 8, 8))
    assert macs.total == NET_MACS
    assert [macs.block(b) for b in find_blocks(model)] == [BRANCH_MACS] * 4
    assert macs.branch(DropPath()) == 0.0


def test_macs_of_pooling_blocks_are_their_mlps() -> None:
    model = poolformer()
    macs = count_macs(model)
    positions = [64, 16, 4, 4, 1]  # a stride of 4, then 2 between stages
    dims = [16, 32, 48, 48, 64]
    by_hand = [n * 2 * 4 * c * c for n, c in zip(positions, dims, strict=True)]
    assert [macs.block(b) for b in find_blocks(model)] == by_hand
    assert all(macs.branch(b.drop_paths["drop_path1"]) == 0 for b in find_blocks(model))


def test_macs_of_sep_conv_and_attention() -> None:
    blocks = find_blocks(model := create_model("caformer_n4", num_classes=5))
    macs = count_macs(model)
    n, c = 256, 32
    sep_conv = 2 * n * c * 2 * c + n * 2 * c * 9  # two linear layers, a depthwise 3 x 3
    assert macs.branch(blocks[0].drop_paths["drop_path1"]) == sep_conv
    n, c = 64, 64
    attention = 4 * n * c * c + 2 * n * n * c  # qkv and output, then q k and its product with v
    assert macs.branch(blocks[2].drop_paths["drop_path1"]) == attention
    assert macs.branch(blocks[2].drop_paths["drop_path2"]) == 2 * n * c * 2 * c


def test_macs_of_a_module_that_adds_two_branches() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.drop_path = nn.Linear(4, 4), nn.Linear(4, 4), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_path.residual(self.drop_path.residual(x, self.fc1), self.fc2, x)

    model = Shared()
    macs = count_macs(model, (3, 4))
    assert macs.block(find_blocks(model)[0]) == macs.total == 2 * 3 * 4 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_macs_do_not_depend_on_dtype(dtype: torch.dtype) -> None:
    assert count_macs(Net().to(dtype), (3, 8, 8)).total == NET_MACS


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_no_trace(training: bool) -> None:
    torch.manual_seed(0)
    model = poolformer(drop_path_rate=0.4).train(training)
    model.get_submodule("stem").train(not training)  # as a part frozen for fine-tuning
    flags = {name: m.training for name, m in model.named_modules()}
    state, settings, draws = (
        {k: v.clone() for k, v in model.state_dict().items()},
        settings_of(model),
        torch.get_rng_state(),
    )
    count_macs(model)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert all("residual" not in vars(m) for m in drop_paths(model))
    assert settings_of(model) == settings
    assert torch.equal(torch.get_rng_state(), draws)
    after = model.state_dict()
    assert all(v.device.type == "cpu" and torch.equal(v, after[k]) for k, v in state.items())


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_shared_modules_and_tied_weights_alone(fails: bool) -> None:
    model = Net()
    model.stages[1][0].fc = model.stages[0][0].fc  # type: ignore[index, union-attr]
    model.stages[1][1].fc.weight = model.stages[0][1].fc.weight  # type: ignore[index, union-attr]
    before = [(m, key, value) for m in model.modules() for key, value in m._parameters.items()]
    if fails:
        with pytest.raises(ValueError, match="counting compute at"):
            count_macs(model, (4, 8, 8))
    else:
        assert count_macs(model, (3, 8, 8)).total == NET_MACS
    assert all(m._parameters[key] is value for m, key, value in before)
    assert not any(p.is_meta for p in model.parameters())


def test_counting_leaves_no_trace_when_it_fails() -> None:
    model = Net()
    model.head = nn.Linear(9, 5)
    model.stages[0].eval()
    with pytest.raises(ValueError, match="counting compute at"):
        count_macs(model, (3, 8, 8))
    assert model.training and not model.stages[0].training
    assert model.stages[1].training
    assert all("residual" not in vars(m) for m in drop_paths(model))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# ---- report ---------------------------------------------------------------------------------------------------------


def test_a_clean_model_has_no_warnings() -> None:
    model = poolformer(drop_path_rate=0.4)
    for _ in range(2):
        report = drop_path_report(model)
        assert report.warnings == [] and report.notes == []
        assert "warning" not in str(report)
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("mode", MODES)
def test_realised_rate_is_what_was_seen_to_be_dropped(mode: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    set_drop_path(model, 0.5, profile="constant", mode=mode)
    assert [b.realised_rate for b in drop_path_report(model, input_size=(3, 8, 8)).blocks] == [None] * 4
    for batch in (1, 3, 8, 5):
        model(torch.randn(batch, 3, 8, 8))
    model.eval()(torch.randn(9, 3, 8, 8))  # draws nothing
    report = drop_path_report(model)
    blocks = [m for m in model.modules() if isinstance(m, NetBlock)]
    assert all(b.seen == 17 for b in blocks) and any(b.dropped for b in blocks)
    assert [b.realised_rate for b in report.blocks] == [b.dropped / 17 for b in blocks]
    assert [b.mode for b in report.blocks] == [mode] * 4
    set_drop_path(model, 0.5)
    assert drop_path_report(model).blocks[0].realised_rate is None, "setting rates starts a new count"


def test_realised_rate_of_a_block_is_over_both_its_branches() -> None:
    model = poolformer()
    set_drop_path(model, None, profile=[0.5] * 5)
    model(torch.randn(6, 3, 32, 32))
    for block, row in zip(find_blocks(model), drop_path_report(model).blocks, strict=True):
        dropped = [m.samples_dropped for m in block.drop_paths.values()]
        assert row.realised_rate == sum(dropped) / 12


def test_expected_depth_and_compute() -> None:
    model = Net()
    set_drop_path(model, 0.3, mode="skip", break_even=0.15)
    report = drop_path_report(model, input_size=(3, 8, 8))
    assert [b.nominal_rate for b in report.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert report.expected_depth == pytest.approx(4 - 0.6)
    share = BRANCH_MACS / NET_MACS
    assert [b.compute_share for b in report.blocks] == pytest.approx([share] * 4)
    # below the break-even rate the branch is computed and masked
    assert [b.saved_share for b in report.blocks] == pytest.approx([0.0, 0.0, 0.2 * share, 0.3 * share])
    assert report.compute_saved == pytest.approx(0.5 * share)
    assert [b.mode for b in report.blocks] == ["mask", "mask", "skip", "skip"]

    set_drop_path(model, 0.3, mode="mask")
    assert drop_path_report(model, input_size=(3, 8, 8)).compute_saved == 0.0
    set_drop_path(model, 0.3, mode="batch")
    assert drop_path_report(model, input_size=(3, 8, 8)).compute_saved == pytest.approx(0.6 * share)


def test_a_block_that_skips_one_branch_and_masks_the_other() -> None:
    model = poolformer()
    set_drop_path(model, 0.4, mode="skip", break_even={"pooling": 0.35, "mlp": 0.15})
    modes = [b.mode for b in drop_path_report(model).blocks]
    assert modes == ["mask", "mask", "mask/skip", "mask/skip", "skip"]


def test_without_an_input_size_compute_is_left_out() -> None:
    report = drop_path_report(Net())
    assert report.compute_saved is None
    assert all(b.compute_share is None and b.saved_share is None for b in report.blocks)
    assert "training compute saved not counted" in str(report)


def test_warns_of_a_rate_that_was_never_applied() -> None:
    class Forgetful(NetBlock):
        def __init__(self) -> None:
            super().__init__()
            self.drop_path2 = DropPath()

    model = nn.Sequential(Forgetful(), Forgetful())
    set_drop_path(model, 0.2)
    assert drop_path_report(model).warnings == [], "before training nothing was applied, rightly"
    model(torch.randn(2, 4))
    # the first block's rate is 0, so it misses nothing
    assert drop_path_report(model).warnings == ["1.drop_path2: has rate 0.2 but was never applied"]
    assert "warning: 1.drop_path2: has rate 0.2" in str(drop_path_report(model))


def test_warns_of_rates_that_fall_with_depth() -> None:
    model = Net()
    set_drop_path(model, None, profile=[0.0, 0.2, 0.1, 0.3])
    assert drop_path_report(model).warnings == ["rates fall with depth at stages.1.0"]
    set_drop_path(model, 0.2, profile="constant")
    assert drop_path_report(model).warnings == []


def test_table() -> None:
    torch.manual_seed(0)
    model = Net()
    set_drop_path(model, 0.3, mode="skip", break_even=0.0)
    lines = str(drop_path_report(model, input_size=(3, 8, 8))).splitlines()
    assert lines[0].split() == ["block", "nominal", "realised", "compute", "mode"]
    assert [line.split() for line in lines[1:5]] == [
        [f"stages.{i // 2}.{i % 2}", f"{i / 10:.4f}", "-", f"{BRANCH_MACS / NET_MACS:.1%}", "skip"] for i in range(4)
    ]
    saved = 0.6 * BRANCH_MACS / NET_MACS
    assert lines[5:] == [f"expected depth 3.40 of 4 blocks; training compute saved {saved:.1%}"]
    assert len({len(line.rpartition("  ")[0]) for line in lines[:5]}) == 1, "columns stand below each other"

    for _ in range(5):
        model(torch.randn(3, 3, 8, 8))
    realised = drop_path_report(model).blocks[3].realised_rate
    assert str(drop_path_report(model)).splitlines()[4].split()[2] == f"{realised:.4f}"


def test_csv() -> None:
    model = Net()
    set_drop_path(model, 0.3, mode="skip", break_even=0.0)
    rows = list(csv.DictReader(io.StringIO(drop_path_report(model).to_csv())))
    names = ["block", "name", "nominal_rate", "mode", "realised_rate", "compute_share", "saved_share"]
    assert list(rows[0]) == names and len(rows) == 4
    assert list(rows[1].values()) == ["1", "stages.0.1", "0.1", "skip", "", "", ""]

    model(torch.randn(8, 3, 8, 8))
    report = drop_path_report(model, input_size=(3, 8, 8))
    for i, row in enumerate(csv.DictReader(io.StringIO(report.to_csv()))):
        block = report.blocks[i]
        assert (row["block"], row["name"], row["mode"]) == (str(i), block.name, "skip")
        numbers = [getattr(block, name) for name in names[4:]]
        assert [float(row[name]) for name in names[4:]] == pytest.approx(numbers, rel=1e-5)
