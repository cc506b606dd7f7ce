"""What tells blocks apart that have the same parts."""

# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from stochastic_depth import proof
from stochastic_depth.graft import graft
from stochastic_depth.proof import convert_to_skip, verify_skip
from stochastic_depth.setting import set_drop_path
from stochastic_depth.structure import described, structure
from tests.stochastic_depth.parts import Net


class Flagged(nn.Module):
    """A branch that looks at the whole batch, if it is told to."""

    def __init__(self, mixes: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(8), nn.Linear(8, 8), nn.Identity()
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if callable(self.mixes):
            h = self.mixes(h)
        elif getattr(self.mixes, "on", self.mixes):
            h = h - h.mean(0)
        return x + self.drop_path(self.mlp(h))


@dataclass
class Config:
    on: bool
    around: "Config | None" = None  # itself, where it is set


def looped(on: bool) -> Config:
    config = Config(on)
    config.around = config
    return config


FLAGS: list[tuple[Any, Any]] = [
    (False, True),
    (0, 2),
    (None, "yes"),
    (looped(False), looped(True)),
    (lambda h: h, lambda h: h - h.mean(0)),
    (lambda h, times=0: h - times * h.mean(0), lambda h, times=1: h - times * h.mean(0)),
]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=["bool", "int", "none", "config", "function", "default"])
def test_a_plain_attribute_is_part_of_what_is_proven(flags: tuple[Any, Any], backwards: bool) -> None:
    torch.manual_seed(0)
    model = Net(*(Flagged(flag) for flag in (flags[::-1] if backwards else flags))).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    assert max(verify_skip(model, torch.randn(6, *Net.size), seed=seed) for seed in range(4)) < 1e-5


class Called(nn.Module):
    """Hands each block an argument of its own."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given, self.blocks = given, nn.ModuleList(Given() for _ in given)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        for block, given in zip(self.blocks, self.given, strict=True):
            x = block(x, mixes=given)
        return x


class Given(Flagged):
    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, x: Tensor, mixes: bool) -> Tensor:  # type: ignore[override]
        h = self.norm(x)
        return x + self.drop_path(self.mlp(h - h.mean(0) if mixes else h))


def test_an_argument_is_part_of_what_is_proven() -> None:
    model = Called(False, True).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    assert max(verify_skip(model, torch.randn(6, *Net.size), seed=seed) for seed in range(4)) < 1e-5


def test_a_hook_is_part_of_what_is_proven() -> None:
    model = Net(Flagged(False), Flagged(False)).train()
    model.blocks[1].norm.register_forward_hook(lambda _m, _args, out: out - out.mean(0))  # type: ignore[union-attr]
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    assert max(verify_skip(model, torch.randn(6, *Net.size), seed=seed) for seed in range(4)) < 1e-5


class Colour(Enum):
    RED, BLUE = 1, 2


def closing_over(value: Any) -> Callable[[], Any]:
    return lambda: value


def holder(**values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**values)


DIFFERENT: list[tuple[Any, Any]] = [
    (0, False),
    (1, 1.0),
    (Colour.RED, Colour.BLUE),
    ((1, 2), [1, 2]),
    ({"a": 1}, {"a": 2}),
    ({1}, {2}),
    (closing_over(1), closing_over(2)),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (holder(a=1), holder(a=2)),
    (torch.zeros(2), torch.zeros(3)),
    (torch.tensor(True), torch.tensor(False)),
    (np.zeros(2), np.zeros(3)),
    (nn.ReLU(), nn.GELU()),
    (torch.relu, torch.tanh),
    (torch.float32, torch.float64),
    (nn.Linear, nn.Conv2d),
    (nn.Linear(2, 2).forward, nn.Linear(2, 2).extra_repr),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_what_differs_is_described_otherwise(a: Any, b: Any) -> None:
    assert described(a) != described(b)
    assert hash(described(a)) == hash(described(a))


SAME: list[Callable[[], Any]] = [
    lambda: float("nan"),
    lambda: torch.zeros(3),
    lambda: np.zeros(3),
    lambda: np.float32(2),
    lambda: closing_over([1]),
    lambda: holder(a={"b": (1, None)}),
    lambda: looped(True),
    lambda: nn.Linear(2, 3).forward,
    object,
]


@pytest.mark.parametrize("make", SAME, ids=range(len(SAME)))
def test_what_is_alike_is_described_alike(make: Callable[[], Any]) -> None:
    first, second = make(), make()
    assert described(first) == described(second) and hash(described(first)) == hash(described(second))


def test_rates_tell_no_blocks_apart() -> None:
    blocks = [Flagged(False), Flagged(False)]
    for rate, block in enumerate(blocks):
        block.drop_path_rate = rate / 10  # type: ignore[assignment]
    assert structure(blocks[0]) == structure(blocks[1])


def test_shifted_windows_are_proven_apart_from_others() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(4,), embed_dim=24, num_heads=(2,))
    graft(model)
    blocks = model.layers[0].blocks  # type: ignore[index,union-attr]
    keys = [structure(block) for block in blocks]  # type: ignore[union-attr]
    assert keys[0] == keys[2] != keys[1] == keys[3]
    assert len(convert_to_skip(model, (3, 56, 56))) == 4


def test_a_plan_of_a_similar_block_is_confirmed_with_fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[Any] = []
    disagreement = proof._disagreement

    def counted(owner: Any, *args: Any, **kwargs: Any) -> str:
        trials.append(owner.name)
        return disagreement(owner, *args, **kwargs)

    monkeypatch.setattr(proof, "_disagreement", counted)
    model = Net(Flagged(False), Flagged(None), Flagged(False)).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    first, second, third = (trials.count(f"blocks.{i}") for i in range(3))
    assert first > second == 2 and third == 0
    assert verify_skip(model, torch.randn(6, *Net.size)) < 1e-5
