"""What the report says against what was seen to happen, in our models and in others'."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import csv
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from layers.drop_path import MODES, DropPath
from stochastic_depth.blocks import find_blocks
from stochastic_depth.graft import GraftedDropPath, grafted
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import (
    BRANCH_MACS,
    COMPUTED,
    NET_MACS,
    SIZE,
    Net,
    PlainBlock,
    PlainNet,
    build,
    poolformer,
    size_of,
)


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
    model = PlainNet()
    set_drop_path(model, 0.5, profile="constant", mode=mode)
    assert [b.realised_rate for b in drop_path_report(model, input_size=(3, 8, 8)).blocks] == [None] * 4
    for batch in (1, 3, 8, 5):
        model(torch.randn(batch, 3, 8, 8))
    model.eval()(torch.randn(9, 3, 8, 8))  # draws nothing
    report = drop_path_report(model)
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
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
    model = PlainNet()
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
    report = drop_path_report(PlainNet())
    assert report.compute_saved is None
    assert all(b.compute_share is None and b.saved_share is None for b in report.blocks)
    assert "training compute saved not counted" in str(report)


def test_warns_of_a_rate_that_was_never_applied() -> None:
    class Forgetful(PlainBlock):
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


def test_rates_that_fall_with_depth_as_was_asked_are_a_note_and_no_alarm() -> None:
    model = PlainNet()
    for rates, where in (
        ([0.0, 0.2, 0.1, 0.3], ["rates fall with depth at stages.1.0"]),
        ([0.3, 0.2, 0.1, 0.0], ["rates fall with depth at stages.0.1 and 2 more"]),
        ([0.2, 0.2, 0.2, 0.2], []),
    ):
        set_drop_path(model, None, profile=rates)
        report = drop_path_report(model, input_size=(3, 8, 8))
        assert (report.warnings, report.notes) == ([], where)
    set_drop_path(model, 0.3, profile="reversed")
    assert not drop_path_report(model, input_size=(3, 8, 8)).warnings


def test_warns_of_rates_of_another_s_modules_that_fall_with_depth() -> None:
    model = build("vit_tiny_patch16_224", drop_path_rate=0.3)
    model.get_submodule("blocks.1.drop_path2").drop_prob = 0.4  # type: ignore[assignment]
    assert drop_path_report(model, input_size=SIZE).warnings == ["rates fall with depth at blocks.2"]


def test_table() -> None:
    torch.manual_seed(0)
    model = PlainNet()
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
    model = PlainNet()
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


def test_dropped_samples_are_not_computed() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    seen: list[int] = []
    block = model.get_submodule("blocks.1")
    for part in ("attn.qkv", "mlp.fc1"):
        block.get_submodule(part).register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    model(torch.randn(8, *size_of(name)))
    assert seen == [4, 4]
    report = drop_path_report(model, input_size=size_of(name))
    assert [b.mode for b in report.blocks] == ["skip"] * 3 and not report.warnings
    assert report.blocks[1].realised_rate == 0.5
    assert report.compute_saved is not None and 0.3 < report.compute_saved < 0.5


def flops(model: nn.Module, images: Tensor) -> int:
    """Of a forward pass. Fused attention is not counted on the CPU, so it is taken apart."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def size_and_images(name: str, model: nn.Module, batch: int) -> tuple[tuple[int, ...], Tensor]:
    size: Any = model.pretrained_cfg["input_size"] if name == "ours" else SIZE
    return size, torch.randn(batch, *size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_report_says_what_was_computed(name: str, mode: str) -> None:
    """Samples that branches were given, and operations of whole forward passes."""
    model = COMPUTED[name][0]().train()
    size, images = size_and_images(name, model, 4)
    depth = set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=size)  # type: ignore[arg-type]
    rows: dict[int, list[int]] = {}
    for block in depth.blocks:
        for key, module in block.drop_paths.items():
            if part := COMPUTED[name][1].get(key):
                noted = rows.setdefault(id(module), [])
                model.get_submodule(f"{block.name}.{part}").register_forward_hook(
                    lambda _m, args, _o, noted=noted: noted.append(len(args[0]))
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent = [flops(model, images) for _ in range(6)]
    given = {module: sum(noted) for module, noted in rows.items()}
    report = drop_path_report(model, input_size=size)
    modules = [m for block in depth.blocks for m in block.drop_paths.values()]
    assert given
    for module in modules:
        dropped = 0 if mode == "mask" else module.samples_dropped
        assert module.samples_computed == 24 - dropped, "nothing is computed for what is dropped"
        assert given.get(id(module), 24 - dropped) == 24 - dropped
    set_drop_path(model, 0.0, mode="mask")
    saved = 1 - sum(spent) / (6 * flops(model, images))
    assert report.compute_saved == pytest.approx(saved, abs=1e-6)
    assert (saved > 0.05) == (mode != "mask")


def test_one_kept_sample_is_masked_in_front_of_a_batch_norm_and_is_no_saving() -> None:
    model = COMPUTED["torchvision resnet18"][0]().train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=SIZE)
    with pytest.warns(UserWarning, match="batch norm inside this residual branch sees the kept samples only"):
        model(torch.randn(2, *SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, *SIZE))
    report = drop_path_report(model, input_size=SIZE)
    assert report.compute_saved == 0.0 and {b.realised_rate for b in report.blocks} == {0.5}
    assert any("8 branches hold a batch norm" in note for note in report.notes)


