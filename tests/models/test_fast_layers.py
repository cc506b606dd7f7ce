"""Other libraries' models with fast layers against themselves without: values, gradients, draws, copies, and who stays."""

import copy
import io
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import GlobalResponseNormMlp, Mlp
from timm.layers.attention import Attention
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from layers import fast_conv, fast_cpu
from layers.fast import FastLinear, plain_paths, takes
from layers.fast_conv import FastDepthwiseConv2d
from models.factory import create_model
from models.fast_layers import (
    FastAttention,
    FastConvNeXtBlock,
    FastLayerNorm,
    FastLayerNorm2d,
    FastMlp,
    FastWindowAttention,
    use_fast_layers,
)
from stochastic_depth import set_drop_path
from stochastic_depth.graft import grafted

needs_bfloat16 = pytest.mark.skipif(
    not takes(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this processor"
)
pytestmark = pytest.mark.skipif(not takes(torch.empty(1)), reason="torch without oneDNN has no fast paths")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way for small images too, on one vendor's processors as on another's."""
    torch.manual_seed(0)
    monkeypatch.setattr("layers.fast._HAS_FAST_MKL", False)
    monkeypatch.setattr(fast_conv, "LARGE_IMAGES", 1)
    monkeypatch.setattr("layers.fast.FEWEST_PRODUCTS", 1)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5, init_values=0.5)


MODELS: dict[str, tuple[Any, set[type]]] = {
    "timm/vit": (vit, {FastLinear, FastMlp, FastAttention, FastLayerNorm}),
    "timm/convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5),
        {FastLinear, FastDepthwiseConv2d, FastLayerNorm2d},  # its MLPs are 1x1 convolutions
    ),
    "timm/convnext of linear layers": (
        lambda: timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5),
        {FastLinear, FastDepthwiseConv2d, FastMlp, FastLayerNorm, FastLayerNorm2d, FastConvNeXtBlock},
    ),
    "timm/swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 1, 1, 1), embed_dim=12,
            num_heads=(1, 2, 2, 4), num_classes=5,
        ),
        {FastLinear, FastMlp, FastWindowAttention, FastLayerNorm},
    ),
    "timm/efficientnet": (lambda: timm.create_model("efficientnet_lite0", num_classes=5), {FastLinear, FastDepthwiseConv2d}),
    "timm/mixer": (
        lambda: timm.create_model("mixer_s32_224", img_size=64, num_classes=5),
        {FastLinear, FastMlp, FastLayerNorm},
    ),
    "timm/convformer": (
        lambda: timm.models.metaformer.MetaFormer(
            depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, token_mixers=timm.models.metaformer.SepConv,
            norm_layers=timm.models.metaformer.LayerNorm2dNoBias,
        ),
        {FastLinear, FastDepthwiseConv2d, FastLayerNorm, FastLayerNorm2d},  # of classes of its own, without bias
    ),
    "torchvision/vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
        {FastLinear, FastLayerNorm},
    ),
    "torchvision/convnext": (
        lambda: torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(16, None, 2)], num_classes=5),
        {FastLinear, FastDepthwiseConv2d, FastLayerNorm, FastLayerNorm2d},
    ),
    "torchvision/resnet": (lambda: torchvision.models.resnet18(num_classes=5), {FastLinear}),
}  # fmt: skip


def step(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and gradients of a training step, and logits in evaluation; the same draws for all."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model.train()(images)
    logits.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        return [logits.detach(), *gradients, model.eval()(images)]


def kinds(model: nn.Module) -> set[type]:
    norms = (FastLayerNorm, FastLayerNorm2d)
    of = (FastLinear, FastDepthwiseConv2d, FastMlp, FastAttention, FastWindowAttention, FastConvNeXtBlock, *norms)
    return {kind for kind in of for module in model.modules() if isinstance(module, kind)}


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    largest = max(float(b.norm()) for b in expected)
    for a, b in zip(found, expected, strict=True):
        # some are zero but for rounding
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-2 * largest)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(name: str, precision: str) -> None:
    build, expected_kinds = MODELS[name]
    plain = build()
    images = torch.randn(4, 3, *((64, 64) if "mixer" in name or "efficientnet" in name else (32, 32)))
    fast = copy.deepcopy(plain)
    assert use_fast_layers(fast) > 0 and use_fast_layers(fast) == 0
    assert kinds(fast) == expected_kinds and not kinds(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    statistics = copy.deepcopy(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
        found, expected = step(fast, images), step(plain, images)
        plain.load_state_dict(statistics)
        fast.load_state_dict(statistics)
        with plain_paths():
            switched_off = step(fast, images)
    assert_near(found, expected, 1e-4 if precision == "float32" else 0.1)
    for a, b in zip(switched_off, expected, strict=True):
        assert torch.equal(a, b), "turned off it is the plain model to the bit"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "timm/xcit_nano_12_p16_224",
        "timm/eva02_tiny_patch14_224",
        "timm/cait_xxs24_224",
        "timm/levit_128s",
        "timm/mvitv2_tiny",
        "timm/hiera_tiny_224",
        "timm/convnextv2_atto",
        "timm/edgenext_xx_small",
        "timm/fastvit_t8",
        "timm/mobilenetv3_small_100",
        "timm/repghostnet_050",
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/swin_t",
    ],
)
def test_families_of_models(name: str) -> None:
    plain = create_model(name, num_classes=5)
    for module in plain.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    fast, images = copy.deepcopy(plain), torch.randn(4, *plain.pretrained_cfg["input_size"])
    assert use_fast_layers(fast) > 0
    assert_near(step(fast, images), step(plain, images), 0.02)  # gradients through batch norms of 4 images


@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("first", ["fast layers", "drop path"])
@pytest.mark.parametrize("name", ["timm/vit", "timm/convnext of linear layers", "timm/swin"])
def test_with_stochastic_depth(name: str, first: str, mode: Any) -> None:
    plain = MODELS[name][0]()
    fast, images = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    for model in (plain, fast):
        if model is fast and first == "fast layers":
            use_fast_layers(model)
        set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=(3, 32, 32))
        if model is fast and first == "drop path":
            assert use_fast_layers(model) > 0
    assert [m.role for m in grafted(plain)] == [m.role for m in grafted(fast)]
    assert {m.role for m in grafted(fast)} == {"branch" if mode == "skip" else "mask"}
    assert_near(step(fast, images), step(plain, images), 1e-4)


@pytest.mark.parametrize("first", ["fast layers", "drop path"])
def test_a_block_that_is_an_attention_itself_goes_on_skipping(first: str) -> None:
    model: Any = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, block_fn=ParallelScalingBlock
    )
    if first == "fast layers":
        use_fast_layers(model)
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 32, 32))
    use_fast_layers(model)
    assert isinstance(model.blocks[0], FastAttention)
    rows: list[int] = []
    model.blocks[0].mlp_drop.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(torch.randn(8, 3, 32, 32))
    assert rows == [4]
    model.blocks[0].forward = lambda x: x  # another's code is still seen
    with pytest.warns(UserWarning, match="forward of a ParallelScalingBlock was replaced"):
        model(torch.randn(8, 3, 32, 32))


def test_less_is_kept_for_backward() -> None:
    def kept(model: nn.Module) -> int:
        seen: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            if not isinstance(x, nn.Parameter):
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = model(torch.randn(16, 3, 32, 32))
        assert y.requires_grad
        return sum(seen.values())

    plain = vit()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast)
    assert kept(fast) < 0.85 * kept(plain)


@pytest.mark.parametrize("name", ["timm/vit", "timm/swin"])
def test_copies_and_pickles_are_fast_too(name: str) -> None:
    model, images = MODELS[name][0](), torch.randn(2, 3, 32, 32)
    use_fast_layers(model)
    expected = model.eval()(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in others:
        assert kinds(other) == kinds(model) and torch.equal(other(images), expected)
        assert not other.training and use_fast_layers(other) == 0
    assert copy.deepcopy(model).train().training


def test_names_stay() -> None:
    """Other code asks a module's class for its name."""
    model = vit()
    before = [type(m).__name__ for m in model.modules() if getattr(m, "fused_attn", False)]
    use_fast_layers(model)
    after = [m for m in model.modules() if isinstance(m, FastAttention)]
    assert before == [type(m).__name__ for m in after] == ["Attention", "Attention"]
    assert all(isinstance(m, nn.Module) and type(m).__module__ == "timm.layers.attention" for m in after)


def graph(y: Tensor) -> str:
    """Names of the nodes behind a tensor."""
    names, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            todo += [following for following, _ in node.next_functions]
    return " ".join(names)


def mlp(**arguments: Any) -> Mlp:
    module = Mlp(16, 32, **arguments)
    use_fast_layers(module)
    return module


def test_an_mlp() -> None:
    x = torch.randn(4, 9, 16)
    assert "_MlpBackward" in graph(mlp()(x)) and "Gelu" not in graph(mlp()(x))
    # in evaluation dropout drops nothing
    assert "_MlpBackward" in graph(mlp(drop=0.5).eval()(x)) and "_MlpBackward" in graph(mlp(act_layer=nn.SiLU)(x))
    for name, module in {
        "dropout": mlp(drop=0.5),
        "norm": mlp(norm_layer=nn.LayerNorm),
        "another activation": mlp(act_layer=nn.Tanh),
    }.items():
        found = graph(module(x))
        assert "_MlpBackward" not in found and "_LinearBackward" in found, name
    assert type(mlp(use_conv=True).fc1) is nn.Conv2d and use_fast_layers(GlobalResponseNormMlp(16, 32)) == 2
    torch.testing.assert_close(mlp(use_conv=True)(torch.randn(2, 16, 3, 3)).shape, torch.Size([2, 16, 3, 3]))


@pytest.mark.parametrize("part", ["fc1", "act", "drop1", "norm", "fc2", "drop2"])
def test_a_hook_inside_an_mlp_is_called(part: str) -> None:
    module, calls = mlp(), []
    module.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    module(torch.randn(4, 16))
    assert calls == [1]


def attend(tokens: int = 17, **arguments: Any) -> tuple[str, Tensor, Tensor]:
    """The graph behind attention, and its output with and without fast paths."""
    torch.manual_seed(0)
    module = Attention(32, num_heads=2, **{k: v for k, v in arguments.items() if k not in ("attn_mask", "is_causal")})
    use_fast_layers(module)
    given = {k: v for k, v in arguments.items() if k in ("attn_mask", "is_causal")}
    x = torch.randn(3, tokens, 32)
    torch.manual_seed(1)
    found = module(x, **given)
    names = graph(found) if found.requires_grad else ""
    torch.manual_seed(1)
    with plain_paths():
        return names, found, module(x, **given)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_a_block_of_convnext_puts_its_layer_scale_into_weights(precision: str) -> None:
    plain: Any = ConvNeXtBlock(16, ls_init_value=0.5).train()
    fast, images = copy.deepcopy(plain), torch.randn(4, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    use_fast_layers(fast)
    assert type(fast).__name__ == "ConvNeXtBlock" and isinstance(pickle.loads(pickle.dumps(fast)), FastConvNeXtBlock)

    def results(block: Any, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = block(x.requires_grad_())
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])]

    for x in (images, images.bfloat16()) if precision == "bfloat16" else (images,):
        found, expected = results(fast, x), results(plain, x)
        assert [(each.dtype, each.shape) for each in found] == [(each.dtype, each.shape) for each in expected]
        assert_near(found, expected, 1e-5 if precision == "float32" else 0.02)
    kept: list[str] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(str(tuple(x.shape))), lambda _: torch.empty(0)):
        fast(images)
        wide = kept.count("(4, 9, 9, 64)")
        plain(images)
    assert wide == 1 and kept.count("(4, 16, 9, 9)") > 0
    called: list[int] = []
    fast.mlp.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-5)
    assert called == [1], "a hook on the MLP is called"


