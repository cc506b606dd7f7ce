"""A GPU's kernels as functions of autograd, in Triton's interpreter where there is no GPU, and when they are taken."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers import fast_cuda
from tests.layers.parts import DEVICE


def random(*shape: int, shift: float = 0.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE) + shift


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-3)


def plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x.movedim(-1, 1), 1, weight, bias, 1e-3).movedim(1, -1)


Form = Callable[..., Tensor]
FORMS: dict[str, tuple[Form, Form, list[tuple[int, ...]]]] = {
    "layer norm": (
        lambda x, weight, bias: fast_cuda.layer_norm(x, weight, bias, 1e-3),
        plain_layer_norm,
        [(3, 4, 5, 6), (6,), (6,)],
    ),
    "group norm": (
        lambda x, weight, bias: fast_cuda.group_norm(x, weight, bias, 1e-3),
        plain_group_norm,
        [(3, 4, 5, 6), (6,), (6,)],
    ),
    "pooling": (
        lambda x: fast_cuda.mean_minus_self(x, 3),
        lambda x: fast_cuda.plain_mean_minus_self(x, 3),
        [(3, 4, 5, 6)],
    ),
    "star relu": (fast_cuda.star_relu, fast_cuda.plain_star_relu, [(3, 4, 5, 6), (1,), (1,)]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_gradients_and_many_at_once(name: str) -> None:
    form, plain, shapes = FORMS[name]
    torch.manual_seed(0)
    inputs = [random(*shape, shift=0.5).requires_grad_() for shape in shapes]

    def of(form: Form) -> list[Tensor]:
        y = form(*inputs)
        weights = torch.linspace(-1.0, 2.0, y.numel(), device=DEVICE).view(y.shape)
        first = torch.autograd.grad((y * weights).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), inputs)
        few = weights.expand(2, *y.shape) * torch.tensor([1.0, 2.0], device=DEVICE).view(2, *(1,) * y.ndim)
        many = torch.autograd.grad(form(*inputs), inputs, few, is_grads_batched=True)
        return [y.detach(), *first, *second, *many]

    with torch.no_grad():
        torch.testing.assert_close(form(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)
    for got, want in zip(of(form), of(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", [fast_cuda.layer_norm, fast_cuda.group_norm])
def test_the_result_has_the_dtype_that_is_wanted(form: Form) -> None:
    x, weight = random(2, 3, 3, 8), random(8)
    assert form(x, weight, None, 1e-5).dtype == torch.float32
    y = form(x.requires_grad_(), weight, None, 1e-5, torch.bfloat16)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert form(x.bfloat16(), weight, None, 1e-5).dtype == torch.float32, "as torch's norms under autocast"


def test_kernels_are_not_for_the_cpu() -> None:
    assert not fast_cuda.has_kernels(torch.zeros(2**19)) and not fast_cuda.has_kernels(None)
    assert not fast_cuda.takes_norm(torch.zeros(2**14, 32), torch.ones(32), None)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without CUDA")
def test_where_no_kernel_runs_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as where the C compiler is missing that Triton needs."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(fast_cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fast_cuda._work.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton's kernels do not work on cuda:0, so training is slower there \("):
            assert not fast_cuda._work(device)
        assert not fast_cuda._work(device)
        fast_cuda._work.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not fast_cuda._work(device), "too old, which is no fault"
    finally:
        fast_cuda._work.cache_clear()