def test_report_of_an_untouched_model_audits_its_own_modules() -> None:
    model = build("vit_tiny_patch16_224", drop_path_rate=0.3)
    report = drop_path_report(model, input_size=(3, 64, 64))
    assert [b.nominal_rate for b in report.blocks] == pytest.approx([0.0, 0.15, 0.3])
    assert not report.warnings and "its own drop-path modules" in report.notes[0]
    model.get_submodule("blocks.1.drop_path1").drop_prob = 1.5  # type: ignore[assignment]
    assert any("rate 1.5 is outside [0, 1]" in w for w in drop_path_report(model, input_size=(3, 64, 64)).warnings)
    assert not list(grafted(model)), "a report changes nothing"


def test_report_flags_what_is_wrong() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.3, mode="skip", input_size=size_of(name))
    images = torch.randn(4, *size_of(name))
    model(images)
    assert not drop_path_report(model, input_size=size_of(name)).warnings
    model.get_submodule("blocks.2.drop_path1").eval()
    assert any("blocks.2.drop_path1: in eval mode" in w for w in drop_path_report(model).warnings)
    model.train()
    block = model.get_submodule("blocks.2")
    block.drop_path2, forgotten = GraftedDropPath(0.3), block.drop_path2
    block.drop_path2.forward = lambda x: x
    forgotten.role = "mask"
    model(images)
    assert any("blocks.2.drop_path2: has rate 0.3 but was never applied" in w for w in drop_path_report(model).warnings)
    first = model.get_submodule("blocks.0")
    first.drop_path1 = block.drop_path1
    assert any("one DropPath serves blocks.0, blocks.2" in w for w in drop_path_report(model).warnings)


class Inner(nn.Module):
    """One linear branch."""

    def __init__(self, drop_path: DropPath | None = None) -> None:
        super().__init__()
        self.fc, self.drop_path = nn.Linear(8, 8), drop_path or DropPath(0.5, mode="skip")

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path.residual(x, self.fc)


class Outer(Inner):
    """A branch that holds two blocks, beside a linear layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Inner(), Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path.residual(x, lambda h: self.inner(self.fc(h)))


STEM, LINEAR_LAYER = 3 * 8 * 8 * 8, 8 * 8


def test_what_is_in_one_another_is_counted_once() -> None:
    model = Net(Outer()).train()
    total = STEM + 3 * LINEAR_LAYER
    report = drop_path_report(model, input_size=Net.size)
    assert [b.compute_share for b in report.blocks] == pytest.approx([LINEAR_LAYER / total] * 3)
    # of the inner branches half is left out, and half of the rest
    assert report.compute_saved == pytest.approx((0.5 + 2 * 0.75) * LINEAR_LAYER / total)
    model(torch.randn(8, *Net.size))
    assert drop_path_report(model, input_size=Net.size).compute_saved == pytest.approx(report.compute_saved)


def test_a_module_that_several_blocks_share_is_counted_once() -> None:
    shared = DropPath(0.5, mode="skip")
    model = Net(*(Inner(shared) for _ in range(4))).train()
    total = STEM + 4 * LINEAR_LAYER
    report = drop_path_report(model, input_size=Net.size)
    assert [b.compute_share for b in report.blocks] == pytest.approx([LINEAR_LAYER / total] * 4)
    assert report.compute_saved == pytest.approx(0.5 * 4 * LINEAR_LAYER / total)
    share = 0.25 * 4 * LINEAR_LAYER / total
    result = set_drop_path(model, share, profile="constant", rate_is="expected_macs", input_size=Net.size)
    assert result.rates == pytest.approx([0.25] * 4)


def test_what_never_ran_in_training_saves_nothing() -> None:
    class InEvaluation(Inner):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else super().forward(x)

    model = Net(Inner(), InEvaluation()).train()
    total = STEM + 2 * LINEAR_LAYER
    assert drop_path_report(model, input_size=Net.size).compute_saved == pytest.approx(LINEAR_LAYER / total)
    model(torch.randn(8, *Net.size))
    report = drop_path_report(model, input_size=Net.size)
    assert report.compute_saved == pytest.approx(0.5 * LINEAR_LAYER / total)
    assert report.blocks[1].saved_share == 0.0
