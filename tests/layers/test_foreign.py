"""Stochastic depth in timm's and torchvision's models: rates, and skipping equal to masking with the same kept set."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
import copy
import math
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig
from torchvision.ops import StochasticDepth, stochastic_depth

from layers.drop_path import MODES, DropPath, Mode
from models import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.graft import GraftedDropPath, graft, grafted
from stochastic_depth.law import full_precision
from stochastic_depth.places import block_names, find_owners, foreign_rate
from stochastic_depth.proof import convert_to_skip, masking_twin, randomise_scales
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path

SIZE = (3, 64, 64)
NORM_WARNING = "mode 'skip': the batch norm"
# name, settings that make it small, and the roles that its drop-path modules find
SMALL: dict[str, tuple[dict[str, object], set[str]]] = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48}, {"branch"}),
    "deit3_small_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48}, {"branch"}),
    "beit_base_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}, {"branch"}),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 3}, {"branch"}),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}, {"branch"}),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
        {"branch"},
    ),
    "tiny_vit_5m_224": ({"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}, {"branch"}),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}, {"branch"}),
    "resnest14d": ({"layers": (1, 1, 1, 1)}, {"branch"}),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, {"branch"}),
    "caformer_s18": ({}, {"branch"}),
    "poolformer_s12": ({}, {"branch"}),
    "mixer_s16_224": ({"img_size": 64}, {"branch"}),
    "resnet18": ({"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}, {"branch"}),
}  # fmt: skip


METAFORMER: dict = {"depths": (1, 1, 2, 1), "dims": (32, 32, 64, 64)}
SMALL_CLASSES: dict[str, tuple[type, dict]] = {
    "caformer_s18": (timm.models.metaformer.MetaFormer, METAFORMER),
    "poolformer_s12": (timm.models.metaformer.MetaFormer, METAFORMER),
    "mixer_s16_224": (timm.models.mlp_mixer.MlpMixer, {"num_blocks": 3, "embed_dim": 48}),
}


def smaller(
    self: nn.Module, original: Callable[..., None], sizes: dict[str, object], *args: object, **kwargs: object
) -> None:
    original(self, *args, **{**kwargs, **sizes})


def build(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if name in SMALL_CLASSES:  # timm's functions fix these sizes
            cls, sizes = SMALL_CLASSES[name]
            patch.setattr(cls, "__init__", partialmethod(smaller, cls.__init__, sizes))
        model = timm.create_model(name, num_classes=5, **SMALL[name][0], **more)
    randomise_scales(model)
    return model


def size_of(name: str) -> tuple[int, int, int]:
    size = SMALL[name][0].get("img_size", 64)
    assert isinstance(size, int)
    return 3, size, size


def output_and_gradients(model: nn.Module, images: Tensor, seed: int) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(images)
    out.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach(), *gradients]


def quiet_norms(model: nn.Module) -> nn.Module:
    """Batch norms in eval: the statistics of a smaller batch are another thing than which samples are computed."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


@pytest.mark.parametrize("name", SMALL)
def test_skip_equals_mask_with_the_same_kept_set(name: str) -> None:
    model = build(name)
    set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=size_of(name))
    assert {m.role for m in grafted(model) if m.applied} == SMALL[name][1]
    quiet_norms(model.train())
    masked = masking_twin(model)
    images = torch.randn(6, *size_of(name))
    for seed in range(4):
        for a, b in zip(
            output_and_gradients(model, images, seed), output_and_gradients(masked, images, seed), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", SMALL)
def test_conversion_changes_neither_keys_nor_evaluation(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, *size_of(name))
    keys, state = list(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        before = model(images)
    for rate, mode in ((0.4, "skip"), (0.2, "mask"), (0.0, "skip"), (0.3, "batch")):
        set_drop_path(model, rate, mode=mode, input_size=size_of(name))  # type: ignore[arg-type]
        assert list(model.state_dict()) == keys and not model.training
        with torch.no_grad():
            assert torch.equal(model(images), before)
    assert torch.equal(torch.get_rng_state(), state), "trials leave the random stream alone"


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "caformer_s18"]
)
def test_rates_equal_those_of_a_fresh_build(name: str) -> None:
    model, fresh = build(name), build(name, drop_path_rate=0.3)
    set_drop_path(model, 0.3, input_size=size_of(name))
    expected = [[getattr(s, "drop_prob", 0.0) for s in owner.slots.values()] for owner in find_owners(fresh)]
    got = [[s.drop_prob for s in owner.slots.values() if isinstance(s, DropPath)] for owner in find_owners(model)]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_a_second_call_replaces_the_first_and_zero_restores() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    set_drop_path(model, 0.5, mode="skip", input_size=size_of(name))
    count = hooks()
    result = set_drop_path(model, 0.2, profile="constant", mode="skip", input_size=size_of(name))
    assert hooks() == count, "hooks are installed once"
    assert result.rates == [0.2] * 3 and all(m.drop_prob == 0.2 for m in grafted(model))
    set_drop_path(model, 0.0)
    images = torch.randn(4, *size_of(name))
    torch.testing.assert_close(model(images), model.eval()(images))


def test_cheap_branches_mask_below_their_break_even_rate() -> None:
    name = "poolformer_s12"
    model = build(name).train()
    kinds = ["pooling", ""] * 5  # token mixer and MLP of each block
    result = set_drop_path(model, 0.2, profile="constant", mode="skip", input_size=size_of(name))
    assert [m.kind for m in grafted(model)] == kinds
    assert [m.skips for m in grafted(model)] == [kind != "pooling" for kind in kinds]
    assert "5 drop-path modules: masks, below the break-even rate of such a branch" in result.notes
    set_drop_path(model, 0.4, profile="constant", mode="skip", input_size=size_of(name))
    assert all(m.skips for m in grafted(model))
    other = build(name)
    given = {"pooling": 0.1}
    set_drop_path(other, 0.2, profile="constant", mode="skip", break_even=given, input_size=size_of(name))
    assert all(m.skips for m in grafted(other)), "kinds are known at the first call"