def test_blocks_of_convnext_that_stay_timms() -> None:
    for block in (
        ConvNeXtBlock(16, ls_init_value=None),
        ConvNeXtBlock(16, conv_mlp=True),
        ConvNeXtBlock(16, use_grn=True),
    ):
        use_fast_layers(block)
        assert type(block) is ConvNeXtBlock


def test_attention() -> None:
    names, found, plain = attend()
    assert "_Attention" in names and "ScaledDotProduct" not in names
    torch.testing.assert_close(found, plain)
    with torch.no_grad():
        assert torch.equal(*attend()[1:]), "without gradients it is torch's form"
    cases: list[dict[str, Any]] = [
        {"attn_mask": torch.randn(17, 17)},
        {"is_causal": True},
        {"attn_drop": 0.5},
        {"tokens": 300},
        {"tokens": 65},  # few in bfloat16 only
    ]
    for arguments in cases:
        names, found, plain = attend(**arguments)
        assert "_Attention" not in names and "_LinearBackward" in names, arguments
        torch.testing.assert_close(found, plain)


def test_attention_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if fast_cpu.library() is None:
        pytest.skip("no kernels for this CPU, or no C compiler")
    monkeypatch.setattr(fast_cpu, "FEWEST", 1)
    for arguments in ({"tokens": 300}, {"tokens": 17}, {"tokens": 300, "qk_norm": True, "norm_layer": nn.LayerNorm}):
        names, found, plain = attend(**arguments)
        assert "_KernelAttentionOf" in names and "ScaledDotProduct" not in names, arguments
        torch.testing.assert_close(found, plain)
    names, found, plain = attend(tokens=300, attn_drop=0.5)
    assert "_KernelAttention" not in names
    torch.testing.assert_close(found, plain)


