"""Skipping equals masking with the same kept set, and what does not agree is not installed."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers.drop_path import DropPath, Mode
from layers.schedule import DropPathSchedule
from models import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.graft import graft, grafted
from stochastic_depth.proof import convert_to_skip, randomise_scales, verify_skip
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import (
    SIZE,
    SMALL,
    Net,
    Residual,
    Stack,
    build,
    quiet_norms,
    size_of,
    torchvision_model,
)

NORM_WARNING = "mode 'skip': the batch norm"


@pytest.mark.parametrize("name", SMALL)
def test_skip_equals_mask_with_the_same_kept_set(name: str) -> None:
    model = build(name)
    set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=size_of(name))
    assert {m.role for m in grafted(model) if m.applied} == SMALL[name][1]
    quiet_norms(model.train())
    images = torch.randn(6, *size_of(name))
    assert max(verify_skip(model, images, seed=seed) for seed in range(4)) < 2e-5


TORCHVISION = ["convnext_tiny", "efficientnet_b0", "swin_t", "swin_v2_t"]

# no place of their own for stochastic depth
TORCHVISION_BARE = [
    "resnet18",
    "resnet50",
    "regnet_x_400mf",
    "vit_b_16",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
]


LARGE = {"resnet50", "swin_t", "swin_v2_t", "vit_b_16"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in [*TORCHVISION, *TORCHVISION_BARE]]
)
def test_torchvision(name: str) -> None:
    model = torchvision_model(name).eval()
    images = torch.randn(4, *SIZE)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(images)
    result = set_drop_path(model, 0.2, mode="skip", input_size=SIZE)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert any("skips per branch" in note for note in result.notes)
    assert not [m for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    with warnings.catch_warnings(record=True) as caught:
        model.train()(images).sum().backward()
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {str(w.message).partition(" inside")[0] for w in caught} == ({NORM_WARNING} if normed else set())
    assert any("hold a batch norm, which sees the kept samples only" in note for note in result.notes) == normed
    assert not drop_path_report(model, input_size=SIZE).warnings
    assert any("no shortcut" in note for note in result.notes) == (name == "efficientnet_b0")


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "mobilenet_v2", "mnasnet0_5"])
def test_bare_blocks_of_torchvision_are_dropped_whole(name: str) -> None:
    model = quiet_norms(torchvision_model(name).train())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    images = torch.randn(4, *SIZE)
    set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=SIZE)
    assert verify_skip(model, images) < 2e-5
    set_drop_path(model, 1.0, profile="constant", mode="skip", input_size=SIZE)
    model.zero_grad()
    model(images).square().sum().backward()
    blocks = [module for _, module in model.named_modules() if any(isinstance(c, DropPath) for c in module.children())]
    assert blocks
    ends = {"resnet50": "conv1", "vit_b_16": "mlp", "mobilenet_v2": "conv", "mnasnet0_5": "layers"}
    for block in blocks:
        for parameter in block.get_submodule(ends[name]).parameters():
            assert parameter.grad is not None and not parameter.grad.any(), "at rate 1 no branch is trained"


class Functional(nn.Module):
    """A branch that calls no module: only the whole block can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(torch.relu(x @ self.weight))


class Shared(nn.Module):
    """One drop path for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.fc1(x).relu())
        return x + self.drop_path(self.fc2(x).relu())


class Windows(nn.Module):
    """A branch whose only module sees two windows of each sample, behind which the full batch is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        windows = self.fc(x.reshape(2 * len(x), 4))
        return x + self.drop_path(windows.view(len(x), 8))


class Pair(nn.Module):
    """A block that returns its output beside something else."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.drop_path = nn.Identity()

        def forward(self, x: Tensor, size: int) -> tuple[Tensor, int]:
            return x + self.drop_path(self.fc(x)), size

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 8)[0]


@pytest.mark.parametrize(
    ("block", "note"),
    [
        (Pair, "skips per branch"),
        (Functional, "skips per block, since its branches cannot be skipped one by one"),
        (Shared, "skips per branch"),
        (Windows, "skips per branch"),
    ],
)
def test_other_shapes_of_blocks(block: type[nn.Module], note: str) -> None:
    torch.manual_seed(0)
    model = Stack(block(), block()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [f"2 drop-path modules: {note}"]
    images = torch.randn(6, 3, 4, 4)
    assert max(verify_skip(model, images, seed=seed) for seed in range(4)) < 1e-5
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    model(images)
    assert set(rows) == {Functional: set(), Shared: {3}, Pair: {3}, Windows: {6}}[block]
    assert [b.mode for b in drop_path_report(model, input_size=(3, 4, 4)).blocks] == [
        "skip block" if block is Functional else "skip"
    ] * 2


class Outer(nn.Module):
    """A block whose shortcut is what a block inside it gives, as in timm's SwiftFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Residual(nn.Identity()), nn.Linear(8, 8)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.drop_path(self.fc(x))


