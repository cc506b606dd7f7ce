"""What a callable holds: its own modules and no others, however it is written."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torchvision.ops
from torch import Tensor, nn

from layers.branches import batch_norms, held_modules, left_alone, samples_to_compute, takes_batch_statistics

GLOBAL = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def helper(x: Tensor) -> Tensor:
    return GLOBAL[1](x)


class Plain:
    """No module, but it holds one."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x)

    def run(self, x: Tensor) -> Tensor:
        return self.part(x)


class Slotted:
    __slots__ = ("part",)

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x)


class Block(nn.Module):
    """Two branches, the second with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.parts = nn.ModuleList([self.fc2, self.norm])
        self.inner = nn.ModuleDict({"one": self.fc1, "two": self.norm})
        self.calls = 0

    def plain(self, x: Tensor) -> Tensor:
        return self.fc1(x).relu()

    def normed(self, x: Tensor) -> Tensor:
        x = self.fc2(x)
        norm = self.norm
        return norm(x)

    def through(self, x: Tensor) -> Tensor:
        return self.normed(x)

    def through_plain(self, x: Tensor) -> Tensor:
        return self.plain(x) * (2.0 if self.training else 1.0)

    def listed(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def by_name(self, x: Tensor) -> Tensor:
        return getattr(self, "no" + "rm")(x)

    def handed_on(self, x: Tensor) -> Tensor:
        return run_norm(self, x)

    def rebuilt(self, x: Tensor) -> Tensor:
        return sum(f(x) for f in (lambda x: self.fc1(x), lambda x: self.norm(x)))  # type: ignore[return-value]

    def counting(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(x)

    @functools.cached_property
    def lazy(self) -> nn.Module:
        return self.norm

    def by_property(self, x: Tensor) -> Tensor:
        return self.lazy(x)


def run_norm(block: Block, x: Tensor) -> Tensor:
    return block.norm(x)


def call(part: Callable[..., Any], x: Tensor) -> Tensor:
    return part(x)


def closure(part: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return part(x)

    return inner


def wrapped(part: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(part)
    def inner(*args: Tensor) -> Tensor:
        return part(*args)

    return inner


BLOCK = Block()
WITH_NORM: dict[str, Any] = {
    "module": GLOBAL,
    "forward": GLOBAL.forward,
    "partial": functools.partial(GLOBAL),
    "partial of a function": functools.partial(call, GLOBAL),
    "partial by keyword": functools.partial(lambda x, part: part(x), part=GLOBAL),
    "global": lambda x: GLOBAL(x),
    "function": helper,
    "closure": closure(GLOBAL),
    "closure of a closure": closure(closure(GLOBAL)),
    "closure over a method": closure(BLOCK.normed),
    "decorated": wrapped(GLOBAL),
    "cached": functools.cache(helper),
    "default": lambda x, part=GLOBAL: part(x),
    "list": (lambda parts: lambda x: [p(x) for p in parts][-1])([nn.Linear(3, 3), GLOBAL]),
    "dict": (lambda parts: lambda x: parts["a"](x))({"a": GLOBAL}),
    "object": Plain(GLOBAL),
    "object with slots": Slotted(GLOBAL),
    "method of an object": Plain(GLOBAL).run,
    "compiled": torch.compile(helper, backend="eager"),
    "method": BLOCK.normed,
    "lambda over self": (lambda self: lambda x: self.norm(self.fc1(x)))(BLOCK),
    "method through another": BLOCK.through,
    "loop": BLOCK.listed,
    "getattr": BLOCK.by_name,
    "self handed on": BLOCK.handed_on,
    "nested lambdas": BLOCK.rebuilt,
    "self changed": BLOCK.counting,
    "property": BLOCK.by_property,
}
WITHOUT_NORM: dict[str, Any] = {
    "module": nn.Linear(3, 3),
    "function of torch": torch.ones_like,
    "functional": torch.nn.functional.gelu,
    "method of a tensor": Tensor.relu,
    "method": BLOCK.plain,
    "method through another": BLOCK.through_plain,
    "partial": functools.partial(call, BLOCK.fc1),
    "lambda over self": (lambda self: lambda x: self.fc1(x) + self.plain(x))(BLOCK),
    "closure over a method": closure(BLOCK.plain),
    "object": Plain(nn.ReLU()),
}


@pytest.mark.parametrize("kind", WITH_NORM)
def test_a_batch_norm_is_found(kind: str) -> None:
    held = held_modules(WITH_NORM[kind])
    assert held is not None and len(batch_norms(held)) == 1


@pytest.mark.parametrize("kind", WITHOUT_NORM)
def test_a_norm_of_another_branch_is_not(kind: str) -> None:
    held = held_modules(WITHOUT_NORM[kind])
    assert held is not None and not batch_norms(held)


def test_a_method_holds_what_it_names() -> None:
    held = held_modules(BLOCK.plain)
    assert held == [BLOCK.fc1]
    assert set(map(id, held_modules(BLOCK.normed) or ())) == {id(BLOCK.fc2), id(BLOCK.norm)}


def test_what_is_put_in_later_is_seen() -> None:
    block = Block()
    assert not batch_norms(held_modules(block.plain) or ())
    block.fc1 = nn.BatchNorm1d(3)
    assert batch_norms(held_modules(block.plain) or ()) == [block.fc1]


def test_code_that_cannot_be_read_is_said_to_be_so() -> None:
    assert held_modules(operator.methodcaller("relu")) is None
    assert held_modules(closure(operator.methodcaller("relu"))) is None


@pytest.mark.parametrize(
    ("module", "takes"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.LazyBatchNorm1d(), True),
        (timm.layers.BatchNormAct2d(3), True),
        (timm.layers.EvoNorm2dB0(4), True),
        (timm.layers.FrozenBatchNormAct2d(3), False),
        (torchvision.ops.FrozenBatchNorm2d(3), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
    ],
    ids=lambda v: type(v).__name__,
)
def test_batch_statistics(module: nn.Module, takes: bool) -> None:
    assert takes_batch_statistics(module) is takes
    assert batch_norms([module]) == ([module] if takes else [])
    assert batch_norms([module.eval()]) == [], "in evaluation it takes none"


def test_a_batch_norm_without_statistics_of_its_own_takes_the_batchs_in_evaluation_too() -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=False).eval()
    assert batch_norms([norm]) == [norm]


@pytest.mark.parametrize(
    ("kept", "norms", "expected"),
    [
        (0, [], 0),
        (1, [], 1),
        (3, [], 3),
        (0, [nn.BatchNorm1d(3)], 0),
        (1, [nn.BatchNorm1d(3)], 8),
        (2, [nn.BatchNorm1d(3)], 2),
        (8, [nn.BatchNorm1d(3)], 8),
        (0, None, 0),
        (1, None, 8),
        (2, None, 2),
    ],
)
def test_samples_to_compute(kept: int, norms: list[nn.Module] | None, expected: int) -> None:
    assert samples_to_compute(kept, 8, norms) == expected


def test_a_synchronised_batch_norm_never_keeps_other_processes_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[nn.Module] = [nn.SyncBatchNorm(3)]
    assert samples_to_compute(0, 8, norms) == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert samples_to_compute(0, 8, norms) == 8


def test_left_alone_whatever_happens() -> None:
    norm, frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
    with pytest.raises(RuntimeError), left_alone([norm, frozen]):
        norm(torch.randn(4, 3))
        raise RuntimeError
    assert norm.training and not frozen.training
    assert int(norm.num_batches_tracked) == 0 and not norm.running_mean.any()