@needs_bfloat16
def test_attention_in_bfloat16_over_more_tokens() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "_Attention" in attend(tokens=65)[0] and "_Attention" in attend(qk_norm=True, norm_layer=nn.LayerNorm)[0]


def windows(tokens: int = 16, **arguments: Any) -> WindowAttention:
    side = int(tokens**0.5)
    module = WindowAttention(32, 2, window_size=(side, side), **arguments)
    with torch.no_grad():
        module.relative_position_bias_table.normal_()
    assert use_fast_layers(module) > 0 and type(module) is FastWindowAttention
    return module


def attend_within(module: WindowAttention, mask: Tensor | None) -> tuple[str, list[Tensor], list[Tensor]]:
    """The graph behind attention within windows, and output and gradients with and without fast paths."""
    x = torch.randn(6, module.window_area, 32, requires_grad=True)

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        out = module(x, mask)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]

    found = results()
    with plain_paths():
        return graph(found[0]), found, results()


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize("per_image", [None, 1, 3, 6])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_within_windows(qkv_bias: bool, per_image: int | None, precision: str) -> None:
    module = windows(qkv_bias=qkv_bias, attn_drop=0.5).eval()  # in evaluation dropout drops nothing
    mask = None if per_image is None else torch.randint(2, (per_image, 16, 16)) * -100.0
    with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
        names, found, plain = attend_within(module, mask)
    assert "_Attention" in names and "Softmax" not in names
    assert_near(found, plain, 1e-5 if precision == "float32" else 0.03)
    assert all(float(gradient.abs().max()) > 0 for gradient in found)


