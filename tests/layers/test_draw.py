"""Draw: what is taken, how it is scaled, added and put back, eager and compiled."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from layers.draw import Draw, per_sample
from layers.drop_path import DropPath, Mode

KEPT = [None, [2, 0], [1], []]


def draw(kept: list[int] | None, scale: Tensor | None) -> Draw:
    """Of four samples."""
    return Draw(4, scale, None if kept is None else torch.tensor(kept, dtype=torch.int64))


def rows(kept: list[int] | None) -> list[int]:
    return list(range(4)) if kept is None else kept


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kept", [[2, 0], [1], []])
def test_what_is_taken_is_put_back(kept: list[int], groups: int) -> None:
    draw = Draw(4, torch.tensor(2.0), torch.tensor(kept, dtype=torch.int64))
    x = torch.randn(4 * groups, 5)
    rows = [i * groups + j for i in kept for j in range(groups)]
    assert torch.equal(draw.take(x, groups), x[rows])
    full = torch.zeros_like(x)
    full[rows] = x[rows]
    assert torch.equal(draw.put(x[rows], groups), full)
    if groups == 1:
        assert torch.equal(draw.put_scaled(x[rows]), 2 * full)
        taken, shortcut = draw.split(x)
        assert torch.equal(taken, x[rows]) and torch.equal(shortcut, x)
        mask = draw.as_mask()
        assert mask.kept is None and torch.equal(draw.add(x, x[rows]), x + 2 * full)
        assert torch.equal(mask.scaled(x), 2 * full) and torch.equal(mask.add(x, x), x + 2 * full)
        assert mask.as_mask() is mask and mask.take(x) is x and mask.put(x) is x


@pytest.mark.parametrize("groups", [1, 3])
def test_all_samples_are_the_input_itself(groups: int) -> None:
    x = torch.randn(4 * groups, 5)
    whole = draw(None, torch.tensor(2.0))
    assert whole.take(x, groups) is x and whole.put(x, groups) is x and whole.as_mask() is whole
    assert all(part is x for part in whole.split(x)) and torch.equal(whole.put_scaled(x), 2 * x)


def test_a_draw_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        draw([1], None).batch = 3  # type: ignore[misc]


@pytest.mark.parametrize("kept", KEPT)
def test_without_a_scale_nothing_is_scaled(kept: list[int] | None) -> None:
    x, out = torch.randn(4, 3), torch.randn(len(rows(kept)), 3)
    plain = draw(kept, None)
    assert plain.scaled(out) is out and plain.as_mask() is plain
    expected = x.clone()
    expected[rows(kept)] += out
    assert torch.equal(plain.add(x, out), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5, 3)])
def test_each_sample_has_its_factor(shape: tuple[int, ...]) -> None:
    scale, out, shortcut = torch.tensor([0.0, 2.0, 3.0, 0.5]), torch.randn(shape), torch.randn(shape)
    expected = torch.stack([factor * sample for factor, sample in zip(scale, out, strict=True)])
    mask = Draw(4, scale)
    assert torch.equal(mask.scaled(out), expected)
    torch.testing.assert_close(mask.add(shortcut, out), shortcut + expected)
    assert torch.equal(mask.add(shortcut, out)[0], shortcut[0]), "dropped: the shortcut, to the bit"
    few = Draw(4, scale[1:3], torch.tensor([3, 1]))
    put = torch.zeros_like(out)
    put[3], put[1] = 2 * out[0], 3 * out[1]
    assert torch.equal(few.put_scaled(out[:2]), put)
    added = shortcut.clone()
    added[3] += 2 * out[0]
    added[1] += 3 * out[1]
    torch.testing.assert_close(few.add(shortcut, out[:2]), added)


def test_per_sample_broadcasts_over_the_rest() -> None:
    x = torch.randn(4, 2, 3).bfloat16()
    assert per_sample(torch.ones(4), x).shape == (4, 1, 1) and per_sample(torch.ones(4), x).dtype == torch.bfloat16
    assert per_sample(torch.tensor(2.0), x).shape == () and per_sample(torch.ones(4), x[:, 0, 0]).shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kept", KEPT)
def test_the_sum_has_the_shortcuts_dtype(kept: list[int] | None, dtype: torch.dtype) -> None:
    shortcut, out = torch.randn(4, 3, dtype=dtype), torch.randn(len(rows(kept)), 3).bfloat16()
    for scale in (None, torch.tensor(1.25, dtype=dtype), torch.full((len(out),), 1.25, dtype=dtype)):
        found = draw(kept, scale).add(shortcut, out)
        assert found.dtype == dtype
        expected = shortcut.double()
        expected[rows(kept)] += out.double() * (1.0 if scale is None else 1.25)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("kept", KEPT)
def test_one_factor_is_added_in_one_pass_as_compiled_code_adds_it(
    kept: list[int] | None, compilations: Callable[[], tuple[int, int]]
) -> None:
    """Eager code reads the factor as a number; compiled code, which may not, multiplies by a tensor."""

    def add(shortcut: Tensor, out: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
        return Draw(4, scale, index).add(shortcut, out)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        shortcut = torch.linspace(-1, 1, 24).sin().reshape(4, 6).requires_grad_()
        out = torch.linspace(-2, 3, 6 * len(rows(kept))).cos().reshape(-1, 6).requires_grad_()
        index = None if kept is None else torch.tensor(kept, dtype=torch.int64)
        y = function(shortcut, out, torch.tensor(1 / 0.7), index)
        upstream = torch.linspace(0, 5, 24).cos().reshape(4, 6)
        return [y.detach(), *torch.autograd.grad(y, [shortcut, out], upstream)]

    found, compiled = run(add), run(torch.compile(add, backend="eager", fullgraph=True))
    assert compilations() == (1, 0)
    for a, b in zip(found, compiled, strict=True):
        torch.testing.assert_close(a, b)
    upstream = torch.linspace(0, 5, 24).cos().reshape(4, 6)
    assert torch.equal(found[1], upstream)
    torch.testing.assert_close(found[2], upstream[rows(kept)] / 0.7)


def test_no_sample_kept_leaves_the_shortcut_and_gives_zero_gradients() -> None:
    shortcut, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    empty = draw([], torch.tensor(2.0))
    y = empty.add(shortcut, empty.take(shortcut) @ weight)
    assert torch.equal(y, shortcut)
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert shortcut.grad is not None and torch.equal(shortcut.grad, torch.ones(4, 3))
    assert torch.equal(empty.as_mask().add(shortcut, shortcut * 3), shortcut)


def test_a_mask_keeps_factors_and_places() -> None:
    kept = Draw(4, torch.tensor([2.0, 3.0]), torch.tensor([3, 1]))
    assert torch.equal(kept.as_mask().scale, torch.tensor([0.0, 3.0, 0.0, 2.0]))  # type: ignore[arg-type]


def state_after(call: Callable[[], object]) -> Tensor:
    torch.manual_seed(3)
    call()
    return torch.get_rng_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
def test_what_nobody_reads_takes_the_same_numbers(mode: Mode, batch: int, dtype: torch.dtype) -> None:
    """At rate 0, where nothing is made of them, in each of the ways in which they are drawn."""

    def numbers() -> None:
        if mode != "mask":
            torch.rand((), dtype=torch.float64)
        torch.rand(batch)

    default, x = torch.get_default_dtype(), torch.zeros(batch, 2)
    torch.set_default_dtype(dtype)
    try:
        expected, module = state_after(numbers), DropPath(0.0, mode=mode)
        for _ in range(2):  # with new memory, then in the same
            assert torch.equal(state_after(lambda: module(x)), expected)
        with torch.device("cpu"):  # a mode that looks on
            assert torch.equal(state_after(lambda: module(x)), expected)
        assert torch.equal(state_after(lambda: torch.func.jvp(module, (x,), (x,))), expected)
        assert module.samples_seen == 3 * batch and module.samples_dropped == 0  # not of torch.func's
    finally:
        torch.set_default_dtype(default)


def test_memory_of_unread_numbers_is_of_no_mode() -> None:
    module, x = DropPath(0.0, mode="skip"), torch.zeros(77, 2)  # a batch of no other test
    with FakeTensorMode():
        assert module(torch.zeros(77, 2)).shape == (77, 2)
    with torch.inference_mode():
        module(x)
    expected = state_after(lambda: (torch.rand((), dtype=torch.float64), torch.rand(77)))
    assert torch.equal(state_after(lambda: module(x)), expected)
