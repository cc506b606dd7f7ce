"""Fast paths against their plain forms: outputs, gradients, second derivatives, memory, and who gets the plain form."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from layers import fast, fast_conv, fast_cpu
from layers.drop_path import DropPath
from layers.fast import (
    FEWEST_PRODUCTS,
    MANY_ROWS,
    FastLinear,
    call,
    fast_paths,
    is_linear,
    plain_paths,
    scaled,
    set_fast_paths,
    takes,
)
from layers.fast_attention import attention, window_attention
from layers.mlp import ACTIVATIONS, Mlp, StarReLU
from layers.norm import build_norm
from layers.scale import Scale, scaled_branch
from layers.token_mixers import Attention, Identity, Pooling, RandomMixing, SepConv, SpatialMlp
from models.factory import create_model

DIM = 64
LARGE, SMALL, EMPTY = (8, 8, 8, DIM), (1, 4, 4, DIM), (0, 8, 8, DIM)
_FUNCTIONS = ("Linear", "Mlp", "StarReluConv", "MeanMinusSelf", "Attention", "KernelAttention")
ONE_NODE = {f"_{name}Backward" for name in _FUNCTIONS}


class Called(nn.Module):
    """A linear layer called the fast way."""

    def __init__(self, dim: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return call(self.fc, x)


def plain_window_attention(qkv: Tensor, bias: Tensor) -> Tensor:
    """As timm's attention within windows."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D)
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    scores = scores.unflatten(0, (-1, len(bias))) + bias if len(q) else scores[None] + bias
    return (scores.softmax(-1).flatten(0, 1).to(v.dtype) @ v).transpose(1, 2)


class Windows(nn.Module):
    """Attention within windows of 4 x 4 positions, with a bias on its scores."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(dim, 3 * dim), heads
        self.bias = nn.Parameter(torch.randn(1, heads, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.unfold(1, 4, 4).unfold(2, 4, 4).permute(0, 1, 2, 4, 5, 3).reshape(-1, 16, x.shape[-1]))
        form = window_attention if len(x) and takes(x, self) else plain_window_attention
        y = form(parts.view(-1, 16, 3, self.heads, x.shape[-1] // self.heads), self.bias)
        return y.reshape(x.shape)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear tall": lambda: Called(DIM, 256),
    "linear wide": lambda: Called(DIM, 24),
    "linear no bias": lambda: Called(DIM, 256, bias=False),
    **{f"mlp {act}": (lambda act=act: Mlp(DIM, act=act)) for act in ACTIVATIONS},
    "mlp no bias": lambda: Mlp(DIM, bias=False),
    "mlp star_relu no bias": lambda: Mlp(DIM, act="star_relu", bias=False),
    "mlp narrow": lambda: Mlp(DIM, ratio=0.5),
    "sep_conv": lambda: SepConv(DIM),
    "attention": lambda: Attention(DIM, head_dim=16),
    "attention bias": lambda: Attention(DIM, head_dim=16, qkv_bias=True, proj_bias=True),
    "attention in windows": lambda: Windows(DIM, 4),
    "pooling": lambda: Pooling(3),
}
PRECISIONS = ["float32", "bfloat16", "autocast"]
FLOOR = {"float32": 5e-7, "bfloat16": 3e-3, "autocast": 3e-3}
"""Relative error that is nobody's fault."""