def test_dropped_samples_are_not_computed() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    seen: list[int] = []
    block = model.get_submodule("blocks.1")
    for part in ("attn.qkv", "mlp.fc1"):
        block.get_submodule(part).register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    model(torch.randn(8, *size_of(name)))
    assert seen == [4, 4]
    report = drop_path_report(model, input_size=size_of(name))
    assert [b.mode for b in report.blocks] == ["skip"] * 3 and not report.warnings
    assert report.blocks[1].realised_rate == 0.5
    assert report.compute_saved is not None and 0.3 < report.compute_saved < 0.5


def test_with_nothing_kept_every_parameter_gets_a_zero_gradient() -> None:
    name = "swin_tiny_patch4_window7_224"
    model = build(name).train()
    set_drop_path(model, 1.0, profile="constant", mode="skip", input_size=size_of(name))
    model(torch.randn(1, *size_of(name))).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if "blocks" in key:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), key


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(clone: Callable[[nn.Module], nn.Module]) -> None:
    for name in ("vit_tiny_patch16_224", "swinv2_tiny_window8_256"):
        model = build(name).train()
        set_drop_path(model, 0.5, mode="skip", input_size=size_of(name))
        other = clone(model)
        images = torch.randn(4, *size_of(name))
        for a, b in zip(output_and_gradients(model, images, 1), output_and_gradients(other, images, 1), strict=True):
            assert torch.equal(a, b)
        set_drop_path(other, 0.0, input_size=size_of(name))
        assert max(m.drop_prob for m in grafted(model)) == 0.5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "davit_tiny"])
def test_checkpointing_drops_the_same_samples_again(name: str) -> None:
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    images = torch.randn(6, *size_of(name))
    expected = output_and_gradients(model, images, 3)
    model.set_grad_checkpointing()
    for a, b in zip(output_and_gradients(model, images, 3), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "davit_tiny"])
def test_autocast(name: str) -> None:
    model = build(name).train()
    images = torch.randn(4, *size_of(name))
    for rate in (0.0, 0.5, 1.0):
        set_drop_path(model, rate, profile="constant", mode="skip", input_size=size_of(name))
        masked = masking_twin(model)
        outs = []
        for other in (model, masked):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(other(images).float())
        outs[0].sum().backward()
        torch.testing.assert_close(*outs, rtol=0.05, atol=0.05 * float(outs[1].detach().abs().max()))


def test_torch_func_goes_through() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    images = torch.randn(4, *size_of(name))
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    torch.manual_seed(2)
    got = torch.func.grad(loss)(parameters)
    expected = output_and_gradients(model, images, 2)[1:]
    for a, b in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


TORCHVISION = ["convnext_tiny", "efficientnet_b0", "swin_t", "swin_v2_t"]
# no place of their own for stochastic depth
TORCHVISION_BARE = [
    "resnet18",
    "resnet50",
    "regnet_x_400mf",
    "vit_b_16",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
]


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    more = {"image_size": 64} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, num_classes=5, **more)
    randomise_scales(model)
    return model


@pytest.mark.parametrize("name", [*TORCHVISION, *TORCHVISION_BARE])
def test_torchvision(name: str) -> None:
    model = torchvision_model(name).eval()
    images = torch.randn(4, *SIZE)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(images)
    result = set_drop_path(model, 0.2, mode="skip", input_size=SIZE)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert any("skips per branch" in note for note in result.notes)
    assert not [m for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    with warnings.catch_warnings(record=True) as caught:
        model.train()(images).sum().backward()
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {str(w.message).partition(" inside")[0] for w in caught} == ({NORM_WARNING} if normed else set())
    assert any("hold a batch norm, which sees the kept samples only" in note for note in result.notes) == normed
    assert not drop_path_report(model, input_size=SIZE).warnings
    assert any("no shortcut" in note for note in result.notes) == (name == "efficientnet_b0")


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "mobilenet_v2", "mnasnet0_5"])
def test_bare_blocks_of_torchvision_are_dropped_whole(name: str) -> None:
    model = quiet_norms(torchvision_model(name).train())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    images = torch.randn(4, *SIZE)
    set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=SIZE)
    masked = masking_twin(model)
    for a, b in zip(output_and_gradients(model, images, 1), output_and_gradients(masked, images, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    set_drop_path(model, 1.0, profile="constant", mode="skip", input_size=SIZE)
    model.zero_grad()
    model(images).square().sum().backward()
    blocks = [module for _, module in model.named_modules() if any(isinstance(c, DropPath) for c in module.children())]
    assert blocks
    ends = {"resnet50": "conv1", "vit_b_16": "mlp", "mobilenet_v2": "conv", "mnasnet0_5": "layers"}
    for block in blocks:
        for parameter in block.get_submodule(ends[name]).parameters():
            assert parameter.grad is not None and not parameter.grad.any(), "at rate 1 no branch is trained"


# ---- what is computed -----------------------------------------------------------------------------------------------

# name: how to build it, and a module inside the branch that each kind of drop-path module ends
COMPUTED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=5), {"drop_path": "conv2"}),
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), {"drop_path_bn2": "conv1"}),
    "timm vit": (lambda: build("vit_tiny_patch16_224"), {"drop_path1": "attn.proj", "drop_path2": "mlp.fc1"}),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5),
        {"drop_path_mlp": "mlp.0"},
    ),
    "timm convnext": (lambda: build("convnext_atto"), {"drop_path": "conv_dw"}),
    "torchvision convnext": (
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=5),
        {"stochastic_depth": "block.0"},
    ),
    "ours": (lambda: create_model("caformer_n4", num_classes=5), {"drop_path2": "mlp.fc1"}),
}


