"""Drop-path modules of other libraries are known by what they do, and refused by name where they do something else."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from layers.drop_path import DropPath, Mode
from stochastic_depth.graft import GraftedDropPath
from stochastic_depth.law import full_precision
from stochastic_depth.places import foreign_rate
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import Net, Residual, build, copied_drop_path, size_of, traces


class Dinov2DropPath(nn.Module):
    """As in transformers, where every model has one of its own."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        return copied_drop_path(hidden_states, self.drop_prob or 0.0, self.training)


class ConvNextDropPath(Dinov2DropPath):
    pass


class Branchless(timm.layers.DropPath):
    """A subclass whose name says nothing."""


class TokenDropPath(nn.Module):
    """Made for (B, L, C) only; calls its rate `drop_rate`."""

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.eps, self.drop_rate = 1e-6, drop_rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        batch, _, _ = x.shape
        keep = torch.rand(batch, 1, 1, device=x.device) >= self.drop_rate
        return x * keep / (1 - self.drop_rate)


class Survival(nn.Module):
    """Holds the chance of keeping, in a buffer."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.p: Tensor
        self.register_buffer("p", torch.tensor(1 - drop_prob))

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), *(1,) * (x.ndim - 1)) < self.p
        return x * kept / self.p if self.training else x


class ByDropout(nn.Module):
    """Has torch's dropout make the mask."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout(torch.ones(len(x), *(1,) * (x.ndim - 1)))


class WholeBatch(nn.Module):
    """Drops all samples or none, by Python's generator, and scales nothing."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if self.training and random.random() < self.prob else x


KNOWN: dict[str, tuple[Callable[[float], nn.Module], str, bool, str]] = {
    # name: module at a rate, the attribute it stands under, scale_by_keep, mode
    "timm": (timm.layers.DropPath, "drop_path", True, "mask"),
    "timm unscaled": (lambda p: timm.layers.DropPath(p, scale_by_keep=False), "drop_path", False, "mask"),
    "torchvision row": (lambda p: StochasticDepth(p, "row"), "stochastic_depth", True, "mask"),
    "torchvision batch": (lambda p: StochasticDepth(p, "batch"), "sd", True, "batch"),
    "subclass": (Branchless, "anything", True, "mask"),
    "transformers": (Dinov2DropPath, "drop_path1", True, "mask"),
    "subclass in transformers": (ConvNextDropPath, "dropout_layer", True, "mask"),
    "tokens": (TokenDropPath, "droppath", True, "mask"),
    "chance of keeping": (Survival, "drop_path_mlp", True, "mask"),
    "by dropout": (ByDropout, "drop_path", True, "mask"),
    "whole batch": (WholeBatch, "path_drop", False, "batch"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_module_of_another_library_is_known_by_what_it_does(name: str) -> None:
    build_module, attribute, scale_by_keep, mode = KNOWN[name]
    for rate in (0.0, 0.3, 1.0):
        assert foreign_rate(build_module(rate)) == pytest.approx(rate)
    model = Net(*(Residual(build_module(rate), attribute) for rate in (0.0, 0.3, 0.6)))
    if name == "tokens":
        model.tokens = lambda x: x.transpose(1, 2)  # (B, L, C)
    assert [b.nominal_rate for b in drop_path_report(model, input_size=Net.size).blocks] == pytest.approx([0, 0.3, 0.6])
    result = set_drop_path(model, 0.4, profile="constant", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    modules = [block.get_submodule(attribute) for block in model.blocks]
    assert all(isinstance(m, GraftedDropPath) and m.drop_prob == 0.4 for m in modules)
    assert all((m.scale_by_keep, m.mode) == (scale_by_keep, mode) for m in modules), "no mode leaves each module's own"


@pytest.mark.parametrize("name", ["timm", "timm unscaled", "torchvision batch", "chance of keeping", "whole batch"])
@pytest.mark.parametrize("mode", [None, "skip"])
def test_a_replaced_module_multiplies_kept_samples_as_before(name: str, mode: Mode | None) -> None:
    build_module, attribute, scaled, own_mode = KNOWN[name]
    model = Net(Residual(build_module(0.5), attribute)).train()
    set_drop_path(model, 0.5, mode=mode, input_size=Net.size)
    block, x = model.blocks[0], torch.randn(64, 8)
    branch = block.eval().mlp(x)  # in training a hook of the block selects what it is given
    block.train()
    outcomes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        factors = ((block(x) - x) / branch).mean(1).round(decimals=3)
        assert set(factors.tolist()) <= {0.0, 2.0 if scaled else 1.0}
        outcomes.add(len(factors.unique()))
    assert outcomes == ({1} if (mode or own_mode) == "batch" else {2})


class Tokens(nn.Module):
    """Drops tokens, not samples."""

    def __init__(self, *, name: str = "tokens") -> None:
        super().__init__()
        self.p, self.name = 0.25, name

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * 2 if self.name == "not quiet in evaluation" else x
        keep = {
            "tokens": (*x.shape[:-1], 1),
            "channels": (1,) * (x.ndim - 1) + x.shape[-1:],
            "elements": x.shape,
        }.get(self.name, (len(x), *(1,) * (x.ndim - 1)))
        out = x * (torch.rand(keep) >= self.p) / (1 - self.p)
        return out + 0.1 * torch.rand(()) if self.name == "noise" else out


class NoRate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return copied_drop_path(x, 0.1, self.training)


UNKNOWN: dict[str, Callable[[], object]] = {
    "Dropout": lambda: nn.Dropout(0.1),
    "Linear": lambda: nn.Linear(8, 8),
    "ReLU": nn.ReLU,
    "NoRate": NoRate,
    "<lambda>": lambda: lambda x: x,
    "partial": lambda: partial(stochastic_depth, p=0.1, mode="row"),
}


@pytest.mark.parametrize("kind", [*UNKNOWN, "tokens", "channels", "elements", "noise", "not quiet in evaluation"])
@pytest.mark.parametrize("attribute", ["drop_path", "drop_path2", "stochastic_depth"])
def test_what_is_called_drop_path_and_does_something_else_is_refused_by_name(kind: str, attribute: str) -> None:
    wrong = UNKNOWN[kind]() if kind in UNKNOWN else Tokens(name=kind)
    model = Net(Residual(nn.Identity()), Residual(timm.layers.DropPath(0.2)), Residual(wrong, attribute))
    before = traces(model)
    name = kind if kind in UNKNOWN else "Tokens"
    with pytest.raises(
        ValueError, match=rf"^blocks\.2\.{attribute} \({name}\): .*put layers.drop_path.DropPath or nn"
    ) as e:
        set_drop_path(model, 0.3, input_size=Net.size)
    assert len(str(e.value).splitlines()) == 1
    assert traces(model) == before
    report = drop_path_report(model, input_size=Net.size)
    assert [b.name for b in report.blocks][:2] == ["blocks.0", "blocks.1"]
    assert (
        f"blocks.2.{attribute}: {name} is not known to drop whole samples; set_drop_path refuses it" in report.warnings
    )


@pytest.mark.parametrize("kind", UNKNOWN)
def test_it_is_refused_beside_modules_of_ours_too(kind: str) -> None:
    model = Net(Residual(DropPath(0.1)), Residual(UNKNOWN[kind]()), Residual(DropPath(0.2)))
    before = traces(model)
    with pytest.raises(ValueError, match=rf"^blocks\.1\.drop_path \({kind}\): .*put layers.drop_path.DropPath or nn"):
        set_drop_path(model, 0.3, input_size=Net.size)
    assert traces(model) == before
    warned = f"blocks.1.drop_path: {kind} is not known to drop whole samples; set_drop_path refuses it"
    assert warned in drop_path_report(model, input_size=Net.size).warnings


class ByMethod(nn.Module):
    """A block whose second branch is dropped by a method, beside a module for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path1 = timm.layers.DropPath(0.2)

    def drop_path(self, x: Tensor) -> Tensor:
        return timm.layers.drop_path(x, 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.fc1(x))
        return x + self.drop_path(self.fc2(x))


