"""Kernels for CPUs against float64, built for several processors; who takes them."""

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers import cpu_compiler, fast_cpu
from layers.fast_mlp import ACTS

BUILDS = {
    "native": ("native",),
    "AVX2": ("x86-64-v3",),
    "AVX512": ("skylake-avx512",),
    "no tiles": ("native", "-mno-amx-bf16"),
    "Clang": ("native",),
}
"""Processors that the kernels are built for, as compilers call them, by the compiler at hand or by Clang."""

EXACT = {torch.float32: 5e-7, torch.bfloat16: 3e-3}
"""Relative error of rounding."""

DTYPES = list(EXACT)
PAIRS = [(a, b) for a in DTYPES for b in DTYPES]

pytestmark = pytest.mark.skipif(fast_cpu.library() is None, reason="no kernels for this CPU, or no C compiler")


def multiplies_in_bfloat16() -> bool:
    """Whether the kernels in use have those for attention in bfloat16."""
    return hasattr(fast_cpu.library(), "attention_bfloat16")


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels, built for a kind of processor."""
    if request.param == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("not on this processor")
    if request.param == "Clang" and not shutil.which("clang"):
        pytest.skip("no clang on this machine")
    if request.param == "no tiles" and not multiplies_in_bfloat16():
        pytest.skip("not of this processor")
    processor, *more = BUILDS[request.param]
    flags = (*(f"-march={processor}" if "-march" in flag else flag for flag in cpu_compiler.FLAGS), *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_compiler, "FLAGS", flags)
        if request.param == "Clang":
            patch.setenv("CC", "clang")
        kernels = cpu_compiler._compile()
        patch.setattr(fast_cpu, "library", lambda: kernels)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# ---- against float64 ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype) -> None:
    x, grad = (torch.randn(3, 67, 48) * 3).to(dtype), torch.randn(3, 67, 48).to(dtype)
    exact = x.double().requires_grad_()
    y = ACTS[act](exact)
    (of_x,) = torch.autograd.grad(y, exact, grad.double())
    found, sums = fast_cpu.activation_backward_(x, grad, act)
    assert found.dtype == grad.dtype == dtype and sums.dtype == torch.float32 and sums.shape == (48,)
    assert error(found, y.detach()) < EXACT[dtype] and error(grad, of_x) < EXACT[dtype]
    assert error(sums, of_x.sum((0, 1))) < 1e-6
    assert torch.equal(fast_cpu.activation(x, act), found)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("act", ACTS)
def test_an_activation_far_from_0_and_of_no_number(act: str) -> None:
    x = torch.tensor([-1e30, -100.0, -9.0, -0.0, 0.0, 1e-30, 9.0, 100.0, 1e15, torch.nan, torch.inf]).repeat(16)
    exact = x.double().requires_grad_()
    y = ACTS[act](exact)
    (of_x,) = torch.autograd.grad(y.sum(), exact)
    found, grad = fast_cpu.activation(x, act), torch.ones(1, 176)
    fast_cpu.activation_backward_(x[None], grad, act)
    finite = x.isfinite()
    torch.testing.assert_close(found.double()[finite], y.detach()[finite], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(grad[0].double()[finite], of_x[finite], rtol=1e-6, atol=3e-6)
    assert found[x.isnan()].isnan().all() and not found[x == torch.inf].isfinite().any()


@pytest.mark.usefixtures("build")
def test_gelu_is_as_exact_as_torchs() -> None:
    x = torch.linspace(-12, 12, 2**18)
    exact, grad = F.gelu(x.double()), torch.ones(1, len(x))
    assert (fast_cpu.activation(x, "gelu") - exact).abs().max() < 1.5e-6 > (F.gelu(x) - exact).abs().max()
    fast_cpu.activation_backward_(x[None], grad, "gelu")
    of_x = torch.ops.aten.gelu_backward(torch.ones_like(exact), x.double())
    assert (grad[0] - of_x).abs().max() < 5e-7


@pytest.mark.usefixtures("build")
def test_gelu_of_each_number_of_bfloat16_is_the_nearest_or_next_to_it() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every.view(-1, 64)
    exact, grad = F.gelu(x.double()), torch.ones_like(x)
    found, _ = fast_cpu.activation_backward_(x, grad, "gelu")
    assert torch.equal(found.isnan(), exact.isnan() | (x == -torch.inf)) and (found == torch.inf)[x == torch.inf].all()
    of_x = torch.ops.aten.gelu_backward(torch.ones_like(exact), x.double())
    near = x.double() > -7.5  # below, all of it is under 1e-12
    for number, right in ((found, exact), (grad, of_x)):
        torch.testing.assert_close(number[near].double(), right[near], rtol=0.0042, atol=2e-9, equal_nan=True)
        assert (number[~near & x.isfinite()].abs() < 1e-11).all()


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
def test_star_relu(dtype: torch.dtype) -> None:
    x, grad = torch.randn(3, 67, 48).to(dtype), torch.randn(3, 67, 48).to(dtype) + 0.5
    exact = [
        x.double().requires_grad_(),
        *(torch.tensor(v, dtype=torch.double, requires_grad=True) for v in (0.8, -0.4)),
    ]
    y = exact[1] * F.relu(exact[0]).square() + exact[2]
    of_x, *of_numbers = torch.autograd.grad(y, exact, grad.double())
    found = fast_cpu.star_relu(x, 0.8, -0.4)
    assert found.dtype == dtype and error(found, y.detach()) < EXACT[dtype]
    sums = fast_cpu.star_relu_backward_(x, grad, 0.8)
    assert grad.dtype == dtype and error(grad, of_x) < EXACT[dtype]
    assert all(a.shape == () and error(a, b) < 1e-6 for a, b in zip(sums, of_numbers, strict=True))
    assert fast_cpu.star_relu(x.new_full((1, 16), torch.nan), 1.0, 0.0).isnan().all()


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_rows(dtype: torch.dtype) -> None:
    for rows in (1, 63, 64, 65, 1000):
        x = torch.randn(rows, 32).to(dtype) + 1
        assert error(fast_cpu.column_sums(x), x.double().sum(0)) < 1e-6


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("weights", ["weight and bias", "weight", "none"])
@pytest.mark.parametrize("dtypes", PAIRS)
def test_layer_norm(dtypes: tuple[torch.dtype, torch.dtype], weights: str) -> None:
    dtype, out = dtypes
    x, grad = (torch.randn(3, 67, 48) * 2 + 1).to(dtype), torch.randn(3, 67, 48).to(out)
    weight = None if weights == "none" else torch.rand(48) + 0.5
    bias = torch.randn(48) if weights == "weight and bias" else None
    exact = [x.double().requires_grad_()]
    exact += [
        (fill(48) if t is None else t).double().requires_grad_()
        for fill, t in ((torch.ones, weight), (torch.zeros, bias))
    ]
    y = F.layer_norm(exact[0], (48,), exact[1], exact[2], 1e-5)
    found, mean, rstd = fast_cpu.layer_norm(x, weight, bias, 1e-5, out)
    assert found.dtype == out and error(found, y.detach()) < EXACT[out]
    of_x, *sums = fast_cpu.layer_norm_backward(grad, x, weight, mean, rstd)
    expected = torch.autograd.grad(y, exact, grad.double())
    assert of_x is not None and of_x.dtype == dtype and error(of_x, expected[0]) < EXACT[dtype]
    assert all(error(a, b) < 1e-6 for a, b in zip(sums, expected[1:], strict=True))
    alone = fast_cpu.layer_norm_backward(grad, x, weight, mean, rstd, of_input=False)
    assert alone[0] is None and all(map(torch.equal, alone[1:], sums))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 49, 197])
@pytest.mark.parametrize("dtypes", [pair for pair in PAIRS if pair != (torch.bfloat16, torch.float32)])
def test_softmax(dtypes: tuple[torch.dtype, torch.dtype], tokens: int) -> None:
    dtype, out = dtypes
    scores, bias = (torch.randn(6, tokens, tokens) * 5).to(dtype), torch.randn(3, tokens, tokens)
    bias[0, :, 3] = -torch.inf
    exact = (0.3 * scores.double().unflatten(0, (2, 3)) + bias.double()).softmax(-1).flatten(0, 1)
    found = fast_cpu.softmax(scores, bias, 0.3, out)
    assert found.dtype == out and error(found, exact) < EXACT[out] and not found[[0, 3], :, 3].any()
    assert error(fast_cpu.softmax(scores, None, 0.3, out), (0.3 * scores.double()).softmax(-1)) < EXACT[out]
    scores[1, 2, tokens - 1], bias[2, 0] = torch.nan, -torch.inf
    found = fast_cpu.softmax(scores, bias, 0.3, out)
    assert found[1, 2].isnan().all() and found[2, 0].isnan().all() and found.isnan().sum() == 3 * tokens


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_minus_self(dtype: torch.dtype, size: int) -> None:
    x, grad = torch.randn(2, 7, 5, 32).to(dtype), torch.randn(2, 7, 5, 32).to(dtype)
    exact = x.double().requires_grad_()
    mean = F.avg_pool2d(exact.permute(0, 3, 1, 2), size, 1, size // 2, count_include_pad=False)
    y = mean.permute(0, 2, 3, 1) - exact
    (of_x,) = torch.autograd.grad(y, exact, grad.double())
    # of size 1 nothing is left, in float64 too
    atol = 2e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fast_cpu.mean_minus_self(x, size).double(), y.detach(), rtol=0, atol=atol)
    torch.testing.assert_close(fast_cpu.mean_minus_self(grad, size, backward=True).double(), of_x, rtol=0, atol=atol)


def parts_of(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, N, D), of (B, N, 3, heads, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def attention_results(qkv: Tensor, grad: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Output, logarithms, and gradients of q, k, v and a bias, by the kernel; grad: (B, heads, N, D)."""
    found = parts_of(torch.full_like(qkv, torch.nan, memory_format=torch.contiguous_format))
    out, logs = fast_cpu.attention(*parts_of(qkv), bias)
    of_bias = fast_cpu.attention_backward(
        grad, *parts_of(qkv), out, logs, found, bias, of_bias=bias is not None and bias.requires_grad
    )
    return [out, logs, *found, *([] if of_bias is None else [of_bias])]