def flops(model: nn.Module, images: Tensor) -> int:
    """Of a forward pass. Fused attention is not counted on the CPU, so it is taken apart."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def size_and_images(name: str, model: nn.Module, batch: int) -> tuple[tuple[int, ...], Tensor]:
    size: Any = model.pretrained_cfg["input_size"] if name == "ours" else SIZE
    return size, torch.randn(batch, *size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_report_says_what_was_computed(name: str, mode: str) -> None:
    """Samples that branches were given, and operations of whole forward passes."""
    model = COMPUTED[name][0]().train()
    size, images = size_and_images(name, model, 4)
    depth = set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=size)  # type: ignore[arg-type]
    rows: dict[int, list[int]] = {}
    for block in depth.blocks:
        for key, module in block.drop_paths.items():
            if part := COMPUTED[name][1].get(key):
                noted = rows.setdefault(id(module), [])
                model.get_submodule(f"{block.name}.{part}").register_forward_hook(
                    lambda _m, args, _o, noted=noted: noted.append(len(args[0]))
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent = [flops(model, images) for _ in range(6)]
    given = {module: sum(noted) for module, noted in rows.items()}
    report = drop_path_report(model, input_size=size)
    modules = [m for block in depth.blocks for m in block.drop_paths.values()]
    assert given
    for module in modules:
        dropped = 0 if mode == "mask" else module.samples_dropped
        assert module.samples_computed == 24 - dropped, "nothing is computed for what is dropped"
        assert given.get(id(module), 24 - dropped) == 24 - dropped
    set_drop_path(model, 0.0, mode="mask")
    saved = 1 - sum(spent) / (6 * flops(model, images))
    assert report.compute_saved == pytest.approx(saved, abs=1e-6)
    assert (saved > 0.05) == (mode != "mask")


@pytest.mark.parametrize("name", ["timm resnet18", "torchvision resnet18"])
@pytest.mark.parametrize("mode", ["batch", "skip"])
def test_a_block_that_is_dropped_whole_is_left_as_it_is(name: str, mode: str) -> None:
    model = COMPUTED[name][0]().train()
    settings: dict = {"profile": "constant", "mode": mode, "input_size": SIZE}
    set_drop_path(model, 1.0, **settings)
    branches = [f"layer{i}.{j}.{part}" for i in range(1, 5) for j in range(2) for part in ("conv", "bn")]
    inside = lambda key: key.startswith(tuple(branches))  # noqa: E731
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if mode == "batch" else "ignore")
        model(torch.randn(4, *SIZE)).square().sum().backward()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if inside(key))
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert not torch.equal(after["layer2.0.downsample.1.running_mean"], before["layer2.0.downsample.1.running_mean"])
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert not inside(key) or not parameter.grad.any(), key
    assert all(m.training for m in model.modules())
    set_drop_path(model, 0.0, **settings)
    model(torch.randn(4, *SIZE))
    assert all(int(model.state_dict()[key]) == 1 for key in after if inside(key) and key.endswith("tracked"))


def test_one_kept_sample_is_masked_in_front_of_a_batch_norm_and_is_no_saving() -> None:
    model = COMPUTED["torchvision resnet18"][0]().train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=SIZE)
    with pytest.warns(UserWarning, match="batch norm inside this residual branch sees the kept samples only"):
        model(torch.randn(2, *SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, *SIZE))
    report = drop_path_report(model, input_size=SIZE)
    assert report.compute_saved == 0.0 and {b.realised_rate for b in report.blocks} == {0.5}
    assert any("8 branches hold a batch norm" in note for note in report.notes)


class TwoNorms(nn.Module):
    """Two branches, of which the second has a batch norm; and a norm on the shortcut, which is no part of either."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm, self.side = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.BatchNorm1d(8),
        )
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.side(x) + self.drop_path1(self.fc1(x).relu())
        return x + self.drop_path2(self.norm(self.fc2(x)))


def test_a_norm_of_another_branch_does_not_count() -> None:
    model = Stack(TwoNorms(), TwoNorms()).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    with pytest.warns(UserWarning, match="batch norm"):
        model(torch.randn(2, 3, 4, 4))
    assert [m.samples_computed for m in grafted(model)] == [1, 2, 1, 2]
    assert [m.has_batch_norm for m in grafted(model)] == [False, True, False, True]


