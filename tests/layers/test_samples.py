"""Taking, putting, adding and replacing samples against torch's own forms: values, gradients, layouts, and who gets which."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from layers import samples
from layers.fast import plain_paths
from layers.samples import add_samples, put_samples, replace_samples, split_samples, take_samples

KEPT = torch.tensor([0, 2, 3, 6])
BATCH = 7
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "take": (lambda x, out: take_samples(x, KEPT), lambda x, out: x.index_select(0, KEPT)),
    "split": (
        lambda x, out: torch.cat(split_samples(x, KEPT)),
        lambda x, out: torch.cat([x.index_select(0, KEPT), x]),
    ),
    "put": (
        lambda x, out: put_samples(out, KEPT, BATCH, 1.5),
        lambda x, out: torch.zeros_like(x).index_add(0, KEPT, out * 1.5),
    ),
    "put as it is": (
        lambda x, out: put_samples(out, KEPT, BATCH),
        lambda x, out: torch.zeros_like(x).index_add(0, KEPT, out),
    ),
    "add": (
        lambda x, out: add_samples(x, KEPT, out, 1.5),
        lambda x, out: x.index_add(0, KEPT, out, alpha=1.5),
    ),
    "replace": (lambda x, out: replace_samples(x, KEPT, out), lambda x, out: x.index_copy(0, KEPT, out)),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "images": (5, 6, 4),
    "tokens": (9, 4),
    "one number": (),
    "numbers": (3,),
    "rows": (3, 2, 4, 2),
}
LAYOUTS = ["contiguous", "channels_last", "transposed", "expanded"]


@pytest.fixture(autouse=True, params=["runs", "sweeps"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(samples, "SMALL_BATCH", 0)
    if request.param == "runs":
        monkeypatch.setattr(samples, "LONG_RUN", 0)


def laid_out(batch: int, shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    if layout == "expanded":
        return torch.randn(batch, *(1 for _ in shape), dtype=dtype).expand(batch, *shape)
    x = torch.randn(batch, *shape, dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


def results(form: Callable[[Tensor, Tensor], Tensor], x: Tensor, out: Tensor, upstream: str) -> list[Tensor | None]:
    """What comes out, and the gradients of both inputs."""
    x, out = x.detach().requires_grad_(), out.detach().requires_grad_()
    y = form(x, out)
    torch.manual_seed(1)
    grad = laid_out(len(y), tuple(y.shape[1:]), upstream, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, out], grad, allow_unused=True)]


def cases() -> list[tuple[str, str]]:
    return [
        (shape, layout)
        for shape, sizes in SHAPES.items()
        for layout in LAYOUTS
        if (layout != "channels_last" or len(sizes) == 3) and (sizes or layout == "contiguous")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, layout", cases())
@pytest.mark.parametrize("name", FORMS)
def test_equals_torchs(name: str, shape: str, layout: str, dtype: torch.dtype) -> None:
    fast, plain = FORMS[name]
    x, out = (laid_out(size, SHAPES[shape], layout, dtype) for size in (BATCH, len(KEPT)))
    for upstream in {layout, "contiguous"}:
        for a, b in zip(results(fast, x, out, upstream), results(plain, x, out, upstream), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.dtype == b.dtype
                # in bfloat16 a sum may be rounded once or twice
                rtol, atol = (0.02, 0.01) if dtype == torch.bfloat16 else (1e-6, 1e-6)
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        if name in ("take", "split", "replace", "put as it is"):
            assert torch.equal(fast(x, out), plain(x, out)), "copies, to the bit"


@pytest.mark.parametrize("name", FORMS)
def test_channels_last_memory_stays(name: str) -> None:
    x, out = (laid_out(size, (5, 6, 4), "channels_last").requires_grad_() for size in (BATCH, len(KEPT)))
    y = FORMS[name][0](x, out)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    grads = torch.autograd.grad(y, [x, out], torch.randn_like(y), allow_unused=True)
    assert all(g is None or g.is_contiguous(memory_format=torch.channels_last) for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("name", FORMS)
def test_what_comes_out_may_be_changed_in_place(name: str, layout: str) -> None:
    """As a residual network does that adds its shortcut in place."""
    x, out = (laid_out(size, (5, 6, 4), layout) for size in (BATCH, len(KEPT)))
    found, expected = (
        results(lambda x, out, form=form: form(x, out).mul_(2.0).relu_(), x, out, layout) for form in FORMS[name]
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kept", [[], [0], list(range(BATCH))])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_none_one_and_all(kept: list[int], layout: str) -> None:
    index, x = torch.tensor(kept, dtype=torch.long), laid_out(BATCH, (5, 6, 4), layout).requires_grad_()
    taken = take_samples(x, index)
    assert torch.equal(taken, x.index_select(0, index))
    assert torch.equal(put_samples(taken, index, BATCH, 2.0), torch.zeros_like(x).index_add(0, index, 2.0 * taken))
    added = add_samples(x, index, taken, 2.0)
    torch.testing.assert_close(added, x.index_add(0, index, taken, alpha=2.0))
    (found,) = torch.autograd.grad(added.sum(), x)
    expected = torch.ones_like(x).index_add(0, index, 2.0 * torch.ones_like(taken))
    torch.testing.assert_close(found, expected)
    assert torch.equal(take_samples(x[:0], index[:0]), x[:0])
    assert put_samples(x[:0], index[:0], 3).shape == (3, 5, 6, 4)


@pytest.mark.parametrize("used", ["taken", "x"])
def test_of_a_split_either_part_may_go_unused(used: str) -> None:
    x = laid_out(BATCH, (2, 3), "contiguous").requires_grad_()
    taken, same = split_samples(x, KEPT)
    assert torch.equal(same, x)
    (found,) = torch.autograd.grad((taken if used == "taken" else same).sum(), x)
    expected = torch.zeros_like(x).index_fill(0, KEPT, 1.0) if used == "taken" else torch.ones_like(x)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert split_samples(x, KEPT)[1] is x


@pytest.mark.parametrize("kept", [[3, 1, 6], [6, 5, 4], [0, 1, 2, 6]])
def test_in_any_order(kept: list[int]) -> None:
    index, x = torch.tensor(kept), laid_out(BATCH, (5, 2), "contiguous").requires_grad_()
    taken, same = split_samples(x, index)
    found = add_samples(same, index, taken, 2.0), put_samples(taken, index, BATCH, 2.0)
    picked = x.index_select(0, index)
    expected = x.index_add(0, index, picked, alpha=2.0), torch.zeros_like(x).index_add(0, index, picked * 2.0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        upstream = torch.randn_like(a)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream, retain_graph=True) for y in (a, b)))


def test_runs_are_taken_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LONG_RUN", 100)
    kept = torch.tensor([0, 2, 3, 6])
    assert samples._runs(kept, torch.empty(7, 72)) == [(1, True), (1, False), (2, True), (2, False), (1, True)]
    assert samples._runs(kept, torch.empty(7, 71)) is None, "five runs of less than 500 numbers"
    assert samples._runs(torch.tensor([2, 0]), torch.empty(7, 500)) is None, "in another order"
    assert samples._runs(torch.arange(7), torch.empty(7, 15)) == [(7, True)]


@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_gradients(name: str) -> None:
    x, out = (laid_out(size, (2, 3), "contiguous").requires_grad_() for size in (BATCH, len(KEPT)))
    used = [x] if name in ("take", "split") else [out] if name.startswith("put") else [x, out]

    def cubed(*inputs: Tensor) -> Tensor:
        given = inputs if len(inputs) == 2 else (inputs[0], out) if used[0] is x else (x, inputs[0])
        return FORMS[name][0](*given) ** 3

    assert torch.autograd.gradcheck(cubed, used)
    assert torch.autograd.gradgradcheck(cubed, used)


@pytest.mark.parametrize("name", FORMS)
def test_many_upstream_gradients_at_once(name: str) -> None:
    x, out = (laid_out(size, (2, 3), "contiguous").requires_grad_() for size in (BATCH, len(KEPT)))
    found, expected = (form(x, out) for form in FORMS[name])
    upstream = torch.randn(3, *found.shape, dtype=found.dtype)
    for a, b in zip(
        torch.autograd.grad(found, [x, out], upstream, is_grads_batched=True, allow_unused=True),
        torch.autograd.grad(expected, [x, out], upstream, is_grads_batched=True, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def fast_nodes(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ in ("_TakeBackward", "_PutBackward", "_AddBackward")


@pytest.mark.parametrize("name", ["take", "put", "add"])
def test_who_gets_torchs_own_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name][0]
    x, out = (laid_out(size, (2, 3), "contiguous").requires_grad_() for size in (BATCH, len(KEPT)))
    expected = form(x, out)
    assert fast_nodes(expected)
    with plain_paths():
        assert not fast_nodes(form(x, out))
    compiled: Any = torch.compile(form, backend="aot_eager", fullgraph=True)
    mapped = torch.func.vmap(lambda x, out: form(x, out))(x[None], out[None])[0]
    for y in (compiled(x, out), mapped):
        torch.testing.assert_close(y, expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert form(mode.from_tensor(x), mode.from_tensor(out)).shape == expected.shape
    strided = (each.transpose(1, 2).detach().requires_grad_() for each in (x, out))
    assert not fast_nodes(form(*strided))
    monkeypatch.setattr(samples, "SMALL_BATCH", x.numel())
    assert fast_nodes(form(x, out)) == (name != "add"), "a small batch is added to sample by sample"