def exact_attention(qkv: Tensor, grad: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """The same in float64, and by other means."""
    qkv = qkv.detach().double().requires_grad_()
    q, k, v = parts_of(qkv)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        bias = bias.detach().double().requires_grad_()
        scores = (scores.flatten(0, 1).unflatten(0, (-1, len(bias))) + bias).view(scores.shape)
    out = scores.softmax(-1) @ v
    of_qkv, *of_bias = torch.autograd.grad(out, [qkv] if bias is None else [qkv, bias], grad.double())
    return [out.detach(), scores.detach().logsumexp(-1) / math.log(2), *parts_of(of_qkv), *of_bias]


SHAPES = [(2, 1, 1, 16), (1, 5, 2, 48), (2, 16, 3, 64), (3, 49, 2, 32), (2, 96, 1, 64), (2, 97, 2, 16), (1, 197, 3, 64),
          (1, 210, 1, 256), (1, 577, 2, 32)]  # fmt: skip


def needs_kernel(dtype: torch.dtype) -> None:
    """Skips a test of attention in a dtype that the build has no kernel for."""
    if dtype == torch.bfloat16 and not multiplies_in_bfloat16():
        pytest.skip("no instructions for it in this build")


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("batch, tokens, heads, width", SHAPES)
@pytest.mark.parametrize("sharpness", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype, sharpness: int, batch: int, tokens: int, heads: int, width: int) -> None:
    needs_kernel(dtype)
    qkv, grad = torch.randn(batch, tokens, 3, heads, width), torch.randn(batch, tokens, heads, width).transpose(1, 2)
    qkv[:, :, :2] *= sharpness**0.5
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    bound = 2e-6 * sharpness if dtype == torch.float32 else 4e-3 * sharpness**0.5
    for got, want in zip(attention_results(qkv, grad), exact_attention(qkv, grad), strict=True):
        assert got.shape == want.shape
        # of one token the gradients of queries and keys are 0
        is_zero = tokens == 1 and want.norm() < 1e-9 and got.norm() < 20 * EXACT[dtype] * grad.norm()
        assert error(got, want) < bound or is_zero


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("batch, tokens, heads, width, entries", [(6, 49, 2, 32, 6), (35, 17, 3, 16, 3),
                                                                  (34, 64, 1, 48, 2), (4, 33, 2, 32, 8)])  # fmt: skip
def test_attention_with_a_bias(batch: int, tokens: int, heads: int, width: int, entries: int) -> None:
    needs_kernel(torch.bfloat16)
    qkv = torch.randn(batch, tokens, 3, heads, width).bfloat16()
    grad, bias = torch.randn(batch, heads, tokens, width).bfloat16(), torch.randn(entries, tokens, tokens)
    bias[0, :, 3] = -torch.inf
    found = attention_results(qkv, grad, bias.requires_grad_())
    for got, want in zip(found, exact_attention(qkv, grad, bias), strict=True):
        assert got.shape == want.shape and error(got, want) < 4e-3
    assert len(attention_results(qkv, grad, bias.detach())) == len(found) - 1, "only if it is wanted"


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_wherever_its_parts_lie(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernel(dtype)
    monkeypatch.setattr(fast_cpu, "FEWEST", 1)
    qkv, grad = torch.randn(2, 40, 3, 2, 32, dtype=dtype), torch.randn(2, 2, 40, 32, dtype=dtype)
    want = attention_results(qkv, grad)
    lying = {
        "every part for itself": torch.stack(parts_of(qkv)).permute(1, 3, 0, 2, 4),
        "among others": torch.randn(4, 50, 3, 2, 40, dtype=dtype)[1:3, 7:47, ..., 5:37].copy_(qkv),
    }
    for name, other in lying.items():
        assert not other.is_contiguous() and fast_cpu.has_attention(*parts_of(other)), name
        assert all(map(torch.equal, attention_results(other, grad), want)), name
    gradients = {
        "of one number": torch.randn((), dtype=dtype).expand(grad.shape),
        "turned": torch.randn(2, 2, 32, 40, dtype=dtype).mT,
    }
    for name, other in gradients.items():
        assert all(map(torch.equal, attention_results(qkv, other), attention_results(qkv, other.clone()))), name


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_no_number_and_far_away(dtype: torch.dtype) -> None:
    needs_kernel(dtype)
    qkv, grad = torch.randn(1, 20, 3, 1, 16).to(dtype), torch.randn(1, 1, 20, 16).to(dtype)
    is_exact = dtype == torch.float32
    for place, value in (
        (0, torch.nan),
        (1, torch.nan),
        (2, torch.nan),
        (0, torch.inf),
        (1, -torch.inf),
        (2, torch.inf),
    ):
        given = qkv.clone()
        given[0, 3, place, 0, 5] = value
        out, _, *gradients = attention_results(given, grad)
        want = F.scaled_dot_product_attention(*parts_of(given.float())).to(dtype)
        assert torch.equal(out.isfinite().all(-1), want.isfinite().all(-1)), (place, value)
        near = 1e-5 if is_exact else 2e-2
        torch.testing.assert_close(out[want.isfinite()], want[want.isfinite()], rtol=near, atol=near)
        assert any(not g.isfinite().all() for g in gradients)
    far = qkv * 1e4  # all weight is on one key, and the gradients of queries and keys are 0
    found, exact = attention_results(far, grad), exact_attention(far, grad)
    assert all(got.isfinite().all() for got in found) and all(each.norm() == 0 for each in exact[2:4])
    for i in (0, 1, 4):
        assert error(found[i], exact[i]) < (1e-3 if is_exact else 3e-3)
    shifted = qkv.clone()
    shifted[:, :, :2] = qkv[:, :, :2] * 0.1 + torch.tensor([-30.0, 30.0])[:, None, None]  # all scores are near -3600
    for got, want in zip(attention_results(shifted, grad), exact_attention(shifted, grad), strict=True):
        # in bfloat16 gradients of scores, which are added to zero, are rounded before they meet keys near 30
        assert got.isfinite().all() and (error(got, want) < 2e-3 or not is_exact)


def has_tiles() -> bool:
    """Whether the kernels in use multiply on matrix tiles."""
    return hasattr(fast_cpu.library(), "has_products") and bool(fast_cpu.library().has_products())  # type: ignore[union-attr]


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize(
    "rows, inputs, outputs",
    [(1, 32, 64), (31, 64, 32), (256, 96, 160), (300, 352, 32), (257, 1280, 320), (1000, 64, 1024)],
)
def test_gradient_of_a_weight(rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_tiles():
        pytest.skip("no matrix tiles in this build")
    monkeypatch.setattr(fast_cpu, "FEWEST", 1)
    grad, x = torch.randn(rows, outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    assert fast_cpu.has_products(grad, x)
    found, exact = fast_cpu.weight_gradient(grad, x), grad.double().t() @ x.double()
    assert found.dtype == torch.float32 and found.shape == exact.shape and error(found, exact) < 1e-6
    grad[rows // 2, 5] = torch.nan
    assert fast_cpu.weight_gradient(grad, x).isnan().nonzero()[:, 0].unique().tolist() == [5]


def test_panels_cover_a_matrix_and_stand_in_a_cache() -> None:
    for d, c in ((1, 1), (12, 48), (64, 64), (128, 3), (300, 300)):
        for threads in (1, 2, 5, 64):
            rows, columns = fast_cpu._panels(d, c, threads)
            assert 1 <= rows <= d and 1 <= columns <= c and -(-d // rows) * -(-c // columns) <= fast_cpu.PANEL
    assert math.prod(fast_cpu._panels(48, 12, 2)) % 2 == 0, "both threads have work"


def test_other_libraries_find_their_tiles_as_they_left_them() -> None:
    if not has_tiles():
        pytest.skip("no matrix tiles on this processor")
    layer, x = torch.nn.Linear(512, 256), torch.randn(1024, 512).bfloat16()
    layer.to(torch.bfloat16)
    before = layer(x)
    for _ in range(3):
        fast_cpu.weight_gradient(torch.randn(700, 32).bfloat16(), torch.randn(700, 64).bfloat16())
        assert torch.equal(layer(x), before)


SIZES = [(1, 1), (2, 3), (3, 7), (5, 14), (9, 15), (17, 8), (4, fast_cpu.MOST_POSITIONS)]
"""Heights and widths of images: less than a kernel's reach, whole pieces of a line, and others."""


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("side", [5, 7])
def test_depthwise(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "FEWEST", 4)
    for height, width in SIZES:
        x, weight, bias = torch.randn(2, height, width, 48).bfloat16(), torch.randn(48, 1, side, side), torch.randn(48)
        assert fast_cpu.has_depthwise(x, (side, side), torch.bfloat16)
        for added in (None, bias):
            exact = F.conv2d(
                x.double().permute(0, 3, 1, 2), weight.double(), None if added is None else added.double(),
                padding=side // 2, groups=48,
            )  # fmt: skip
            found = fast_cpu.depthwise(x, weight, added)
            assert found.dtype == x.dtype and error(found, exact.permute(0, 2, 3, 1)) < EXACT[torch.bfloat16]
        star = 0.8 * F.relu(x.double()).square() - 0.4
        exact = F.conv2d(star.permute(0, 3, 1, 2), weight.double(), padding=side // 2, groups=48).permute(0, 2, 3, 1)
        found = fast_cpu.depthwise(x, weight, None, torch.tensor([0.8, -0.4]))
        assert error(found, exact) < EXACT[torch.bfloat16]
    x = torch.zeros(1, 12, 12, 16).bfloat16()
    x[0, 2, 11, 5] = torch.nan
    reached = fast_cpu.depthwise(x, weight[:16], None).isnan().nonzero()[:, 1:]
    expected = [[row, column, 5] for row in range(3 + side // 2) if row >= 2 - side // 2
                for column in range(11 - side // 2, 12)]  # fmt: skip
    assert reached.tolist() == expected


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [3, 5, 7])
def test_gradients_of_a_depthwise_weight(side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "FEWEST", 4)
    for batch, (height, width) in zip((0, 1, 2, 3, 2, 1, 2), SIZES, strict=True):
        x, grad = (torch.randn(batch, height, width, 48).to(dtype) for _ in range(2))
        takes = fast_cpu.has_depthwise_weight(x, (side, side), dtype)
        assert takes == ((side > 3 or dtype == torch.bfloat16) and batch > 0)
        if side == 3 and dtype == torch.float32:
            continue  # torch is as fast
        weight, bias = (
            torch.zeros(48, 1, side, side).double().requires_grad_(),
            torch.zeros(48).double().requires_grad_(),
        )
        image = x.double()
        for star in (None, torch.tensor([0.8, -0.4])):
            taken = image if star is None else 0.8 * F.relu(image).square() - 0.4
            y = F.conv2d(taken.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=48)
            exact = torch.autograd.grad(y, [weight, bias], grad.double().permute(0, 3, 1, 2))
            found = fast_cpu.depthwise_weight_gradient(grad, x, side, star)
            for a, b in zip(found, exact, strict=True):
                assert a.shape == b.shape and a.dtype == torch.float32
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_which_images_a_depthwise_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "FEWEST", 4 * 2 * 8 * 8 * 32)
    x, bfloat16 = torch.randn(2, 8, 8, 32), torch.bfloat16
    assert fast_cpu.has_depthwise(x, (7, 7), bfloat16) and fast_cpu.has_depthwise_weight(x, (7, 7), x.dtype)
    assert not fast_cpu.has_depthwise(x, (7, 7), x.dtype), "oneDNN's are as fast"
    others = {
        "few numbers": (x[1:], (7, 7)),
        "other sides": (x, (5, 7)),
        "large sides": (x, (9, 9)),
        "channels": (torch.randn(2, 8, 8, 40), (7, 7)),
        "gaps": (torch.randn(2, 8, 8, 64)[..., :32], (7, 7)),
        "order": (torch.randn(2, 32, 8, 8).permute(0, 2, 3, 1), (7, 7)),
        "wide": (torch.randn(1, 8, fast_cpu.MOST_POSITIONS + 1, 32), (7, 7)),
    }
    for name, (images, kernel) in others.items():
        assert not fast_cpu.has_depthwise(images, kernel, bfloat16), name
        assert not fast_cpu.has_depthwise_weight(images, kernel, bfloat16), name
    assert not fast_cpu.has_depthwise(x, (7, 7), torch.float16)


def test_bits_do_not_depend_on_threads() -> None:
    x, grad, scores = torch.randn(2, 500, 64), torch.randn(2, 500, 64), torch.randn(40, 49, 49)
    qkv, bias = torch.randn(3, 130, 3, 5, 32), torch.randn(5, 130, 130, requires_grad=True)
    half = qkv.bfloat16()

    def results() -> list[Tensor]:
        y, mean, rstd = fast_cpu.layer_norm(x, None, None, 1e-5, x.dtype)
        rows = [y, mean, rstd, *fast_cpu.layer_norm_backward(grad, x, None, mean, rstd), fast_cpu.column_sums(x)]
        images = fast_cpu.mean_minus_self(x.view(2, 20, 25, 64), 3)
        return [
            *rows,
            images,
            fast_cpu.depthwise(half.reshape(-1)[: 2 * 20 * 25 * 64].view(2, 20, 25, 64), torch.ones(64, 1, 7, 7), None),
            *fast_cpu.depthwise_weight_gradient(grad.view(2, 20, 25, 64), x.view(2, 20, 25, 64), 7),
            *fast_cpu.activation_backward_(x, grad.clone(), "gelu"),
            *fast_cpu.star_relu_backward_(x, grad.clone(), 0.8),
            fast_cpu.softmax(scores, None, 1.0, x.dtype),
            *attention_results(qkv, qkv[:, :, 0].transpose(1, 2)),
            *(attention_results(half, half[:, :, 0].transpose(1, 2), bias) if multiplies_in_bfloat16() else []),
            *([fast_cpu.weight_gradient(half.view(-1, 160), half.view(-1, 160))] if has_tiles() else []),
        ]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


# ---- who takes them ---------------------------------------------------------------------------------------------------


def test_which_tensors_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "FEWEST", 320)
    x = torch.randn(20, 16)
    assert fast_cpu.has_kernels(x) and fast_cpu.has_kernels(x.bfloat16(), None, x)
    others = {
        "few numbers": x[1:],
        "gaps": torch.randn(20, 32)[:, :16],
        "channels": torch.randn(40, 8),
        "half": x.half(),
        "double": x.double(),
        "meta": x.to("meta"),
    }
    assert [name for name, other in others.items() if fast_cpu.has_kernels(other)] == []
    assert [name for name, other in others.items() if fast_cpu.has_kernels(x, other)] == ["few numbers", "channels"]
    assert not fast_cpu.has_kernels(None, x)
    assert fast_cpu.has_softmax(torch.randn(5, 4, 17)) and not fast_cpu.has_softmax(torch.randn(9, 9, 15))
    assert not fast_cpu.has_softmax(torch.randn(2, 17, 17).mT) and not fast_cpu.has_softmax(
        torch.randn(3, 17, 17).half()
    )
    q = torch.randn(2, 3, 20, 16)
    assert fast_cpu.has_attention(q, q, q.clone()) and fast_cpu.has_attention(*[torch.randn(1, 1, 1024, 256)] * 3)
    refused = {
        "few numbers": q[:1, :1, :4],
        "no tokens": q[:, :, :0],
        "many tokens": torch.randn(1, 1, 1025, 16),
        "width": torch.randn(2, 3, 20, 24),
        "wide": torch.randn(2, 3, 20, 272),
        "turned": torch.randn(2, 3, 16, 20).mT,
        "three dimensions": q[0],
        "float16": q.half(),
        "meta": q.to("meta"),
        "negated": torch.randn(2, 3, 20, 16, dtype=torch.complex64).conj().imag,
        "zeros that are none": torch._efficientzerotensor(q.shape),
    }
    assert [name for name, other in refused.items() if fast_cpu.has_attention(other, other, other)] == []
    assert fast_cpu.has_attention(q, torch.randn(2, 20, 3, 16).transpose(1, 2), q)
    rows = torch.randn(32, 64).bfloat16()
    assert fast_cpu.has_products(rows, rows) == has_tiles()
    for other in (rows.float(), rows[:, :32], rows[:3], torch.randn(64, 48).bfloat16(), rows.t(), rows.to("meta")):
        assert not fast_cpu.has_products(rows, other) and not fast_cpu.has_products(other, rows)
    half, bias = q.bfloat16(), torch.randn(3, 20, 20)
    assert fast_cpu.has_attention(half, half, half, bias) == fast_cpu.has_attention(half, half, half)
    assert fast_cpu.has_attention(half, half, half) == multiplies_in_bfloat16()
    assert not fast_cpu.has_attention(q, q, q, bias), "in float32"
    for wrong in (bias[:0], bias[..., :19], torch.randn(4, 20, 20), bias[0], bias.to("meta"), bias.int()):
        assert not fast_cpu.has_attention(half, half, half, wrong)
    for other in (q[:, :, :19], q.double(), torch.randn(2, 3, 16, 20).mT):
        assert not fast_cpu.has_attention(q, other, q) and not fast_cpu.has_attention(q, q, other)
    monkeypatch.setattr(fast_cpu, "library", lambda: None)
    assert not fast_cpu.has_kernels(x) and not fast_cpu.has_softmax(torch.randn(5, 4, 17))
    assert not fast_cpu.has_attention(q, q, q)