class ByStaticMethod(ByMethod):
    """The same, without the block."""

    @staticmethod
    def drop_path(x: Tensor) -> Tensor:  # type: ignore[override]
        return timm.layers.drop_path(x, 0.3, True)


class HandsOn(ByMethod):
    """Its method calls the module."""

    def drop_path(self, x: Tensor) -> Tensor:
        return self.drop_path1(x).clone()


@pytest.mark.parametrize("kind", [ByMethod, ByStaticMethod])
def test_a_method_that_drops_by_itself_is_refused(kind: type[nn.Module]) -> None:
    model = Net(Residual(nn.Identity()), kind())
    before = traces(model)
    with pytest.raises(ValueError, match=r"^blocks\.1\.drop_path \(drop_path\): .*put layers.drop_path.DropPath or nn"):
        set_drop_path(model, 0.3, input_size=Net.size)
    assert traces(model) == before
    warned = "blocks.1.drop_path: drop_path is not known to drop whole samples; set_drop_path refuses it"
    assert warned in drop_path_report(model, input_size=Net.size).warnings


def test_a_method_that_hands_on_to_a_module_is_no_fault() -> None:
    model = Net(Residual(nn.Identity()), HandsOn())
    assert set_drop_path(model, 0.3, input_size=Net.size).rates == [0.0, 0.3]
    assert not drop_path_report(model, input_size=Net.size).warnings


@pytest.mark.parametrize("build_module", [NoRate, lambda: Tokens(name="tokens")])
def test_a_class_called_drop_path_is_refused_under_any_name(build_module: Callable[[], nn.Module]) -> None:
    module = build_module()
    module.__class__ = type("MyDropPath2d", (type(module),), {})
    with pytest.raises(ValueError, match=r"blocks\.0\.gate \(MyDropPath2d\)"):
        set_drop_path(Net(Residual(module, "gate")), 0.3, input_size=Net.size)


def test_a_rate_outside_its_range_is_mended() -> None:
    for rate in (1.5, -0.5, math.nan):
        model = Net(Residual(timm.layers.DropPath(rate)))
        assert any("outside [0, 1]" in w for w in drop_path_report(model, input_size=Net.size).warnings)
        assert set_drop_path(model, 0.3, input_size=Net.size).rates == [0.3]


def test_a_proof_is_run_in_full_precision() -> None:
    backends: Any = torch.backends
    units = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        before = [unit.fp32_precision for unit in units]
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert {unit.fp32_precision for unit in units} <= {"ieee", "none"}
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            model = build("deit3_small_patch16_224")
            result = set_drop_path(model, 0.5, mode="skip", input_size=size_of("deit3_small_patch16_224"))
        assert result.notes == ["6 drop-path modules: skips per branch"]
        assert [unit.fp32_precision for unit in units] == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(own)