def test_code_that_takes_no_empty_batch_is_given_one_sample_that_counts_for_nothing() -> None:
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.drop_path = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return x + self.drop_path(self.norm(y.reshape(len(y), -1)))

    model = Stack(Reshaping()).train()
    set_drop_path(model, 1.0, mode="batch", input_size=(3, 4, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images := torch.randn(4, 3, 4, 4)).sum().backward()
    (module,) = grafted(model)
    assert module.samples_computed == 1 and not module.takes_nothing
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    report = drop_path_report(model, input_size=(3, 4, 4))
    assert report.compute_saved == pytest.approx(0.75)
    assert torch.equal(model(images), images.flatten(1)[:, :8])


@pytest.mark.parametrize("name", ["timm resnet18", "timm vit"])
def test_checkpointing_in_mode_batch(name: str) -> None:
    model = COMPUTED[name][0]().train()
    set_drop_path(model, 0.5, profile="constant", mode="batch", input_size=SIZE)
    images = torch.randn(4, *SIZE)
    expected = output_and_gradients(model, images, 3)
    model.set_grad_checkpointing()
    for a, b in zip(output_and_gradients(model, images, 3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    assert all(m.training for m in model.modules())


def test_autocast_in_mode_batch() -> None:
    model = COMPUTED["timm resnet18"][0]().train()
    set_drop_path(model, 1.0, profile="constant", mode="batch", input_size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, *SIZE))
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(m.samples_computed for m in grafted(model)) == 0


def test_a_batch_norm_that_is_replaced_later_is_seen() -> None:
    model = Stack(TwoNorms()).train()
    set_drop_path(model, 0.5, mode="skip", profile="constant", input_size=(3, 4, 4))
    model.blocks[0].norm.eval()
    model(torch.randn(2, 3, 4, 4))
    model.blocks[0].norm = nn.BatchNorm1d(8)
    with pytest.warns(UserWarning, match="batch norm"):
        model(torch.randn(2, 3, 4, 4))
    assert [m.samples_computed for m in grafted(model)] == [2, 3]


def test_compiled_code_counts_what_it_computes(compilations: Callable[[], tuple[int, int]]) -> None:
    for name, computed in (("vit_tiny_patch16_224", 0), ("convnext_atto", 4)):
        model = build(name).train()
        set_drop_path(model, 1.0, profile="constant", mode="batch", input_size=SIZE)
        compiled = torch.compile(model, backend="eager")
        compiled(torch.randn(4, *SIZE)).sum().backward()
        assert {m.samples_computed for m in grafted(model)} == {computed}, "a convolution wants to know its batch"
        assert all(p.grad is not None for p in model.parameters())
    assert compilations()[1] == 0


def _ranks_of_a_resnet(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build("resnet18").train()
    set_drop_path(model, 0.5, profile="constant", mode="batch", input_size=SIZE)
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(20):
        parallel.zero_grad()
        parallel(torch.randn(2, *SIZE)).sum().backward()
    counts = [m.samples_computed for m in grafted(model)]
    assert counts == [40 - m.samples_dropped for m in grafted(model)] and 0 < sum(counts) < 40 * len(counts)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_drop_whole_batches_of_their_own(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ranks_of_a_resnet, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_rates_of_torchvision_equal_those_of_a_fresh_build(name: str) -> None:
    model = torchvision_model(name)
    set_drop_path(model, 0.3, input_size=SIZE)
    if name == "swin_t":  # its function fixes the rate
        fresh: nn.Module = torchvision.models.SwinTransformer(
            [4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.3
        )
    else:
        fresh = torchvision.models.get_model(name, stochastic_depth_prob=0.3)
    expected = [foreign_rate(s) for owner in find_owners(fresh) for s in owner.slots.values()]
    assert [m.drop_prob for m in grafted(model)] == pytest.approx(expected, abs=1e-6)


def test_timms_resnest_drops_its_branch_here_and_not_its_input() -> None:
    name = "resnest14d"
    model = build(name, drop_path_rate=0.5)
    report = drop_path_report(model, input_size=SIZE)
    assert any("ResNestBottleneck drops its input, not its branch" in w for w in report.warnings)
    set_drop_path(model, 1.0, profile="constant", input_size=SIZE)
    assert not drop_path_report(model, input_size=SIZE).warnings
    model.train()(torch.randn(4, *SIZE)).square().sum().backward()
    for key, parameter in model.named_parameters():
        if "conv1" in key and key.startswith("layer"):
            assert parameter.grad is not None and not parameter.grad.any(), key
        if "downsample" in key and parameter.ndim > 1:
            assert parameter.grad is not None and parameter.grad.any(), key


def test_class_attention_blocks_are_left_alone() -> None:
    sizes: dict = {"layers": (1, 1, 2, 1), "embed_dims": (32,) * 4, "num_heads": (2,) * 4, "num_classes": 5}
    model = timm.models.volo.VOLO(**sizes, img_size=64)
    result = set_drop_path(model, 0.3, input_size=SIZE)
    assert result.notes[-1] == "2 class-attention blocks: left alone, as their authors do"
    assert result.rates == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])
    fresh = timm.models.volo.VOLO(**sizes, img_size=64, drop_path_rate=0.3)
    expected = [getattr(s, "drop_prob", 0.0) for owner in find_owners(fresh) for s in owner.slots.values()]
    assert [m.drop_prob for m in grafted(model)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_changing_rates_recompiles_nothing(name: str, mode: str, compilations: Callable[[], tuple[int, int]]) -> None:
    """At most four graphs for three batch sizes (one in mask mode at one size), equal to eager."""
    model = quiet_norms(build(name).train())
    settings: dict = {"profile": "constant", "mode": mode, "input_size": size_of(name)}
    set_drop_path(model, 0.3, **settings)
    compiled = torch.compile(model, backend="eager")
    batches = [4] if mode == "mask" else [2, 3, 16]
    images = [torch.randn(batch, *size_of(name)) for batch in batches]
    for step in range(3 * len(batches)):
        x = images[step % len(batches)]
        set_drop_path(compiled, 0.1 + 0.08 * step, **settings)  # type: ignore[arg-type]
        torch.manual_seed(step)
        out = compiled(x)
        out.sum().backward()
        torch.manual_seed(step)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    graphs, breaks = compilations()
    assert graphs <= (1 if mode == "mask" else 4) and breaks == 0


def test_two_hundred_rate_changes_of_timms_vit_compile_once(compilations: Callable[[], tuple[int, int]]) -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    depth = set_drop_path(model, 0.0, input_size=size_of(name))
    compiled = torch.compile(model, backend="eager")
    images = torch.randn(2, *size_of(name))
    for step in range(200):
        set_drop_path(compiled, step / 200, input_size=size_of(name))  # type: ignore[arg-type]
        depth.set_step(step)
        compiled(images)
    assert compilations() == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_skipping_compiles_with_inductor(name: str, compilations: Callable[[], tuple[int, int]]) -> None:
    model = build(name).train()
    for rate in (0.0, 1.0):  # random streams differ under inductor; at these rates the draw is known
        set_drop_path(model, rate, profile="constant", mode="skip", input_size=size_of(name))
        compiled = torch.compile(model)
        images = torch.randn(3, *size_of(name))
        out = compiled(images)
        out.sum().backward()
        torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-4)
    assert compilations()[1] == 0


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "davit_tiny"]
)
def test_export_in_evaluation_leaves_no_trace(name: str, tmp_path: Path) -> None:
    plain, model = build(name).eval(), build(name).eval()
    set_drop_path(model, 0.3, mode="skip", input_size=size_of(name))
    images = torch.randn(2, *size_of(name))
    graphs = [torch.export.export(m, (images,)) for m in (plain, model)]
    operations = [[str(node.target) for node in g.graph.nodes if node.op == "call_function"] for g in graphs]
    assert operations[0] == operations[1]
    torch.onnx.export(model, (images,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(images), rtol=1e-4, atol=1e-4)


def test_a_model_without_residual_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="AlexNet has no residual block"):
        set_drop_path(torchvision.models.alexnet(num_classes=2), 0.1)


def test_places_without_a_shortcut_are_no_blocks() -> None:
    model = timm.create_model("ghostnet_100", num_classes=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"GhostNet has places .* only in blocks without a shortcut \(blocks"):
            set_drop_path(model, 0.1, input_size=SIZE)


def test_a_wrong_input_size_is_said() -> None:
    with pytest.raises(ValueError, match=r"forward pass on images of \(1, 8, 8\) failed.*give input_size"):
        set_drop_path(build("vit_tiny_patch16_224"), 0.1, input_size=(1, 8, 8))


class Functional(nn.Module):
    """A branch that calls no module: only the whole block can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(torch.relu(x @ self.weight))


class Shared(nn.Module):
    """One drop path for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.fc1(x).relu())
        return x + self.drop_path(self.fc2(x).relu())


