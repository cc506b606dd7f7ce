"""Stochastic depth on a GPU: what is skipped equals what is masked, empty batches pass, compiled code is compiled once.

Each test runs on the CPU as well, so that where no GPU is there it is the device alone that is not tried.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from layers import fast_cuda
from layers.drop_path import DropPath
from layers.fast import plain_paths
from models.config import MetaFormerConfig, PatchConfig
from models.factory import create_model
from models.fast_layers import use_fast_layers
from models.metaformer import build_block
from stochastic_depth.proof import randomise_scales, verify_skip
from stochastic_depth.setting import set_drop_path
from tests.training.parts import CUDA

DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
MIXERS = ["pooling", "sep_conv", "attention"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def blocks(mixer: str, device: str) -> nn.Module:
    """Two blocks that always skip."""
    torch.manual_seed(0)
    patch = PatchConfig(kernel_size=1, stride=1, padding=0)
    config = MetaFormerConfig(
        name=mixer, depths=[2], dims=[64], token_mixer=mixer, image_size=8, stem=patch, downsample=patch  # type: ignore[arg-type]
    )  # fmt: skip
    model = nn.Sequential(*(build_block(config, 0, 0.0, "skip") for _ in range(2)))
    for module in drop_paths(model):
        module.break_even = 0.0
    return model.to(device).train()


def drop_paths(model: nn.Module) -> list[DropPath]:
    return [module for module in model.modules() if isinstance(module, DropPath)]


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of the parameters and of the input."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    assert all(grad is not None for grad in gradients.values()), "plain DistributedDataParallel needs them"
    return out.detach(), {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_skipping_equals_masking(device: str, mixer: str, dtype: torch.dtype) -> None:
    model, x = blocks(mixer, device), torch.randn(8, 8, 8, 64, device=device, dtype=dtype)
    for module in drop_paths(model):
        module.drop_prob = 0.5
    rows: list[int] = []
    for block in model.children():
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))  # type: ignore[operator]
    results = []
    for masks in (False, True):
        for module in drop_paths(model):
            module.masks_all = masks
        results.append(step(model, x, dtype))
    assert rows == [4] * 4 + [8] * 4
    (skipped, gradients), (masked, expected) = results
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    close(skipped, masked, tolerance)
    for name, gradient in gradients.items():
        close(gradient, expected[name], tolerance)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the norm of the difference: sums over samples are taken in another order, in bfloat16 with much rounding."""
    assert got.dtype == expected.dtype
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    assert error <= tolerance, "another kept set gives about 1"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_branches_that_keep_no_sample(device: str, mixer: str, dtype: torch.dtype) -> None:
    model, x = blocks(mixer, device), torch.randn(4, 8, 8, 64, device=device, dtype=dtype)
    for module in drop_paths(model):
        module.drop_prob = 1.0
    out, gradients = step(model, x, dtype)
    least = 1 if (device, mixer) == ("cuda", "attention") else 0
    assert torch.equal(out, x) and [module.samples_computed for module in drop_paths(model)] == [least, 0] * 2
    assert all(int(gradient.count_nonzero()) == 0 for name, gradient in gradients.items() if name != "x")
    torch.testing.assert_close(gradients["x"], 2 * x)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["caformer_n4", "poolformer_n4", "vit_tiny_patch16_224", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]
)
@pytest.mark.parametrize("device", DEVICES)
def test_fast_paths_compute_what_plain_ones_do(
    device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to plain float32, whose samples and rates are the same; kernels are tried on small tensors too."""
    monkeypatch.setattr(fast_cuda, "FEWEST", 1)
    torch.manual_seed(0)
    size = 64
    model = create_model(name, num_classes=5, image_size=size).train()
    randomise_scales(model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, size, size))
    for module in drop_paths(model):
        module.break_even = 0.0
    use_fast_layers(model)
    x = torch.randn(6, *model.pretrained_cfg["input_size"], device=device)  # type: ignore[index]
    found, gradients = step(model, x, dtype)
    with plain_paths():
        expected, plain = step(model, x, torch.float32)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    close(found.float(), expected, tolerance)
    norms = {key: float(gradient.float().norm()) for key, gradient in plain.items()}
    for key, gradient in gradients.items():
        if norms[key] > 1e-3 * max(norms.values()):  # others are rounding alone, such as that of a key's bias
            close(gradient, plain[key], 3 * tolerance)


@pytest.mark.parametrize("name", ["caformer_n4", "poolformer_n4"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "eager"), pytest.param("cuda", "inductor", marks=CUDA)])
def test_rates_change_without_compiling_anew(
    device: str, backend: str, name: str, compilations: Callable[[], tuple[int, int]]
) -> None:
    model = create_model(name, num_classes=5, image_size=32).to(device).train()
    compiled = torch.compile(model, backend=backend)
    images = torch.randn(8, *model.pretrained_cfg["input_size"], device=device)
    for rate in (0.4, 0.0, 0.1, 0.7, 1.0):
        set_drop_path(model, rate, profile="constant", mode="skip")
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            out = compiled(images)
        out.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert {module.samples_seen for module in drop_paths(model)} == {8}
    assert compilations() == (1, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gpu_is_given_the_larger_number_at_every_step(device: str) -> None:
    """Of a large batch; 38.4 samples of it are kept on average."""
    model, computed, kept = blocks("pooling", device), set(), set()
    for module in drop_paths(model):
        module.drop_prob = 0.4
    for _ in range(20):
        for module in drop_paths(model):
            module.reset_counts()
        model(torch.randn(64, 8, 8, 64, device=device))
        computed |= {module.samples_computed for module in drop_paths(model)}
        kept |= {module.samples_seen - module.samples_dropped for module in drop_paths(model)}
    assert kept == {38, 39} and computed == ({39} if device == "cuda" else kept)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/convnext_atto"])
@pytest.mark.parametrize("device", DEVICES)
def test_models_of_timm_skip(device: str, name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, image_size=32).to(device).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 32, 32))
    assert verify_skip(model, torch.randn(4, 3, 32, 32, device=device)) < 1e-3
