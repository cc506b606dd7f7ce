"""Two linear layers with an activation between them: any part of the gradients, and what they leave as it was."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from layers import fast
from layers.fast import linear, plain_paths, takes
from layers.fast_mlp import ACTS, _act_gradient, linear_act, mlp
from tests.layers.test_fast import error, nodes

pytestmark = pytest.mark.skipif(not takes(torch.empty(1)), reason="torch without oneDNN has no fast paths")


def inputs() -> list[torch.Tensor]:
    """Input of 600 rows, weight and bias of both layers."""
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((6, 100, 32), (96, 32), (96,), (48, 96), (48,))]


def called(given: list[torch.Tensor], act: str) -> torch.Tensor:
    x, weight1, bias1, weight2, bias2 = given
    return mlp(x, weight1, bias1, weight2, bias2, act)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("act", ACTS)
def test_each_part_of_the_gradients_alone(act: str) -> None:
    plain = [x.double().requires_grad_() for x in inputs()]
    y = F.linear(ACTS[act](F.linear(*plain[:3])), *plain[3:])
    upstream = torch.randn(y.shape)
    expected = torch.autograd.grad(y, plain, upstream.double())
    for wanted in itertools.product([True, False], repeat=5):
        if not any(wanted):
            continue
        given = [x.requires_grad_(want) for x, want in zip(inputs(), wanted, strict=True)]
        found = called(given, act)
        assert error(found.detach(), y.detach()) < 1e-6 and "_MlpBackward" in nodes(found)
        found.backward(upstream)
        for x, want, reference in zip(given, wanted, expected, strict=True):
            assert (x.grad is None) if not want else error(x.grad, reference) < 2e-6  # type: ignore[arg-type]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("act", ACTS)
def test_a_second_backward_pass_finds_what_the_first_found(act: str) -> None:
    given = [x.requires_grad_() for x in inputs()]
    y = called(given, act)
    upstream = torch.randn(y.shape)
    before = upstream.clone()
    first = torch.autograd.grad(y, given, upstream, retain_graph=True)
    second = torch.autograd.grad(y, given, upstream)
    assert torch.equal(upstream, before), "an upstream gradient is not ours to change"
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("act", ACTS)
def test_without_gradients(act: str) -> None:
    x, weight, bias, *_ = inputs()
    with torch.no_grad():
        assert error(linear_act(x, weight, bias, act), ACTS[act](F.linear(x, weight, bias)).double()) < 1e-6
        found = called(inputs(), act)
    with plain_paths():
        assert error(found, F.linear(ACTS[act](F.linear(x, weight, bias)), *inputs()[3:]).double()) < 1e-6


def test_a_bias_whose_numbers_do_not_lie_one_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_HAS_FAST_MKL", False)
    monkeypatch.setattr(fast, "FEWEST_PRODUCTS", 1)
    x, weight1, bias1, weight2, bias2 = inputs()
    for lying in (lambda b: torch.stack((b, b + 9), 1)[:, 0], lambda b: b[7].expand(b.shape)):
        one, two = lying(bias1), lying(bias2)
        assert not one.is_contiguous() and not two.is_contiguous()
        hidden = F.linear(x.double(), weight1.double(), one.double())
        for act in ("gelu", "relu"):
            exact = F.linear(ACTS[act](hidden), weight2.double(), two.double())
            for mode in (torch.enable_grad, torch.no_grad):
                with mode():
                    assert error(mlp(x, weight1, one, weight2, two, act), exact) < 1e-6
        assert error(linear(x, weight1, one), hidden) < 1e-6


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("act", ACTS)
def test_a_backward_pass_under_autocast_computes_in_float32(act: str) -> None:
    # so few channels that torch's products are taken, which autocast gives another dtype than the hidden tensor's
    given = [torch.randn(s).requires_grad_() for s in ((512, 8), (48, 8), (48,), (8, 48), (8,))]
    plain = [x.detach().double().requires_grad_() for x in given]
    exact = F.linear(ACTS[act](F.linear(*plain[:3])), *plain[3:])
    upstream = torch.randn(exact.shape)
    y = called(given, act)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, given, upstream, retain_graph=True)
        again = torch.autograd.grad(y, given, upstream, create_graph=True)
    expected = torch.autograd.grad(exact, plain, upstream.double())
    for a, b, reference in zip(found, again, expected, strict=True):
        assert error(a, reference) < 2e-6 and error(b.detach(), reference) < 2e-6


@pytest.mark.usefixtures("cpu_kernels")
def test_a_hidden_tensor_and_a_gradient_of_different_dtypes() -> None:
    # as hooks on saved tensors can make them; the kernel would read and write behind the end of the smaller one
    x, grad = torch.randn(64, 48), torch.randn(64, 48).bfloat16()
    exact = torch.ops.aten.gelu_backward(grad.double(), x.double())
    y, found, sums = _act_gradient(x, grad, "gelu")
    assert sums is None and error(found, exact) < 3e-3 and error(y, F.gelu(x.double())) < 1e-6


def plainly(given: list[torch.Tensor], act: str) -> torch.Tensor:
    return F.linear(ACTS[act](F.linear(*given[:3])), *given[3:])  # type: ignore[arg-type]


def outcome(form: Any, wanted: tuple[bool, ...], changed: int | None, unkept: Any) -> bool:
    """Whether a backward pass succeeds; an input was changed in place before, those without gradients came of a mode."""
    with unkept():
        frozen = [x.clone() for x in inputs()]
    given = [x.requires_grad_() if want else y for x, y, want in zip(inputs(), frozen, wanted, strict=True)]
    try:
        y = form(given, "gelu")
        with torch.no_grad():
            if changed is not None:
                given[changed].add_(1)
        y.sum().backward()
    except RuntimeError:
        return False
    return True


def test_what_is_not_trained_may_be_changed_in_place_or_come_of_inference_mode_as_of_torch() -> None:
    found = set()
    for wanted in itertools.product([True, False], repeat=5):
        if not any(wanted):
            continue
        for changed in (i for i in range(5) if not wanted[i] or i == 4):
            may = outcome(plainly, wanted, changed, nullcontext)
            assert outcome(called, wanted, changed, nullcontext) == may, (wanted, changed)
            found.add(may)
        may = outcome(plainly, wanted, None, torch.inference_mode)
        assert outcome(called, wanted, None, torch.inference_mode) == may, wanted
        found.add(may)
    assert found == {True, False}


@pytest.mark.parametrize("act", ACTS)
def test_second_derivatives_of_each_part_alone(act: str) -> None:
    for wanted in itertools.product([True, False], repeat=5):
        if not any(wanted[:4]):
            continue
        seconds = []
        for form, dtype in ((called, torch.float32), (plainly, torch.float64)):
            given = [x.to(dtype).requires_grad_(want) for x, want in zip(inputs(), wanted, strict=True)]
            upstream = torch.linspace(-1, 1, 48, dtype=dtype).expand(6, 100, 48).clone().requires_grad_()
            parts = [x for x in given if x.requires_grad]
            first = torch.autograd.grad(form(given, act), parts, upstream, create_graph=True)
            whole = sum(g.square().sum() for g in first)
            seconds.append(torch.autograd.grad(whole, [upstream, *parts], materialize_grads=True))  # type: ignore[arg-type]
        for found, exact in zip(*seconds, strict=True):
            assert error(found, exact) < 1e-5 or found.norm() == exact.norm() == 0, wanted