@pytest.mark.parametrize("tokens, mask", [(64, None), (36, None), (49, (5, 49, 49)), (49, (4, 36, 36))], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_windows_that_do_not_fit_are_timms_to_refuse(tokens: int, mask: tuple[int, ...] | None, trained: bool) -> None:
    model = nn.Sequential(WindowAttention(96, 3, window_size=7))
    use_fast_layers(model)
    with torch.set_grad_enabled(trained), pytest.raises(RuntimeError):
        model[0](torch.randn(64, tokens, 96), None if mask is None else torch.randn(mask))


def test_features_are_extracted_by_torch_fx() -> None:
    model, x = torchvision.models.convnext_tiny(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    expected = model.features[:2](x)
    use_fast_layers(model)
    found = create_feature_extractor(model, {"features.1": "stage"})(x)["stage"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_within_windows_that_stays_timms() -> None:
    hooked = windows()
    hooked.softmax.register_forward_hook(lambda *_: None)
    for name, module in {
        "dropout": windows(attn_drop=0.5),
        "many tokens": windows(81),  # few in bfloat16 only
        "a hook on a part": hooked,
    }.items():
        names, found, plain = attend_within(module, torch.zeros(3, *2 * [module.window_area]))
        assert "_Attention" not in names and "_LinearBackward" in names, name
        assert_near(found, plain, 1e-5)
    with pytest.raises(RuntimeError):
        windows()(torch.randn(6, 16, 32), torch.zeros(4, 16, 16))


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_what_comes_out_may_be_changed_in_place(shape: tuple[int, ...], precision: str) -> None:
    plain = nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True))
    conv = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.ReLU(inplace=True))
    for model, x in ((plain, torch.randn(shape)), (conv, torch.randn(2, 4, 8, 8))):
        fast = copy.deepcopy(model)
        use_fast_layers(fast)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            assert_near(step(fast, x), step(model, x), 1e-5 if precision == "float32" else 0.05)