class Windows(nn.Module):
    """A branch whose only module sees two windows of each sample, behind which the full batch is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        windows = self.fc(x.reshape(2 * len(x), 4))
        return x + self.drop_path(windows.view(len(x), 8))


class Pair(nn.Module):
    """A block that returns its output beside something else."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.drop_path = nn.Identity()

        def forward(self, x: Tensor, size: int) -> tuple[Tensor, int]:
            return x + self.drop_path(self.fc(x)), size

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 8)[0]


@pytest.mark.parametrize(
    ("block", "note"),
    [
        (Pair, "skips per branch"),
        (Functional, "skips per block, since its branches cannot be skipped one by one"),
        (Shared, "skips per branch"),
        (Windows, "skips per branch"),
    ],
)
def test_other_shapes_of_blocks(block: type[nn.Module], note: str) -> None:
    torch.manual_seed(0)
    model = Stack(block(), block()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [f"2 drop-path modules: {note}"]
    masked = masking_twin(model)
    images = torch.randn(6, 3, 4, 4)
    for seed in range(4):
        for a, b in zip(
            output_and_gradients(model, images, seed), output_and_gradients(masked, images, seed), strict=True
        ):
            torch.testing.assert_close(a, b)
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    model(images)
    assert set(rows) == {Functional: set(), Shared: {3}, Pair: {3}, Windows: {6}}[block]
    assert [b.mode for b in drop_path_report(model, input_size=(3, 4, 4)).blocks] == [
        "skip block" if block is Functional else "skip"
    ] * 2


class Stubborn(nn.Module):
    """A block whose shortcut looks at the whole batch: neither branch nor block can be skipped."""

    def __init__(self, *, mixes: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop_path = nn.Identity()
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return x + (x.mean(0) if self.mixes else 0.0) + self.drop_path(y - y.mean(0))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.flatten(1)[:, :8])


def test_what_cannot_be_skipped_is_masked_and_says_so() -> None:
    model = Stack(Stubborn(), Stubborn()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [
        "2 drop-path modules: masks, since neither branches nor block agree with masking: outputs or gradients differ"
    ]
    model(torch.randn(4, 3, 4, 4)).sum().backward()
    report = drop_path_report(model, input_size=(3, 4, 4))
    assert [b.mode for b in report.blocks] == ["mask", "mask"]
    assert [b.realised_rate for b in report.blocks] == [0.5, 0.5], "the draw is the same"
    assert report.compute_saved == 0.0


def test_report_of_an_untouched_model_audits_its_own_modules() -> None:
    model = build("vit_tiny_patch16_224", drop_path_rate=0.3)
    report = drop_path_report(model, input_size=(3, 64, 64))
    assert [b.nominal_rate for b in report.blocks] == pytest.approx([0.0, 0.15, 0.3])
    assert not report.warnings and "its own drop-path modules" in report.notes[0]
    model.get_submodule("blocks.1.drop_path1").drop_prob = 1.5  # type: ignore[assignment]
    assert any("rate 1.5 is outside [0, 1]" in w for w in drop_path_report(model, input_size=(3, 64, 64)).warnings)
    assert not list(grafted(model)), "a report changes nothing"


def test_report_flags_what_is_wrong() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.3, mode="skip", input_size=size_of(name))
    images = torch.randn(4, *size_of(name))
    model(images)
    assert not drop_path_report(model, input_size=size_of(name)).warnings
    model.get_submodule("blocks.2.drop_path1").eval()
    assert any("blocks.2.drop_path1: in eval mode" in w for w in drop_path_report(model).warnings)
    model.train()
    block = model.get_submodule("blocks.2")
    block.drop_path2, forgotten = GraftedDropPath(0.3), block.drop_path2
    block.drop_path2.forward = lambda x: x
    forgotten.role = "mask"
    model(images)
    assert any("blocks.2.drop_path2: has rate 0.3 but was never applied" in w for w in drop_path_report(model).warnings)
    first = model.get_submodule("blocks.0")
    first.drop_path1 = block.drop_path1
    assert any("one DropPath serves blocks.0, blocks.2" in w for w in drop_path_report(model).warnings)
    set_drop_path(model, None, profile=[0.3, 0.2, 0.1], input_size=size_of(name))
    assert any("rates fall with depth" in w for w in drop_path_report(model).warnings)


def test_owners_of_one_block_share_a_rate() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_path = nn.Identity()

    class Other(Named):
        pass

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"attn": Named(), "grid": Named()}) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    model.blocks = nn.ModuleList([nn.Sequential(Named(), Other()) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    model.blocks = nn.ModuleList([nn.Sequential(Named(), Named()) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]


def test_structures_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import stochastic_depth.proof as foreign

    model = build("vit_tiny_patch16_224")
    graft(model)
    calls: list[str] = []
    original = foreign._try
    monkeypatch.setattr(foreign, "_try", lambda owner, call: calls.append(owner.name) or original(owner, call))
    conversions = convert_to_skip(model, size_of("vit_tiny_patch16_224"))
    assert calls == ["blocks.0"] and len(conversions) == 3
    assert len(find_blocks(model)) == 3


# ---- modules of other libraries -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + drop_path(mlp(x)) with somebody's module, under somebody's name."""

    def __init__(self, drop: nn.Module | None, attribute: str = "drop_path") -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.attribute = attribute
        setattr(self, attribute, drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.attribute)(self.mlp(x))


class Net(nn.Module):
    """Blocks on (B, 8)."""

    size = (3, 8, 8)

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 8, 8), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).flatten(2))
        for block in self.blocks:
            x = block(x)
        return x

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, L) -> what blocks work on."""
        return x.mean(2)


def copied_drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """The function that transformers and others carry along."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    random_tensor = keep_prob + torch.rand((x.shape[0], *(1,) * (x.ndim - 1)), dtype=x.dtype, device=x.device)
    return x.div(keep_prob) * random_tensor.floor_()


