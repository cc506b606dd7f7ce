"""Samples on a GPU, in Triton's interpreter where there is none (conftest.py): equal to torch's own forms, gradients too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layers import samples_cuda
from layers.draw import Draw
from layers.fast import is_eager
from tests.layers.parts import DEVICE

pytestmark = pytest.mark.usefixtures("kernels")
LAYOUTS = {
    "rows": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
}


@pytest.fixture(autouse=True)
def small_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are taken too, on the device of these tests."""
    monkeypatch.setattr(samples_cuda, "takes_samples", lambda x: is_eager(x, DEVICE))


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def gradients(form: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Result and gradients of a form."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = form(*inputs)
    weights = torch.linspace(-1.0, 2.0, y.numel(), device=DEVICE).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("computed", "counting"), [(4, 4), (4, 3), (1, 0), (0, 0)])
def test_a_draw_equals_its_mask(layout: str, computed: int, counting: int) -> None:
    """What is computed and does not count changes nothing, and gets no gradient."""
    torch.manual_seed(0)
    x, weight = LAYOUTS[layout](batch(6, 3, 2, 5)), batch(3, 1, 1)
    order = torch.randperm(6, device=DEVICE)
    scale = torch.tensor(1.25)
    draw = Draw(6, scale, order[:computed], order=order, counting=counting)
    mask = torch.zeros(6, 1, 1, 1, device=DEVICE).index_fill(0, order[:counting], 1.25)
    seen: list[int] = []

    def branch(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.sin(x) * weight

    def added(x: Tensor, weight: Tensor) -> Tensor:
        taken, shortcut = draw.split(x)
        return draw.add(shortcut, branch(taken, weight))

    def put(x: Tensor, weight: Tensor) -> Tensor:
        return x + draw.put_scaled(branch(draw.take(x), weight))

    expected = gradients(lambda x, weight: x + torch.sin(x) * weight * mask, x, weight)
    for form in (added, put):
        for got, want in zip(gradients(form, x, weight), expected, strict=True):
            torch.testing.assert_close(got, want)
    assert seen == [computed] * 2
    assert torch.equal(draw.as_mask().scaled(torch.ones_like(x)), mask.expand_as(x))


def test_without_gradients() -> None:
    """As in a Monte-Carlo evaluation, where dropped samples are dropped too."""
    torch.manual_seed(0)
    x, order = batch(5, 4), torch.randperm(5, device=DEVICE)
    draw = Draw(5, torch.tensor(1.25), order[:3], order=order, counting=2)
    mask = torch.zeros(5, 1, device=DEVICE).index_fill(0, order[:2], 1.25)
    with torch.no_grad():
        taken, shortcut = draw.split(x)
        torch.testing.assert_close(draw.add(shortcut, torch.sin(taken)), x + torch.sin(x) * mask)
        torch.testing.assert_close(draw.put_scaled(torch.sin(draw.take(x))), torch.sin(x) * mask)


@pytest.mark.parametrize("groups", [1, 3])
def test_what_is_put_lies_where_it_was_taken(groups: int) -> None:
    torch.manual_seed(0)
    x, order = batch(4 * groups, 5), torch.randperm(4, device=DEVICE)
    draw = Draw(4, torch.tensor(2.0), order[:3], order=order, counting=3)
    kept = torch.zeros(4, 1, device=DEVICE).index_fill(0, order[:3], 1.0).repeat_interleave(groups, 0)
    assert torch.equal(draw.put(draw.take(x, groups), groups), x * kept)


def test_a_branch_of_half_precision_is_added_in_the_shortcuts() -> None:
    torch.manual_seed(0)
    x, out, order = batch(5, 8), batch(3, 8).bfloat16(), torch.randperm(5, device=DEVICE)
    draw = Draw(5, torch.tensor(1.5), order[:3], order=order)
    y, of_x, of_out = gradients(draw.add, x, out)
    assert (y.dtype, of_x.dtype, of_out.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    torch.testing.assert_close(y, x.index_add(0, order[:3], out.float(), alpha=1.5))


@pytest.mark.parametrize("counting", [3, 2])
def test_gradients_of_gradients_and_many_at_once(counting: int) -> None:
    torch.manual_seed(0)
    order = torch.randperm(5, device=DEVICE)
    draw = Draw(5, torch.tensor(1.25), order[:3], order=order, counting=counting)

    def form(x: Tensor) -> Tensor:
        taken, shortcut = draw.split(x)
        return draw.add(shortcut, torch.sin(taken))

    mask = torch.zeros(5, 1, device=DEVICE).index_fill(0, order[:counting], 1.25)
    x = batch(5, 4).requires_grad_()

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(form(x)), second(x + torch.sin(x) * mask))
    many = torch.eye(20, device=DEVICE).view(20, 5, 4)
    (got,) = torch.autograd.grad(form(x), x, many, is_grads_batched=True)
    (want,) = torch.autograd.grad(x + torch.sin(x) * mask, x, many, is_grads_batched=True)
    torch.testing.assert_close(got, want)