needs_bfloat16 = pytest.mark.skipif(
    not takes(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this processor"
)
precisions = pytest.mark.parametrize(
    "precision", ["float32", *(pytest.param(p, marks=needs_bfloat16) for p in PRECISIONS[1:])]
)
pytestmark = pytest.mark.skipif(not takes(torch.empty(1)), reason="torch without oneDNN has no fast paths")


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, and the paths of one vendor's processors, wherever tests run."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast, "_HAS_FAST_MKL", False)


def randomised(module: nn.Module) -> nn.Module:
    """Vectors and scalars away from 0 and 1, where a fault in them would not show."""
    for parameter in module.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def nodes(y: Tensor) -> set[str]:
    """Names of the nodes behind a tensor in autograd's graph."""
    found: dict[Node, str] = {}
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return set(found.values())


def is_fast(y: Tensor) -> bool:
    return bool(nodes(y) & ONE_NODE)


Results = list[Tensor]
Run = Callable[[nn.Module, Tensor], Tensor]


def towards(y: Tensor) -> Tensor:
    """An upstream gradient, the same for every output of a shape."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def results(module: nn.Module, x: Tensor, upstream: Tensor | None = None, run: Run = forward) -> Results:
    """Output, and gradients of the input and of all parameters that have one, in that order."""
    x = x.detach().requires_grad_()
    y = run(module, x)
    upstream = towards(y) if upstream is None else upstream
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-12))


def check_errors(
    module: nn.Module, x: Tensor, precision: str, upstream: Tensor | None = None, run: Run = forward
) -> None:
    """Each result of the fast form is about as near to float64's as that of the plain form."""
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    exact = results(copy.deepcopy(module).double(), x.double(), upstream, run)
    context = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with context:
        fast = results(module, x, upstream, run)
        with plain_paths():
            plain = results(module, x, upstream, run)
    for index, (a, b, reference) in enumerate(zip(fast, plain, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        # one number is a sum over all activations, of both signs
        floor = FLOOR[precision] * (50 if a.numel() == 1 else 1)
        assert error(a, reference) <= 2 * error(b, reference) + floor, index


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu_kernels")
@precisions
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("name", MODULES)
def test_equals_the_plain_form(name: str, shape: tuple[int, ...], precision: str) -> None:
    module = randomised(MODULES[name]())
    check_errors(module, torch.randn(shape), precision)


@pytest.mark.parametrize("name", MODULES)
def test_the_fast_form_runs_where_there_is_much_of_it(name: str) -> None:
    module = MODULES[name]()
    large = is_fast(module(torch.randn(LARGE, requires_grad=True)))
    assert large == (name != "linear wide"), "8 * 8 * 8 * 64 * 24 is less than FEWEST_PRODUCTS"
    assert 512 * DIM * 24 < FEWEST_PRODUCTS <= 512 * DIM * DIM * 3
    with plain_paths():
        assert not is_fast(module(torch.randn(LARGE, requires_grad=True)))


@precisions
@pytest.mark.parametrize("name", ["linear", "mlp gelu"])
def test_weights_wider_than_tall(name: str, precision: str) -> None:
    module = Called(512, 64) if name == "linear" else Mlp(256, ratio=0.25)
    check_errors(module, torch.randn(16, 16, module.get_parameter(next(iter(dict(module.named_parameters())))).shape[1]),
                 precision)  # fmt: skip


@pytest.mark.parametrize("strides", ["dense", "rows apart"])
@pytest.mark.parametrize("name", ["linear tall", "linear wide", "linear no bias", "mlp gelu"])
def test_a_weight_gradient_over_many_rows(name: str, strides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = randomised(MODULES[name]())
    x = torch.randn(16, 16, 17, DIM) if strides == "dense" else torch.randn(16, 16, 17, DIM + 8)[..., 4:-4]
    assert x.numel() // DIM >= MANY_ROWS > x[0].numel() // DIM
    check_errors(module, x, "float32")
    with torch.profiler.profile() as profile:
        results(module, x)
    assert "aten::convolution_backward" in {event.key for event in profile.key_averages()}
    monkeypatch.setattr("layers.fast.MANY_ROWS", x.numel())
    with torch.profiler.profile() as profile:
        results(module, x)
    assert "aten::convolution_backward" not in {event.key for event in profile.key_averages()}


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", MODULES)
def test_memory_in_another_order(name: str) -> None:
    module = randomised(MODULES[name]())
    x = torch.randn(8, DIM, 8, 8).permute(0, 2, 3, 1)
    upstream = torch.randn(8, module(x).shape[-1], 8, 8).permute(0, 2, 3, 1)
    assert not x.is_contiguous() and not upstream.is_contiguous()
    check_errors(module, x, "float32", upstream)
    check_errors(module, x, "float32", torch.ones(()).expand(upstream.shape))  # what sum() sends back


@pytest.mark.usefixtures("cpu_kernels")
@precisions
@pytest.mark.parametrize("name", MODULES)
def test_no_samples(name: str, precision: str) -> None:
    module = MODULES[name]()
    x = torch.randn(EMPTY)
    module, x = (module.bfloat16(), x.bfloat16()) if precision == "bfloat16" else (module, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        y, of_x, *of_weights = results(module, x)
        with plain_paths():
            plain = module(x)
    assert (y.shape, y.dtype) == (plain.shape, plain.dtype) and of_x.shape == x.shape
    assert not any(g.any() for g in of_weights)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", MODULES)
def test_what_needs_no_gradient_gets_none(name: str) -> None:
    module = randomised(MODULES[name]())
    y, of_x, *of_weights = results(module, torch.randn(LARGE))
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(LARGE)
    expected = dict(zip(names, results(module, x)[2:], strict=True))
    if names:
        module(x).backward(towards(y))
    for key, parameter in module.named_parameters():  # the input needs none
        torch.testing.assert_close(parameter.grad, expected[key])
    for frozen in names:
        parameter = module.get_parameter(frozen)
        parameter.requires_grad_(False)
        found = results(module, x)
        others = [expected[key] for key in names if key != frozen]
        assert len(found) == 2 + len(others)
        for a, b in zip(found[2:], others, strict=True):
            torch.testing.assert_close(a, b)
        parameter.requires_grad_(True)
    module.requires_grad_(False)
    assert not module(x).requires_grad and of_x.shape == x.shape and len(of_weights) == len(names)
    assert module(x.requires_grad_()).requires_grad


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", MODULES)
def test_what_comes_out_may_be_changed_in_place(name: str) -> None:
    module, x = randomised(MODULES[name]()), torch.randn(64, 8, 8, DIM)
    run = lambda module, x: module(x).mul_(2.0).relu_()  # noqa: E731
    assert is_fast(module(x.requires_grad_()))
    with plain_paths():
        expected = results(module, x, run=lambda module, x: F.relu(module(x) * 2.0))
    for a, b in zip(results(module, x, run=run), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@precisions
@pytest.mark.parametrize("name", MODULES)
def test_evaluation_equals_the_plain_form(name: str, precision: str, mode: Any) -> None:
    module, x = randomised(MODULES[name]()), torch.randn(LARGE)
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    with mode():
        exact = copy.deepcopy(module).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            fast = module(x)
            with plain_paths():
                plain = module(x)
    assert fast.dtype == plain.dtype
    assert error(fast, exact) <= 2 * error(plain, exact) + FLOOR[precision]


@pytest.mark.parametrize("side, batch", [(5, 3), (7, 9), (3, 3), (9, 3)])
@pytest.mark.parametrize("kernels", [True, False])
@precisions
def test_depthwise_kernels_of_any_size(precision: str, kernels: bool, side: int, batch: int) -> None:
    """Sides of which the gradient is a kernel's or a convolution, with more samples than are taken at a time, and others."""
    calls: list[str] = []
    module = randomised(SepConv(DIM, kernel_size=side))
    x = torch.randn(batch, 11, 13, DIM)
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((fast_conv, "conv"), (fast_cpu, "kernel")):
            real = place.depthwise_weight_gradient
            counted = lambda *args, name=name, real=real: calls.append(name) or real(*args)  # noqa: E731
            patch.setattr(place, "depthwise_weight_gradient", counted)
        patch.setattr(fast_conv, "LARGE_IMAGES", 1)
        patch.setattr(fast_cpu, "FEWEST", 1)
        if not kernels:
            patch.setattr(fast_cpu, "_takes_depthwise", lambda *_: False)
        check_errors(module, x, precision)
    by_kernel = kernels and fast_cpu.library() and side in ((5, 7) if precision == "float32" else (3, 5, 7))
    assert calls == (["kernel"] if by_kernel else ["conv"] if side in (5, 7) else [])


@pytest.mark.parametrize("hidden", [None, 128])
def test_spatial_mlp(hidden: int | None) -> None:
    module = SpatialMlp(8, 8, hidden=hidden)
    x = torch.randn(16, 8, 8, 128)
    assert is_fast(module(x.requires_grad_()))
    check_errors(module, x, "float32")


@precisions
def test_few_rows_are_mkls_on_a_processor_that_it_is_made_for(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_HAS_FAST_MKL", True)
    monkeypatch.setattr(fast, "MANY_ROWS", 512)
    assert 511 * DIM * DIM * 3 >= FEWEST_PRODUCTS
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for rows in (511, 512):
        for module in (Called(DIM, 3 * DIM), Mlp(DIM)):
            x = torch.randn(rows, DIM, dtype=dtype, requires_grad=True)
            module.to(dtype)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
                torch.profiler.profile() as profile,
            ):
                y = module(x)
            onednn = rows == 512 or precision != "float32"
            assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == onednn
            if isinstance(module, Called):
                assert ("_LinearBackward" in nodes(y)) == onednn
            check_errors(module.float(), x.detach().float(), precision)


def test_the_vendor_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"GenuineIntel": True, "AuthenticAMD": False, "": False}
    for vendor, wanted in known.items():
        told = io.StringIO(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        monkeypatch.setattr("builtins.open", lambda path, told=told: told)
        assert fast._has_fast_mkl() == (wanted and torch.backends.mkl.is_available())

    def missing(path: str) -> io.StringIO:
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", missing)
    for processor, wanted in (("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True), ("arm", False)):
        monkeypatch.setattr("platform.processor", lambda processor=processor: processor)
        assert fast._has_fast_mkl() == (wanted and torch.backends.mkl.is_available())


def test_a_weight_with_a_scale_behind_it() -> None:
    weight, bias, scale = torch.randn(3, 2), torch.randn(3), torch.randn(3)
    x = torch.randn(5, 2)
    torch.testing.assert_close(F.linear(x, *scaled(weight, bias, scale)), F.linear(x, weight, bias) * scale)
    assert scaled(weight, None, scale)[1] is None and scaled(weight, bias, None) == (weight, bias)


# ---- a scale per channel, put into weights --------------------------------------------------------------------------

BODIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp(DIM),
    "mlp star_relu no bias": lambda: Mlp(DIM, act="star_relu", bias=False),
    "sep_conv": lambda: SepConv(DIM),
    "attention": lambda: Attention(DIM, head_dim=16, proj_bias=True),
    "pooling": Pooling,
    "identity": Identity,
    "random_mixing": lambda: RandomMixing(64),
}
NORMS = ["group_norm", "group_norm_no_bias", "layer_norm", "layer_norm_no_bias", "affine"]


class Branch(nn.Module):
    """What a block adds to its shortcut, as models/metaformer.py computes it."""

    def __init__(self, norm: str, body: nn.Module) -> None:
        super().__init__()
        self.norm, self.body, self.scale = build_norm(norm, DIM), body, Scale(DIM, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_branch(self.norm, self.body, self.scale, x)


@pytest.mark.parametrize("batch", [8, 1], ids=["many positions", "few positions"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("body", BODIES)
def test_a_scale_in_the_weights(body: str, norm: str, batch: int) -> None:
    branch = randomised(Branch(norm, BODIES[body]()))
    x = torch.randn(batch, 8, 8, DIM)
    check_errors(branch, x, "float32")
    y = branch(x)
    with plain_paths():
        assert type(branch(x).grad_fn).__name__ == "MulBackward0"
    # 64 positions are fewer than the inputs of the last layer of the MLP, 256, and of the convolution's, 128
    behind = batch == 1 and body.startswith(("mlp", "sep_conv"))
    assert (type(y.grad_fn).__name__ == "MulBackward0") == behind


@needs_bfloat16
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("body", BODIES)
def test_a_scale_in_the_weights_in_bfloat16(body: str, precision: str) -> None:
    check_errors(randomised(Branch("group_norm", BODIES[body]())), torch.randn(8, 8, 8, DIM), precision)


@pytest.mark.parametrize("part", ["norm", "body", "scale"])
def test_a_hook_on_a_part_of_a_branch_is_called(part: str) -> None:
    for body in BODIES.values():
        branch, seen = Branch("group_norm", body()), []
        x = torch.randn(8, 8, 8, DIM)
        with plain_paths():
            expected = branch(x)
        branch.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.testing.assert_close(branch(x), expected)
        assert seen == [1]


# ---- derivatives of derivatives -------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A module applied to its own output."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


def second(module: nn.Module, x: Tensor) -> Results:
    """First derivatives, and second ones by a penalty on the first."""
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(module(x).square().mean(), inputs, create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    return [*(g.detach() for g in first), *torch.autograd.grad(penalty, inputs, materialize_grads=True)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", [*MODULES, "twice"])
def test_second_derivatives_are_the_plain_ones(name: str) -> None:
    module = Twice(randomised(Mlp(DIM))) if name == "twice" else randomised(MODULES[name]())
    x = torch.randn(LARGE, requires_grad=True)
    assert is_fast(module(x)) or name == "linear wide"
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second derivatives
        found = second(module, x)
        with plain_paths():
            expected = second(module, x)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b.double()) < (1e-4 if a.numel() <= 2 else 1e-5)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", MODULES)
def test_many_upstream_gradients_at_once(name: str) -> None:
    module, x = randomised(MODULES[name]()), torch.randn(LARGE, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        y = module(x)
        upstream = torch.stack([towards(y), -2 * towards(y).square()])
        return torch.autograd.grad(y, [x, *module.parameters()], upstream, is_grads_batched=True)

    found = gradients()
    with plain_paths():
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        assert error(a, b.double()) < (1e-4 if a.numel() <= 2 else 1e-5)


def through_vmap(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.stack([towards(y), -2 * towards(y).square()])
    return torch.func.vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True))(upstream)


def forward_through_backward(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(towards(y), towards(y).square())
        found = [forward_ad.unpack_dual(of) for of in torch.autograd.grad(y, inputs, upstream)]
    return tuple(part if part is not None else of.primal.new_zeros(()) for of in found for part in of)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("transform", [through_vmap, forward_through_backward])
@pytest.mark.parametrize("name", MODULES)
def test_a_backward_pass_within_a_transform_of_torch_func(name: str, transform: Any) -> None:
    module, x = randomised(MODULES[name]()), torch.randn(LARGE, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no forward mode
        if name == "mlp silu" and transform is forward_through_backward:
            with pytest.raises(NotImplementedError, match="silu_backward"):  # torch has none, and says so
                transform(module(x), [x])
            return
        found = transform(module(x), [x, *module.parameters()])
        with plain_paths():
            expected = transform(module(x), [x, *module.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and error(a, b.double()) < (1e-4 if a.numel() <= 2 else 1e-5)


# ---- who gets the plain form ----------------------------------------------------------------------------------------


@contextmanager
def hooked(register: Callable[[Any], Any]) -> Iterator[None]:
    handle = register(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


GLOBAL = torch.nn.modules.module
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain_paths": plain_paths,
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "FLOP counter": lambda: FlopCounterMode(display=False),
    "forward-mode level": forward_ad.dual_level,
    "global forward hook": lambda: hooked(GLOBAL.register_module_forward_hook),
    "global pre-hook": lambda: hooked(GLOBAL.register_module_forward_pre_hook),
    "global backward hook": lambda: hooked(GLOBAL.register_module_full_backward_hook),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_with_the_plain_form(name: str) -> None:
    x = torch.randn(LARGE, requires_grad=True)
    for body in ("mlp gelu", "sep_conv", "attention", "pooling"):
        module = MODULES[body]()
        assert is_fast(module(x))
        with CONTEXTS[name]():
            assert not is_fast(module(x)), body
        assert is_fast(module(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_get_the_plain_form(dtype: torch.dtype) -> None:
    for body in ("mlp gelu", "sep_conv", "attention", "pooling"):
        assert not is_fast(MODULES[body]().to(dtype)(torch.randn(LARGE, dtype=dtype, requires_grad=True)))


DTYPES_THAT_DIFFER = {
    "input in bfloat16": (torch.bfloat16, torch.float32),
    "weights in bfloat16": (torch.float32, torch.bfloat16),
    "weights in float64": (torch.float32, torch.float64),
}


def refusal(module: nn.Module, x: Tensor) -> str:
    with pytest.raises(RuntimeError) as caught:
        module(x)
    return str(caught.value)


@needs_bfloat16
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("differ", DTYPES_THAT_DIFFER)
@pytest.mark.parametrize("body", ["linear", "linear tall", "mlp gelu", "mlp star_relu", "sep_conv", "attention"])
def test_an_input_of_another_dtype_is_refused_as_torch_does(body: str, differ: str, shape: tuple[int, ...]) -> None:
    given, kept = DTYPES_THAT_DIFFER[differ]
    module = (FastLinear(DIM, 256) if body == "linear" else MODULES[body]()).to(kept)
    x = torch.randn(shape, dtype=given)
    with plain_paths():
        expected = refusal(module, x)
    assert "same dtype" in expected and refusal(module, x) == expected
    with torch.no_grad():
        assert refusal(module, x) == expected
    # autocast casts weights, those in float64 excepted
    with torch.autocast("cpu", torch.bfloat16):
        if kept == torch.float64:
            assert "same dtype" in refusal(module, x)
        else:
            assert module(x).dtype == torch.bfloat16


@needs_bfloat16
def test_a_single_weight_of_another_dtype_is_refused_as_torch_does() -> None:
    for body, part in (("mlp gelu", "fc2"), ("sep_conv", "dwconv"), ("sep_conv", "pwconv2"), ("attention", "proj")):
        module, x = MODULES[body](), torch.randn(LARGE)
        assert is_fast(module(x))
        module.get_submodule(part).to(torch.bfloat16)
        with plain_paths():
            expected = refusal(module, x)
        assert refusal(module, x) == expected


def test_turned_off_and_on() -> None:
    assert fast_paths()
    set_fast_paths(False)
    try:
        assert not fast_paths() and not takes(torch.randn(1))
        with plain_paths():
            pass
        assert not fast_paths(), "plain_paths leaves what it found"
    finally:
        set_fast_paths(True)
    assert takes(torch.randn(1)) and not takes(torch.empty(1, device="meta")) and not takes(torch.ones(1).long())


class Lora(nn.Linear):
    """A linear layer with more to do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Wrapped(Tensor):
    """A weight that is more than numbers, as quantised ones are: it knows the plain form's operators only."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.t.default, aten.detach.default):
            return Wrapped(func(args[0].held))
        if func in (aten.addmm.default, aten.mm.default):
            return func(*[a.held if isinstance(a, Wrapped) else a for a in args])
        raise NotImplementedError(str(func))


def put_lora(mlp: Mlp, linear: str) -> None:
    new = Lora(*reversed(mlp.get_submodule(linear).weight.shape))  # type: ignore[misc, arg-type]
    new.load_state_dict(mlp.get_submodule(linear).state_dict())
    mlp.set_submodule(linear, new)


def replace_forward(mlp: Mlp, name: str) -> None:
    module = mlp.get_submodule(name)
    before = module.forward
    module.forward = lambda x: before(x) + 1.0  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Mlp], Any]] = {
    "layer replaced": lambda mlp: put_lora(mlp, "fc1"),
    "last layer replaced": lambda mlp: put_lora(mlp, "fc2"),
    "forward replaced": lambda mlp: replace_forward(mlp, "fc2"),
    "forward of the activation replaced": lambda mlp: replace_forward(mlp, "act"),
    "parametrised": lambda mlp: parametrize.register_parametrization(mlp.fc1, "weight", Doubled()),
    "pruned": lambda mlp: prune.l1_unstructured(mlp.fc2, "weight", 0.5),
    "another activation": lambda mlp: setattr(mlp, "act", nn.Tanh()),
    "an approximate activation": lambda mlp: setattr(mlp, "act", nn.GELU("tanh")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_modules_that_were_changed_get_the_plain_form(name: str) -> None:
    mlp, x = Mlp(DIM), torch.randn(LARGE)
    before = mlp(x)
    CHANGES[name](mlp)
    y = mlp(x)
    assert not is_fast(y) and not torch.allclose(y, before), "the change is seen"
    with plain_paths():
        assert torch.equal(y, mlp(x))


@pytest.mark.parametrize(
    "layer",
    [FastLinear(DIM, DIM), fast_conv.FastDepthwiseConv2d(DIM, DIM, 7, padding=3, groups=DIM)],
    ids=["linear", "conv"],
)
def test_a_weight_that_is_computed_is_computed_once(layer: nn.Module) -> None:
    # as spectral_norm's, which is another each time that it is read
    layer, read = copy.deepcopy(layer), [0]

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            read[0] += 1
            return x * read[0]

    parametrize.register_parametrization(layer, "weight", Counted())
    x = torch.randn(16, DIM, 16, 16) if isinstance(layer, nn.Conv2d) else torch.randn(LARGE)
    read[0] = 0
    layer(x).sum().backward()
    assert read[0] == 1


def test_weights_that_are_no_plain_tensors_get_the_plain_form() -> None:
    mlp, x = Mlp(DIM).requires_grad_(False), torch.randn(LARGE)
    expected = mlp(x)
    for name in ("fc1", "fc2"):
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(Wrapped(linear.weight.detach()), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    assert is_linear(mlp.fc1) and not takes(x, mlp.fc1)


@pytest.mark.parametrize("body", ["mlp gelu", "sep_conv", "attention"])
def test_a_hook_on_any_part_is_called(body: str) -> None:
    x = torch.randn(LARGE)
    for name, _ in MODULES[body]().named_modules():
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            module, seen = MODULES[body](), []
            with plain_paths():
                expected = module(x)
            getattr(module.get_submodule(name), f"register_{kind}")(lambda *_, seen=seen: seen.append(1))
            y = module(x)
            y.sum().backward()
            assert seen == [1], (name, kind)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", ["mlp gelu", "mlp star_relu", "sep_conv", "attention", "pooling"])
def test_twins_are_the_plain_form(body: str) -> None:
    module, x = MODULES[body]().eval(), torch.randn(LARGE)
    with plain_paths():
        expected = module(x)
    twins = [torch.fx.symbolic_trace(module), torch.jit.script(module), torch.jit.trace(module, x)]
    saved = io.BytesIO()
    torch.jit.save(twins[1], saved)
    saved.seek(0)
    for twin in (*twins, torch.jit.load(saved)):
        assert torch.equal(twin(x), expected)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert is_fast(module(x.requires_grad_()))


@pytest.mark.parametrize("body", ["mlp gelu", "sep_conv", "pooling"])
def test_compiled_and_exported_code_is_the_plain_form(body: str, compilations: Callable[[], tuple[int, int]]) -> None:
    module, x = MODULES[body]().eval(), torch.randn(LARGE)
    with plain_paths():
        expected = module(x)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    assert compilations() == (1, 0)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


def test_functional_transforms_get_the_plain_form() -> None:
    mlp, x = Mlp(DIM), torch.randn(LARGE)
    weights: dict[str, Tensor] = dict(mlp.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(mlp, weights, (x,)).square().mean()

    with plain_paths():
        mlp(x).square().mean().backward()
    for name, found in torch.func.grad(loss)(weights, x).items():
        torch.testing.assert_close(found, mlp.get_parameter(name).grad)
    torch.testing.assert_close(torch.func.vmap(lambda x: loss(weights, x))(x).mean(), loss(weights, x))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for name, found in per_sample.items():
        torch.testing.assert_close(found.mean(0), mlp.get_parameter(name).grad)
    tangent = torch.randn_like(x)
    by_func = torch.func.jvp(lambda x: loss(weights, x), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(weights, forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(by_func, dual)


@pytest.mark.parametrize("body", ["mlp gelu", "sep_conv", "attention"])
def test_flops_are_counted_as_before(body: str) -> None:
    module, x = MODULES[body](), torch.randn(LARGE, requires_grad=True)
    counts = []
    for paths in (nullcontext, plain_paths):
        with paths(), FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1] and sum(counts[0]["Global"].values()) > 0


def test_fake_tensors() -> None:
    with FakeTensorMode():
        for name, make in MODULES.items():
            module, x = make(), torch.randn(LARGE, requires_grad=True)
            y = module(x)
            y.sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape and not is_fast(y), name


# ---- memory ---------------------------------------------------------------------------------------------------------


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward beside weights and the input."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("body", ["mlp gelu", "mlp silu", "mlp star_relu", "sep_conv", "pooling"])
def test_less_is_kept_for_backward(body: str) -> None:
    module, x = MODULES[body](), torch.randn(8, 32, 32, DIM, requires_grad=True)
    hidden = 4 * x.numel() * (4 if body.startswith("mlp") else 2)  # bytes of the wide activations
    slack = 2**19  # scaled weights
    fast = kept_bytes(module, x)
    with plain_paths():
        plain = kept_bytes(module, x)
    if body == "pooling":
        assert fast == 0
    elif body == "sep_conv":
        assert 2 * hidden <= fast < 2 * hidden + slack, "before the activation, and behind the convolution"
        assert plain >= fast + hidden
    else:
        assert hidden <= fast < hidden + slack
        assert plain >= 2 * hidden


@needs_bfloat16
def test_no_copy_of_a_weight_is_kept_under_autocast() -> None:
    module, x = Mlp(256), torch.randn(1, 8, 8, 256, requires_grad=True)
    rows, weights = 64 * (256 + 1024) * 2, 2 * 256 * 1024 * 2  # bytes in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        fast = kept_bytes(module, x)
        with plain_paths():
            plain = kept_bytes(module, x)
    assert rows <= fast < rows + weights // 8 and plain > rows + weights


@needs_bfloat16
def test_attention_keeps_its_parts_and_weights() -> None:
    qkv = torch.randn(2, 100, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)

    class Apart(nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return attention(qkv)

    assert kept_bytes(Apart(), qkv) == 2 * (qkv.numel() + 2 * 2 * 100 * 100)


# ---- whole models ---------------------------------------------------------------------------------------------------

NETS: dict[str, dict[str, Any]] = {
    "poolformer_n4": {"image_size": 32},
    "convformer_n4": {"image_size": 32},
    "caformer_n4": {"image_size": 32},
    "vit_tiny_patch16_224": {"depths": [3], "image_size": 64},
    "deit3_small_patch16_224": {"depths": [2], "image_size": 64},
    "resmlp_12_224": {"depths": [2], "image_size": 64},
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    model = create_model(name, num_classes=5, drop_path_rate=0.4, drop_path_mode="skip", **NETS[name])
    for module in model.modules():
        if isinstance(module, (Scale, StarReLU)):
            randomised(module)
    size = NETS[name]["image_size"]
    return model, torch.randn(16, 3, size, size)


def step(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, ...]]]:
    """Logits, gradients and counts of one step from the same seed."""
    drops = [m for m in model.modules() if isinstance(m, DropPath)]
    for module in drops:
        module.reset_counts()
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 5).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    counts = [(m.samples_seen, m.samples_dropped, m.samples_computed) for m in drops]
    return logits.detach(), gradients, counts


@pytest.mark.parametrize("name", NETS)
def test_a_model_trains_and_evaluates_as_on_plain_paths(name: str) -> None:
    model, images = net(name)
    assert is_fast(model(images))
    logits, gradients, counts = step(model, images)
    with plain_paths():
        plain_logits, plain_gradients, plain_counts = step(model, images)
        evaluated = model.eval()(images).detach()
    assert counts == plain_counts and sum(dropped for _, dropped, _ in counts) > 0
    assert error(logits, plain_logits.double()) < 1e-5
    assert gradients.keys() == plain_gradients.keys()
    whole = torch.stack([g.norm() for g in plain_gradients.values()]).norm()
    for key, gradient in gradients.items():
        # pooling takes a constant away, so that the bias in front of it has a gradient of rounding only
        difference, size = (gradient - plain_gradients[key]).norm(), plain_gradients[key].norm()
        assert difference <= 1e-4 * size + 1e-7 * whole, key
    with torch.no_grad():
        assert error(model(images), evaluated.double()) < 1e-5


@pytest.mark.parametrize("name", ["convformer_n4", "caformer_n4", "poolformer_n4"])
def test_activations_computed_again_give_equal_gradients(name: str) -> None:
    model, images = net(name)
    logits, gradients, _ = step(model, images)
    model.set_grad_checkpointing()  # type: ignore[operator]
    again, same, _ = step(model, images)
    assert torch.equal(again, logits)
    assert all(torch.equal(same[key], gradient) for key, gradient in gradients.items())


@pytest.mark.usefixtures("cpu_kernels")
def test_the_same_step_twice_gives_the_same_bits() -> None:
    model, images = net("caformer_n4")
    (a, of_a, _), (b, of_b, _) = step(model, images), step(model, images)
    assert torch.equal(a, b) and all(torch.equal(of_a[key], of_b[key]) for key in of_a)


# ---- what is kept, and what is no plain tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["weight", "input", "weight and input"])
def test_a_linear_layer_keeps_only_what_its_gradients_are_of(frozen: str) -> None:
    layer, kept = FastLinear(DIM, 4 * DIM), []
    layer.weight.requires_grad_("weight" not in frozen)
    x = torch.randn(LARGE, requires_grad="input" not in frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        y = layer(x)
    assert is_fast(y)
    expected = {"weight": [layer.weight.shape], "input": [x.shape], "weight and input": []}
    assert kept == expected[frozen]
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
    with plain_paths():
        expected_grads = torch.autograd.grad(layer(x).square().sum(), wanted)
    loss = y.square().sum()
    with torch.no_grad():  # as with torch's own layer, what is not kept may change
        layer.bias.add_(1)
    for a, b in zip(torch.autograd.grad(loss, wanted), expected_grads, strict=True):
        assert error(a, b.double()) < 1e-5


@pytest.mark.parametrize("frozen", ["weight", "input", "weight and input"])
def test_second_derivatives_of_a_linear_layer_that_keeps_less(frozen: str) -> None:
    layer = FastLinear(DIM, 4 * DIM)
    layer.weight.requires_grad_("weight" not in frozen)
    x = torch.randn(LARGE, requires_grad="input" not in frozen)
    inputs = [p for p in (x, *layer.parameters()) if p.requires_grad]

    def second() -> list[Tensor]:
        y = layer(x)
        first = torch.autograd.grad(y.pow(3).mean(), inputs, create_graph=True)
        many = torch.autograd.grad(y, inputs, torch.ones(2, *y.shape), retain_graph=True, is_grads_batched=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*many, *torch.autograd.grad(penalty, inputs)]

    found = second()
    with plain_paths():
        expected = second()
    for a, b in zip(found, expected, strict=True):
        assert error(a, b.double()) < 1e-4


def test_tensors_of_another_layout_get_the_plain_form() -> None:
    layer, x = FastLinear(DIM, 4 * DIM), torch.randn(512, DIM)
    expected = layer(x).detach()
    nested = layer(torch.nested.as_nested_tensor([x[:256], x[256:]]))
    torch.testing.assert_close(torch.cat(nested.unbind()).detach(), expected)
    sparse = FastLinear(DIM, 4 * DIM)
    sparse.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    sparse.bias = layer.bias
    torch.testing.assert_close(sparse(x).detach(), expected, rtol=1e-4, atol=1e-5)