def test_a_block_inside_a_block_is_dropped_by_its_own_module_alone() -> None:
    torch.manual_seed(0)
    model = Stack(Outer(), Outer()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == ["4 drop-path modules: skips per branch"]
    images = torch.randn(6, 3, 4, 4)
    assert max(verify_skip(model, images, seed=seed) for seed in range(4)) < 1e-5


class Stubborn(nn.Module):
    """A block whose shortcut looks at the whole batch: neither branch nor block can be skipped."""

    def __init__(self, *, mixes: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop_path = nn.Identity()
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return x + (x.mean(0) if self.mixes else 0.0) + self.drop_path(y - y.mean(0))


def test_what_cannot_be_skipped_is_masked_and_says_so() -> None:
    model = Stack(Stubborn(), Stubborn()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [
        "2 drop-path modules: masks, since neither branches nor block agree with masking: outputs or gradients differ"
    ]
    model(torch.randn(4, 3, 4, 4)).sum().backward()
    report = drop_path_report(model, input_size=(3, 4, 4))
    assert [b.mode for b in report.blocks] == ["mask", "mask"]
    assert [b.realised_rate for b in report.blocks] == [0.5, 0.5], "the draw is the same"
    assert report.compute_saved == 0.0


class UsesNumbers(nn.Module):
    """A block whose code normalises by a batch norm's numbers, without calling it: in a branch, or in front of one."""

    def __init__(self, *, calls: bool = False) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop_path, self.calls = nn.Identity(), calls

    def forward(self, x: Tensor) -> Tensor:
        y, bn = self.fc1(x), self.bn
        if self.calls:
            return x + self.drop_path(self.fc2(bn(y)))
        z = nn.functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1)
        return x + self.drop_path(self.fc2(z))


def test_a_batch_norm_whose_numbers_alone_are_used_sees_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = Stack(UsesNumbers(), UsesNumbers(calls=True)).train()
    notes = set_drop_path(model, 0.8, profile="constant", mode="skip", input_size=(3, 4, 4)).notes
    why = "bn, a batch norm, is not called as a module: what uses its numbers runs on all samples"
    assert f"1 drop-path module: masks, since {why}" in notes
    assert "1 drop-path module: skips per branch" in notes
    block = model.blocks[0]
    assert isinstance(block, UsesNumbers)
    expected = copy.deepcopy(block.bn)
    for step in range(8):  # of 4 samples one is kept, or none
        images = torch.randn(4, 3, 4, 4)
        torch.manual_seed(step)
        model(images).sum().backward()
        expected(block.fc1(images.flatten(1)[:, :8]))
    torch.testing.assert_close(block.bn.running_mean, expected.running_mean)
    torch.testing.assert_close(block.bn.running_var, expected.running_var)


def test_structures_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import stochastic_depth.proof as foreign

    model = build("vit_tiny_patch16_224")
    graft(model)
    calls: list[str] = []
    original = foreign._try
    monkeypatch.setattr(foreign, "_try", lambda owner, call: calls.append(owner.name) or original(owner, call))
    plans = convert_to_skip(model, size_of("vit_tiny_patch16_224"))
    assert calls == ["blocks.0"] and list(plans) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(list(plan.entries) == ["drop_path1", "drop_path2"] and not plan.reason for plan in plans.values())
    assert plans["blocks.0"].takes_nothing == {"drop_path1", "drop_path2"}
    assert len(find_blocks(model)) == 3


@pytest.mark.parametrize("replaced", [False, True])
def test_blocks_put_in_after_a_conversion_skip_as_the_others(replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import stochastic_depth.proof as foreign

    settings: dict = {"profile": "constant", "mode": "skip", "input_size": Net.size}
    model = Net(*(Residual(nn.Identity()) for _ in range(3))).train()
    set_drop_path(model, 0.5, **settings)
    new = Residual(nn.Identity())
    if replaced:
        model.blocks[1] = new
    else:
        model.blocks.append(new)
    calls: list[str] = []
    original = foreign._try
    monkeypatch.setattr(foreign, "_try", lambda owner, call: calls.append(owner.name) or original(owner, call))
    result = set_drop_path(model, 0.5, **settings)
    assert calls == ["blocks.1" if replaced else "blocks.3"], "others keep what they have"
    assert result.notes == [f"{len(model.blocks)} drop-path modules: skips per branch"]
    images = torch.randn(6, *Net.size)
    assert verify_skip(model, images) < 1e-5
    model(images)
    assert {m.samples_computed for m in grafted(model)} == {3}
    hooks = [len(block.mlp._forward_pre_hooks) for block in model.blocks]
    assert set(hooks) == {1}


def test_a_branch_whose_first_module_was_replaced_skips_after_the_next_call() -> None:
    settings: dict = {"profile": "constant", "mode": "skip", "input_size": Net.size}
    model = Net(*(Residual(nn.Identity()) for _ in range(2))).train()
    set_drop_path(model, 0.5, **settings)
    model.blocks[0].mlp = nn.Linear(8, 8)
    images = torch.randn(6, *Net.size)
    with pytest.warns(UserWarning, match="mlp of a Residual, where its branch begins, was replaced") as caught:
        model(images)
        model(images)
    assert len(caught) == 1
    assert [m.samples_computed for m in grafted(model)] == [12, 6], "it masks"
    set_drop_path(model, 0.5, **settings)
    assert verify_skip(model, images) < 1e-5
    for module in grafted(model):
        module.reset_counts()
    model(images)
    assert [m.samples_computed for m in grafted(model)] == [3, 3]


class Entangled(nn.Module):
    """Branches that can be skipped one by one but not together, in a block that cannot be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1(x)
        short = len(first) < len(x)
        out = x + x.mean(0) + self.drop_path1(first)
        second = self.fc2(x)
        return out + self.drop_path2(second * 2 if short and len(second) < len(x) else second)


def test_what_agrees_alone_but_not_together_is_not_installed_together() -> None:
    model = Stack(Entangled(), Entangled()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [
        "2 drop-path modules: skips per branch",
        "2 drop-path modules: masks, since neither branches nor block agree with masking: outputs or gradients differ",
    ]
    images = torch.randn(6, 3, 4, 4)
    assert max(verify_skip(model, images, seed=seed) for seed in range(4)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["caformer_s18", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_other_dtypes_skip_as_float32(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    result = set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=size_of(name))
    assert result.notes == [f"{len(list(grafted(model)))} drop-path modules: skips per branch"]
    assert {p.dtype for p in model.parameters()} == {dtype}
    images = torch.randn(3, *size_of(name), dtype=dtype)
    assert model.train()(images).dtype == dtype


class Overflowing(Residual):
    """Leaves a shortcut behind that float16 does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1e6


def test_activations_that_overflow_are_no_proof_against_skipping() -> None:
    model = Net(Overflowing(nn.Identity()), Residual(nn.Identity())).half()
    assert not model.eval()(torch.randn(2, *Net.size).half()).isfinite().any()
    result = set_drop_path(model, 0.5, mode="skip", input_size=Net.size)
    assert result.notes == ["2 drop-path modules: skips per branch"]


# ---- verify_skip ----------------------------------------------------------------------------------------------------


def test_a_model_is_left_as_it_is() -> None:
    model = quiet_norms(build("resnet18").train())
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=SIZE)
    model(torch.randn(3, *SIZE)).sum().backward()
    images, draws = torch.randn(4, *SIZE), torch.get_rng_state()
    counts = [(m.samples_seen, m.samples_dropped, m.samples_computed) for m in grafted(model)]
    gradients = [p.grad for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert verify_skip(model, images) < 2e-5
    assert torch.equal(torch.get_rng_state(), draws) and not images.requires_grad
    assert counts == [(m.samples_seen, m.samples_dropped, m.samples_computed) for m in grafted(model)]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m.masks_all for m in grafted(model))


@pytest.mark.parametrize("mode", ["skip", "batch"])
def test_models_of_ours_are_verified_too(mode: Mode) -> None:
    torch.manual_seed(0)
    model = create_model("caformer_n4", num_classes=5)
    randomise_scales(model)
    set_drop_path(model, 0.6, profile="constant", mode=mode)
    images = torch.randn(5, *model.pretrained_cfg["input_size"])
    assert max(verify_skip(model, images, seed=seed) for seed in range(3)) < 2e-5


def test_what_differs_is_measured() -> None:
    class Mixing(nn.Module):
        """A branch that looks at the whole batch, skipped without proof."""

        def __init__(self, *, forgets: bool) -> None:
            super().__init__()
            self.fc, self.drop_path, self.forgets = nn.Linear(8, 8), DropPath(0.5, mode="skip"), forgets

        def branch(self, x: Tensor) -> Tensor:
            if self.forgets and len(x) < 4:
                return x
            return self.fc(x) - (0.0 if self.forgets else self.fc(x).mean(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_path.residual(x, self.branch)

    torch.manual_seed(0)
    images = torch.randn(4, 8)
    assert 0.05 < verify_skip(Mixing(forgets=False), images) < 10.0
    assert verify_skip(Mixing(forgets=True), images) == math.inf, "a gradient is missing"


def test_numbers_that_are_none_are_no_agreement() -> None:
    model = Stack(Residual(nn.Identity())).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert math.isnan(verify_skip(model, torch.full((4, 3, 4, 4), math.nan)))


def test_a_plan_made_below_a_break_even_rate_is_a_proof_too() -> None:
    """Trials skip whatever break-even rate an earlier call has set."""
    model = Stack(Stubborn(), Stubborn()).train()
    set_drop_path(model, 0.1, mode="mask", break_even=0.9, input_size=(3, 4, 4))
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert "neither branches nor block agree" in result.notes[0]


@dataclass
class Outputs:
    logits: Tensor
    count: int


class Returning(nn.Module):
    """A branch that must not skip, and what is made of its result."""

    def __init__(self, make: Callable[[Tensor], Any], *, mixes: bool) -> None:
        super().__init__()
        self.fc, self.make, self.mixes = nn.Linear(8, 8), make, mixes
        self.drop_path = DropPath(0.5, mode="skip")

    def forward(self, x: Tensor) -> Any:
        return self.make(self.drop_path.residual(x, lambda h: self.fc(h) - (self.fc(h).mean(0) if self.mixes else 0.0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda out: {"logits": out},
        lambda out: {"count": 3, "detached": out.detach(), "other": torch.ones(1)},
        lambda out: (torch.zeros(2), [None, {"deep": out}]),
        lambda out: Outputs(out, 3),
        lambda out: (out > 0, (out * 10).long()),
    ],
)
def test_all_tensors_that_are_returned_are_compared(make: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 8)
    assert verify_skip(Returning(make, mixes=False), images) < 1e-5
    assert verify_skip(Returning(make, mixes=True), images) > 0.05


def test_what_cannot_be_verified_is_refused() -> None:
    images = torch.randn(4, 8)
    model = Returning(lambda out: out, mixes=False)
    assert verify_skip(model, images) < 1e-5
    for settings, words in (
        ({"multiplier": 0.0}, "rate of its drop-path modules is 0"),
        ({"drop_prob": 0.0}, "rate of its drop-path modules is 0"),
        ({"mode": "mask"}, "in mode 'mask'; call set_drop_path"),
        ({"training": False}, "in evaluation, where nothing is dropped; call model.train()"),
    ):
        model = Returning(lambda out: out, mixes=False)
        vars(model.drop_path).update(training=settings.pop("training", True))
        for key, value in settings.items():
            setattr(model.drop_path, key, value)
        with pytest.raises(ValueError, match=f"nothing to verify in Returning: .*{re.escape(words)}"):
            verify_skip(model, images)
    for untouched in (nn.Linear(8, 8), build("vit_tiny_patch16_224", drop_path_rate=0.2)):
        with pytest.raises(ValueError, match="it holds no DropPath; call set_drop_path"):
            verify_skip(untouched, images)
    with pytest.raises(ValueError, match="returns no number; give some images"):
        verify_skip(Returning(lambda out: out, mixes=False), images[:0])
    with pytest.raises(TypeError, match="Returning returns no tensor"):
        verify_skip(Returning(lambda out: None, mixes=False), images)


def test_a_schedule_at_0_proves_nothing_of_a_block() -> None:
    class Mixing(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.mlp(x)
            return x + self.drop_path(h - h.mean(0))

    model = Stack(Mixing(nn.Identity())).train()
    late = DropPathSchedule(kind="late", cutoff=5)
    set_drop_path(model, 0.5, profile="constant", mode="mask", schedule=late, input_size=(3, 4, 4))
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert "neither branches nor block agree" in result.notes[0]


def test_code_that_runs_another_block_proves_nothing() -> None:
    """A lambda over the block, put over its forward, goes on running that block in a copy of it."""
    model = Net(Residual(nn.Identity()), Residual(nn.Identity())).train()
    block = model.blocks[0]
    block.forward = lambda x: x + block.drop_path(block.mlp(x) - block.mlp(x).mean(0, keepdim=True))
    depth = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    assert any("a copy of it does not run its own modules" in note for note in depth.notes), depth.notes
    assert [m.role for m in grafted(model)] == ["mask", "branch"]