class Dinov2DropPath(nn.Module):
    """As in transformers, where every model has one of its own."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        return copied_drop_path(hidden_states, self.drop_prob or 0.0, self.training)


class ConvNextDropPath(Dinov2DropPath):
    pass


class Branchless(timm.layers.DropPath):
    """A subclass whose name says nothing."""


class TokenDropPath(nn.Module):
    """Made for (B, L, C) only; calls its rate `drop_rate`."""

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.eps, self.drop_rate = 1e-6, drop_rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        batch, _, _ = x.shape
        keep = torch.rand(batch, 1, 1, device=x.device) >= self.drop_rate
        return x * keep / (1 - self.drop_rate)


class Survival(nn.Module):
    """Holds the chance of keeping, in a buffer."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.p: Tensor
        self.register_buffer("p", torch.tensor(1 - drop_prob))

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), *(1,) * (x.ndim - 1)) < self.p
        return x * kept / self.p if self.training else x


class ByDropout(nn.Module):
    """Has torch's dropout make the mask."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout(torch.ones(len(x), *(1,) * (x.ndim - 1)))


class WholeBatch(nn.Module):
    """Drops all samples or none, by Python's generator, and scales nothing."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if self.training and random.random() < self.prob else x


KNOWN: dict[str, tuple[Callable[[float], nn.Module], str, bool, str]] = {
    # name: module at a rate, the attribute it stands under, scale_by_keep, mode
    "timm": (timm.layers.DropPath, "drop_path", True, "mask"),
    "timm unscaled": (lambda p: timm.layers.DropPath(p, scale_by_keep=False), "drop_path", False, "mask"),
    "torchvision row": (lambda p: StochasticDepth(p, "row"), "stochastic_depth", True, "mask"),
    "torchvision batch": (lambda p: StochasticDepth(p, "batch"), "sd", True, "batch"),
    "subclass": (Branchless, "anything", True, "mask"),
    "transformers": (Dinov2DropPath, "drop_path1", True, "mask"),
    "subclass in transformers": (ConvNextDropPath, "dropout_layer", True, "mask"),
    "tokens": (TokenDropPath, "droppath", True, "mask"),
    "chance of keeping": (Survival, "drop_path_mlp", True, "mask"),
    "by dropout": (ByDropout, "drop_path", True, "mask"),
    "whole batch": (WholeBatch, "path_drop", False, "batch"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_module_of_another_library_is_known_by_what_it_does(name: str) -> None:
    build_module, attribute, scale_by_keep, mode = KNOWN[name]
    for rate in (0.0, 0.3, 1.0):
        assert foreign_rate(build_module(rate)) == pytest.approx(rate)
    model = Net(*(Residual(build_module(rate), attribute) for rate in (0.0, 0.3, 0.6)))
    if name == "tokens":
        model.tokens = lambda x: x.transpose(1, 2)  # (B, L, C)
    assert [b.nominal_rate for b in drop_path_report(model, input_size=Net.size).blocks] == pytest.approx([0, 0.3, 0.6])
    result = set_drop_path(model, 0.4, profile="constant", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    modules = [block.get_submodule(attribute) for block in model.blocks]
    assert all(isinstance(m, GraftedDropPath) and m.drop_prob == 0.4 for m in modules)
    assert all((m.scale_by_keep, m.mode) == (scale_by_keep, mode) for m in modules), "no mode leaves each module's own"


@pytest.mark.parametrize("name", ["timm", "timm unscaled", "torchvision batch", "chance of keeping", "whole batch"])
@pytest.mark.parametrize("mode", [None, "skip"])
def test_a_replaced_module_multiplies_kept_samples_as_before(name: str, mode: Mode | None) -> None:
    build_module, attribute, scaled, own_mode = KNOWN[name]
    model = Net(Residual(build_module(0.5), attribute)).train()
    set_drop_path(model, 0.5, mode=mode, input_size=Net.size)
    block, x = model.blocks[0], torch.randn(64, 8)
    branch = block.eval().mlp(x)  # in training a hook of the block selects what it is given
    block.train()
    outcomes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        factors = ((block(x) - x) / branch).mean(1).round(decimals=3)
        assert set(factors.tolist()) <= {0.0, 2.0 if scaled else 1.0}
        outcomes.add(len(factors.unique()))
    assert outcomes == ({1} if (mode or own_mode) == "batch" else {2})


class Tokens(nn.Module):
    """Drops tokens, not samples."""

    def __init__(self, *, name: str = "tokens") -> None:
        super().__init__()
        self.p, self.name = 0.25, name

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * 2 if self.name == "not quiet in evaluation" else x
        keep = {
            "tokens": (*x.shape[:-1], 1),
            "channels": (1,) * (x.ndim - 1) + x.shape[-1:],
            "elements": x.shape,
        }.get(self.name, (len(x), *(1,) * (x.ndim - 1)))
        out = x * (torch.rand(keep) >= self.p) / (1 - self.p)
        return out + 0.1 * torch.rand(()) if self.name == "noise" else out


class NoRate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return copied_drop_path(x, 0.1, self.training)


UNKNOWN: dict[str, Callable[[], object]] = {
    "Dropout": lambda: nn.Dropout(0.1),
    "Linear": lambda: nn.Linear(8, 8),
    "ReLU": nn.ReLU,
    "NoRate": NoRate,
    "<lambda>": lambda: lambda x: x,
    "partial": lambda: partial(stochastic_depth, p=0.1, mode="row"),
}


@pytest.mark.parametrize("kind", [*UNKNOWN, "tokens", "channels", "elements", "noise", "not quiet in evaluation"])
@pytest.mark.parametrize("attribute", ["drop_path", "drop_path2", "stochastic_depth"])
def test_what_is_called_drop_path_and_does_something_else_is_refused_by_name(kind: str, attribute: str) -> None:
    wrong = UNKNOWN[kind]() if kind in UNKNOWN else Tokens(name=kind)
    model = Net(Residual(nn.Identity()), Residual(timm.layers.DropPath(0.2)), Residual(wrong, attribute))
    before = traces(model)
    name = kind if kind in UNKNOWN else "Tokens"
    with pytest.raises(
        ValueError, match=rf"^blocks\.2\.{attribute} \({name}\): .*put layers.drop_path.DropPath or nn"
    ) as e:
        set_drop_path(model, 0.3, input_size=Net.size)
    assert len(str(e.value).splitlines()) == 1
    assert traces(model) == before
    report = drop_path_report(model, input_size=Net.size)
    assert [b.name for b in report.blocks][:2] == ["blocks.0", "blocks.1"]
    assert (
        f"blocks.2.{attribute}: {name} is not known to drop whole samples; set_drop_path refuses it" in report.warnings
    )


@pytest.mark.parametrize("build_module", [NoRate, lambda: Tokens(name="tokens")])
def test_a_class_called_drop_path_is_refused_under_any_name(build_module: Callable[[], nn.Module]) -> None:
    module = build_module()
    module.__class__ = type("MyDropPath2d", (type(module),), {})
    with pytest.raises(ValueError, match=r"blocks\.0\.gate \(MyDropPath2d\)"):
        set_drop_path(Net(Residual(module, "gate")), 0.3, input_size=Net.size)


def test_sequences() -> None:
    dropout = nn.Sequential(nn.Dropout(0.1), timm.layers.DropPath(0.1))
    ends = [nn.Sequential(), nn.Sequential(nn.Identity()), nn.Sequential(timm.layers.DropPath(0.1)), dropout]
    model = Net(*(Residual(end) for end in ends))
    result = set_drop_path(model, 0.3, profile="constant", mode="skip", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert result.notes == ["4 drop-path modules: skips per branch"] and len(list(grafted(model))) == 4
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    model.train()(torch.randn(10, *Net.size))
    assert rows == [7] * 4


def test_a_rate_outside_its_range_is_mended() -> None:
    for rate in (1.5, -0.5, math.nan):
        model = Net(Residual(timm.layers.DropPath(rate)))
        assert any("outside [0, 1]" in w for w in drop_path_report(model, input_size=Net.size).warnings)
        assert set_drop_path(model, 0.3, input_size=Net.size).rates == [0.3]


class Listed(nn.Module):
    """Two branches whose drop-path modules stand in a list, one of them at rate 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_paths = nn.ModuleList([nn.Identity(), timm.layers.DropPath(0.2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_paths[0](self.fc1(x))
        return x + self.drop_paths[1](self.fc2(x))


class Beside(Net):
    """A model with one list of blocks and one of drop-path modules."""

    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Linear(8, 8) for _ in range(count)))
        self.drop_paths = nn.ModuleList(nn.Identity() if not i else timm.layers.DropPath(0.1) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).flatten(2))
        for block, drop_path in zip(self.blocks, self.drop_paths, strict=True):
            x = x + drop_path(block(x))
        return x


def test_lists_of_drop_path_modules() -> None:
    model = Net(Listed(), Listed())
    result = set_drop_path(model, 0.4, mode="skip", input_size=Net.size)
    assert [list(b.drop_paths) for b in result.blocks] == [["drop_paths.0", "drop_paths.1"]] * 2
    assert result.rates == [0.0, 0.4] and result.notes == ["4 drop-path modules: skips per branch"]
    model = Beside(3)
    result = set_drop_path(model, 0.4, mode="skip", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["drop_paths.0", "drop_paths.1", "drop_paths.2"]
    assert result.rates == pytest.approx([0.0, 0.2, 0.4])
    assert result.notes == ["3 drop-path modules: masks, since it stands beside its block, not in it"]
    model.train()(torch.randn(5, *Net.size))
    assert not drop_path_report(model, input_size=Net.size).warnings


# ---- what a probe sees, and leaves ----------------------------------------------------------------------------------


class TrainOnly(Residual):
    """Calls drop path only in training, behind a norm that counts."""

    def __init__(self) -> None:
        super().__init__(timm.layers.DropPath(0.5))
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.mlp(self.norm(x)))
        if not self.training:
            return x + branch
        self.passes += 1 + 0 * random.random() + 0 * np.random.rand()
        return x + self.drop_path(branch)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_drop_in_training_only(training: bool) -> None:
    model = Net(*(TrainOnly() for _ in range(3))).train(training)
    model.blocks[1].norm.eval()  # as a part frozen for fine-tuning
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {name: m.training for name, m in model.named_modules()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    result = set_drop_path(model, 0.3, mode="skip", input_size=Net.size)
    assert result.notes == ["3 drop-path modules: skips per branch"] and result.rates == pytest.approx([0, 0.15, 0.3])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "statistics are left alone"
    assert flags == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]
    assert all(m.samples_seen == 0 for m in grafted(model))


class WantsTargets(Net):
    """Runs in evaluation only, unless it is given targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None or not self.training, "targets are needed in training"
        return super().forward(x)


class TrainsOnly(Net):
    """Runs in training only."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        return super().forward(x)


@pytest.mark.parametrize("kind", [WantsTargets, TrainsOnly])
def test_models_that_run_in_one_mode_only(kind: type[Net]) -> None:
    model = kind(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity()))
    assert set_drop_path(model, 0.3, mode="skip", input_size=Net.size).notes == [
        "2 drop-path modules: skips per branch"
    ]


class TokensFirst(Net):
    """Blocks on (L, B, C)."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)


class Windowed(Net):
    """Blocks on (B * L, C)."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
@pytest.mark.parametrize(
    "size", [(3, 8, 8), (3, 8, 16), (3, 8, 24), (3, 32, 32)], ids=lambda s: f"{s[1] * s[2] // 64} tokens"
)
def test_tokens_first_drops_samples_and_no_tokens(mode: Mode, size: tuple[int, int, int]) -> None:
    model = TokensFirst(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity())).train()
    result = set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=size)
    if mode == "skip":
        assert result.notes == ["2 drop-path modules: masks, since samples lie in dimension 1 there, behind tokens"]
    block, tokens = model.blocks[0], size[1] * size[2] // 64
    for batch in (1, 2, 3, 6, 16):  # as many as tokens, too
        block.drop_path.reset_counts()
        x = torch.randn(tokens, batch, 8)
        dropped = (block(x) == x).all(2)  # (L, B)
        assert torch.equal(dropped.all(0), dropped.any(0)), "all tokens of a sample, or none"
        assert block.drop_path.samples_seen == batch and block.drop_path.samples_dropped == int(dropped[0].sum())
    model(torch.randn(4, *size)).sum().backward()
    assert not drop_path_report(model, input_size=size).warnings


def test_parts_of_samples_are_said() -> None:
    model = Windowed(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity()))
    result = set_drop_path(model, 0.5, mode="skip", input_size=(3, 32, 32))
    assert result.notes == [
        "2 drop-path modules: skips per branch",
        "2 drop-path modules: draw for each of 16 parts of an image, as their blocks do",
    ]


class Unbatched(Residual):
    """Drops a part of what all samples share."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(x.new_ones(4, 8))).sum(0)


def test_drop_path_of_what_is_no_sample_is_refused() -> None:
    model = Net(Residual(timm.layers.DropPath(0.5)), Unbatched(timm.layers.DropPath(0.5)))
    before = traces(model)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.drop_path: no dimension of what it is given grows with the number"
    ):
        set_drop_path(model, 0.5, input_size=Net.size)
    assert traces(model) == before


# ---- nothing is changed unless all is right -------------------------------------------------------------------------


def traces(model: nn.Module) -> list[object]:
    """All that an unfinished conversion could leave: modules, hooks, attributes, settings."""
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs)]
        settings = (
            (module.drop_prob, module.rate, module.mode, module.samples_seen) if isinstance(module, DropPath) else ()
        )
        found.append((name, id(module), module.training, sorted(vars(module)), list(module._modules), hooks, settings))
    return found


WRONG: list[tuple[object, dict, str]] = [
    (1.7, {}, r"rate must be a number in \[0, 1\], got 1.7"),
    (None, {"profile": [0.1, 0.2]}, "has 2 entries, the model 3 blocks"),
    (0.8, {"rate_is": "mean"}, "cannot reach mean 0.8"),
    (0.99, {"rate_is": "expected_macs"}, "cannot reach expected_macs 0.99"),
    (0.3, {"rate_is": "median"}, "rate_is must be one of"),
    (0.3, {"break_even": {"sep_conv": 0.1}}, "no branch of kind 'sep_conv'"),
    (0.3, {"break_even": 2.0}, "break_even must be a number"),
    (0.3, {"mode": "skp"}, "mode must be one of"),
    (0.3, {"schedule": "early"}, "schedule must be a DropPathSchedule, got 'early'"),
    (0.3, {"schedule": lambda step: 3.0}, r"multiplier must be a number in \[0, 1\], got 3.0"),
    (0.3, {"input_size": (1, 8, 8)}, r"forward pass on images of \(1, 8, 8\) failed"),
]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("rate", "settings", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_what_is_refused_changes_nothing(rate: float, settings: dict, message: str, converted: bool) -> None:
    name = "vit_tiny_patch16_224"
    model = build(name, drop_path_rate=0.2).train()
    if converted:
        if "input_size" in settings:
            pytest.skip("needs no forward pass any more")
        set_drop_path(model, 0.5, mode="batch", input_size=size_of(name)).set_step(1)
        model(torch.randn(2, *size_of(name)))
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        set_drop_path(model, rate, **{"mode": "skip", "input_size": size_of(name), **settings})
    assert traces(model) == before


def test_an_interruption_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import stochastic_depth.proof as foreign

    model = build("resnet18", drop_path_rate=0.2)
    before = traces(model)
    installed: list[object] = []

    def interrupted(*args: object) -> None:
        if installed:
            raise KeyboardInterrupt
        installed.append(original(*args))

    original = foreign._install
    monkeypatch.setattr(foreign, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_drop_path(model, 0.3, mode="skip", input_size=SIZE)
    assert installed and traces(model) == before


# ---- the proof ------------------------------------------------------------------------------------------------------


class Entangled(nn.Module):
    """Branches that can be skipped one by one but not together, in a block that cannot be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1(x)
        short = len(first) < len(x)
        out = x + x.mean(0) + self.drop_path1(first)
        second = self.fc2(x)
        return out + self.drop_path2(second * 2 if short and len(second) < len(x) else second)


def test_what_agrees_alone_but_not_together_is_not_installed_together() -> None:
    model = Stack(Entangled(), Entangled()).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert result.notes == [
        "2 drop-path modules: skips per branch",
        "2 drop-path modules: masks, since neither branches nor block agree with masking: outputs or gradients differ",
    ]
    masked, images = masking_twin(model), torch.randn(6, 3, 4, 4)
    for seed in range(4):
        for a, b in zip(
            output_and_gradients(model, images, seed), output_and_gradients(masked, images, seed), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["caformer_s18", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_other_dtypes_skip_as_float32(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    result = set_drop_path(model, 0.6, profile="constant", mode="skip", input_size=size_of(name))
    assert result.notes == [f"{len(list(grafted(model)))} drop-path modules: skips per branch"]
    assert {p.dtype for p in model.parameters()} == {dtype}
    images = torch.randn(3, *size_of(name), dtype=dtype)
    assert model.train()(images).dtype == dtype


class Overflowing(Residual):
    """Leaves a shortcut behind that float16 does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1e6


def test_activations_that_overflow_are_no_proof_against_skipping() -> None:
    model = Net(Overflowing(nn.Identity()), Residual(nn.Identity())).half()
    assert not model.eval()(torch.randn(2, *Net.size).half()).isfinite().any()
    result = set_drop_path(model, 0.5, mode="skip", input_size=Net.size)
    assert result.notes == ["2 drop-path modules: skips per branch"]


def test_a_proof_is_run_in_full_precision() -> None:
    backends: Any = torch.backends
    units = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        before = [unit.fp32_precision for unit in units]
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert {unit.fp32_precision for unit in units} <= {"ieee", "none"}
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            model = build("deit3_small_patch16_224")
            result = set_drop_path(model, 0.5, mode="skip", input_size=size_of("deit3_small_patch16_224"))
        assert result.notes == ["6 drop-path modules: skips per branch"]
        assert [unit.fp32_precision for unit in units] == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(own)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_grafted_models_are_traced_by_fx(name: str, mode: str) -> None:
    model = build(name)
    set_drop_path(model, 0.5, mode=mode, input_size=size_of(name))
    x = torch.randn(4, *size_of(name))
    graph = torch.fx.symbolic_trace(model)
    graph(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    dropped = sum(m.samples_dropped for m in grafted(model))
    assert dropped > 0
    model.eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_grafted_models_that_mask_are_scripted_in_evaluation(name: str) -> None:
    model = build(name)
    set_drop_path(model, 0.5, mode="mask", input_size=size_of(name))
    x = torch.randn(2, *size_of(name))
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))