def test_a_module_with_a_forward_of_its_own_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = model[0].forward
    model[0].forward = lambda x: before(x) + 1  # type: ignore[method-assign]
    assert use_fast_layers(model) == 1 and type(model[0]) is nn.Linear and type(model[1]) is FastLinear


def test_our_own_model_stays_fast() -> None:
    model, images = create_model("poolformer_n4"), torch.randn(2, 3, 32, 32)
    expected = step(copy.deepcopy(model), images)
    use_fast_layers(model)
    assert_near(step(model, images), expected, 1e-4)


@needs_bfloat16
@pytest.mark.parametrize(
    "build, shape",
    [
        (nn.LayerNorm, (3000, 16)),
        (timm.layers.LayerNorm, (3000, 16)),
        (timm.layers.LayerNorm2d, (30, 16, 10, 10)),
        (timm.layers.LayerNormAct, (3000, 16)),
        (timm.layers.LayerNormAct2d, (30, 16, 10, 10)),
        (timm.models.metaformer.LayerNorm2dNoBias, (30, 16, 10, 10)),
        (torchvision.models.convnext.LayerNorm2d, (30, 16, 10, 10)),
    ],
)
def test_layer_norms_get_exact_gradients_in_bfloat16(build: Any, shape: tuple[int, ...]) -> None:
    plain, x = build(16), torch.randn(shape).bfloat16()
    fast, upstream = copy.deepcopy(plain), (torch.randn(shape) + 0.3).bfloat16()
    assert use_fast_layers(fast) == 1 and isinstance(fast, build)
    gradients = []
    for module in (fast, plain, copy.deepcopy(plain).double()):
        inputs = x.to(torch.float64 if module.weight.dtype == torch.float64 else torch.bfloat16).requires_grad_()
        module(inputs).backward(upstream.to(inputs.dtype))
        gradients.append([p.grad.double() for p in module.parameters()])
    for ours, torchs, exact in zip(*gradients, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 4e-3 < float((torchs - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["timm/vit", "timm/convnext of linear layers", "timm/swin"])
def test_traced_exported_and_compiled(name: str) -> None:
    model, images = MODELS[name][0]().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        use_fast_layers(model)
        traced: Any = torch.jit.trace(model, images)
        found = {
            "traced": traced(images),
            "exported": torch.export.export(model, (images,)).module()(images),
            "compiled": torch.compile(model, backend="aot_eager", fullgraph=True)(images),
        }
    for how, logits in found.items():
        torch.testing.assert_close(logits, expected, msg=how)


def test_scripted() -> None:
    x, module = torch.randn(4, 16), mlp()
    norm = nn.LayerNorm(16)
    assert use_fast_layers(norm) == 1
    for each in (module, module.fc1, norm):
        torch.testing.assert_close(torch.jit.script(each)(x), each(x))
