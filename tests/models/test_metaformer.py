"""models/metaformer.py: shapes, stochastic depth in the block, and timm's model interface with timm's own tools."""

import copy
import inspect
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm.utils
import torch
from timm.data import resolve_data_config
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from layers.drop_path import MODES, DropPath
from layers.fast import plain_paths
from layers.mlp import Mlp, MlpHead
from layers.rates import drop_path_rates
from layers.token_mixers import Attention, Pooling, RandomMixing
from models.config import MetaFormerConfig
from models.factory import create_model
from models.layouts import timm_head
from models.loading import load_into
from models.metaformer import MetaFormer, MetaFormerBlock
from models.registry import list_models, model_config
from stochastic_depth.compute import count_macs
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path

HYBRID = {
    "depths": [1, 2, 1, 1],
    "dims": [16, 24, 32, 64],
    "token_mixer": ["pooling", "identity", "sep_conv", "attention"],
    "res_scale": [None, None, 1.0, 1.0],
    "layer_scale": [0.1, None, None, 0.1],
    "image_size": 64,
    "num_classes": 5,
}


def hybrid(drop_path_rate: float = 0.0, **overrides) -> MetaFormer:
    """A small model of four stages with every kind of part."""
    torch.manual_seed(0)
    return create_model("caformer_n4", drop_path_rate=drop_path_rate, **{**HYBRID, **overrides})


def isotropic(drop_path_rate: float = 0.0, **overrides) -> MetaFormer:
    """A small ViT with class token, two registers and a norm that is not the identity."""
    torch.manual_seed(0)
    settings = {"depths": [4], "dims": [32], "image_size": 64, "num_classes": 5, "register_tokens": 2}
    settings |= {} if "token_mixer" in overrides else {"head_dim": 8}
    model = create_model("vit_tiny_patch16_224", drop_path_rate=drop_path_rate, **{**settings, **overrides})
    if not isinstance(model.head.norm, nn.Identity):
        nn.init.normal_(model.head.norm.weight)  # type: ignore[arg-type]
    return model


MIXER = {"token_mixer": "spatial_mlp", "class_token": False, "register_tokens": 0, "pos_embed": "none",
         "head": {"pool": "avg"}, "spatial_hidden": 24}  # fmt: skip


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def blocks_of(model: nn.Module) -> list[MetaFormerBlock]:
    return [m for m in model.modules() if isinstance(m, MetaFormerBlock)]


# ---- block ------------------------------------------------------------------------------------------------------------


def test_block_is_two_residual_calls():
    block = MetaFormerBlock(16, Attention(16, 8), Mlp(16), layer_scale=0.5, res_scale=2.0, drop_path=0.3)
    x = torch.randn(3, 4, 5, 16)
    with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
        out = block.eval()(x)
    assert [call.args[0] for call in residual.call_args_list] == [block.drop_path1, block.drop_path2]
    y = 2.0 * x + 0.5 * block.token_mixer(block.norm1(x))
    torch.testing.assert_close(out, 2.0 * y + 0.5 * block.mlp(block.norm2(y)))


@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_sample_keeps_its_scaled_shortcut(mode):
    block = MetaFormerBlock(8, Pooling(), Mlp(8), res_scale=2.0, drop_path=1.0, drop_path_mode=mode)
    x = torch.randn(4, 3, 3, 8)
    assert torch.equal(block(x), 4.0 * x)
    block(x).sum().backward()
    missing = [n for n, p in block.named_parameters() if p.grad is None]
    assert not missing


def test_every_shipped_model_is_made_of_the_one_block():
    for name in list_models():
        config = model_config(name)
        with torch.device("meta"):
            model = MetaFormer(config.model_copy(update={"depths": [1] * len(config.depths)}))
        assert [type(b) for b in blocks_of(model)] == [MetaFormerBlock] * len(config.depths)
        with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
            model(torch.empty(2, *model.pretrained_cfg["input_size"], device="meta"))
        assert residual.call_count == 2 * len(config.depths)


def test_the_blocks_forward_is_two_lines():
    assert inspect.getsource(MetaFormerBlock.forward).split("\n") == [
        "    def forward(self, x: Tensor) -> Tensor:",
        "        x = self.drop_path1.residual(x, self.branch1, self.res_scale1(x))",
        "        x = self.drop_path2.residual(x, self.branch2, self.res_scale2(x))",
        "        return x",
        "",
    ]


def test_number_of_published_architectures():
    """What differs in parts or sizes; image sizes, input statistics and initial values of scales make no difference."""
    parts = {
        "depths", "dims", "token_mixer", "norm", "act", "mlp_ratio", "mlp_bias", "pool_size", "conv_kernel_size",
        "conv_expansion", "head_dim", "qkv_bias", "proj_bias", "spatial_hidden", "stem", "downsample", "head",
        "pos_embed", "class_token", "register_tokens",
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for name in list_models():
        config = model_config(name)
        if name.endswith("_n4"):  # ours, never published
            continue
        scales = [[s is not None for s in config.per_stage(v)] for v in (config.layer_scale, config.res_scale)]
        found.setdefault(repr((config.model_dump(include=parts), scales)), []).append(name)
    twins = [names for names in found.values() if len(names) > 1]
    assert sorted(twins) == [[f"{v}_{s}_patch16_224" for v in ("deit", "vit")] for s in ("base", "small", "tiny")]
    assert len(found) == 87 and sum(len(names) for names in found.values()) == 90


def test_blocks_know_the_kind_of_their_branches():
    kinds = [[b.drop_path1.kind, b.drop_path2.kind] for b in blocks_of(hybrid())]
    mixers = ["pooling", "identity", "identity", "sep_conv", "attention"]
    assert kinds == [[mixer, "mlp"] for mixer in mixers]


# ---- stochastic depth -------------------------------------------------------------------------------------------------


def test_rates_rise_linearly_over_blocks():
    model = hybrid(0.4)
    rates = [[b.drop_path1.drop_prob, b.drop_path2.drop_prob] for b in blocks_of(model)]
    assert rates == [[r, r] for r in drop_path_rates(0.4, model.depths)]
    assert rates[0] == [0.0, 0.0] and rates[-1] == [0.4, 0.4]


def test_state_dict_does_not_depend_on_stochastic_depth():
    expected = {k: v.shape for k, v in hybrid().state_dict().items()}
    for mode in MODES:
        for rate in (0.0, 0.3, 1.0):
            model = hybrid(rate, drop_path_mode=mode)
            assert {k: v.shape for k, v in model.state_dict().items()} == expected
            model.load_state_dict(hybrid().state_dict())
    assert not any("drop_path" in key for key in expected)


@pytest.mark.parametrize("mode", MODES)
def test_eval_ignores_stochastic_depth(mode):
    x = images()
    assert torch.equal(hybrid(0.9, drop_path_mode=mode).eval()(x), hybrid().eval()(x))
    assert not torch.equal(hybrid(0.9, drop_path_mode=mode)(x), hybrid().eval()(x))


@pytest.mark.parametrize("mode", MODES)
def test_grad_checkpointing_gives_equal_gradients(mode):
    plain, saving = hybrid(0.5, drop_path_mode=mode), hybrid(0.5, drop_path_mode=mode)
    saving.set_grad_checkpointing()
    x = images(8)
    outputs, calls = [], []
    for model in (plain, saving):
        torch.manual_seed(3)
        with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
            out = model(x)
            out.square().sum().backward()
        outputs.append(out)
        calls.append(residual.call_count)
    assert calls == [10, 20]  # the second one computed every branch again
    assert torch.equal(*outputs)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=name)
    saving.set_grad_checkpointing(False)
    with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
        saving(x).sum().backward()
    assert residual.call_count == 10


def test_stochastic_depth_of_a_model_with_one_stage():
    model = isotropic(0.3)
    assert [b.drop_path1.drop_prob for b in blocks_of(model)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    found = set_drop_path(model, 0.6, profile="linear", mode="skip")
    assert found.rates == pytest.approx([0.0, 0.2, 0.4, 0.6]) and len(found.blocks) == 4
    tokens, dim = 1 + 2 + 16, 32
    attention = tokens * dim * 4 * dim + 2 * tokens**2 * dim
    mlp = tokens * dim * 8 * dim
    macs = count_macs(model)
    assert [macs.branch(b.drop_path1) for b in blocks_of(model)] == [attention] * 4
    assert [macs.block(b) for b in found.blocks] == [attention + mlp] * 4
    assert macs.total == 4 * (attention + mlp) + 16 * dim * 3 * 16**2 + dim * 5
    set_drop_path(model, 0.2, rate_is="expected_macs")
    assert drop_path_report(model).compute_saved == pytest.approx(0.2, abs=0.02)
    model(images(8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_spatial_mlp_skips_and_counts():
    model = isotropic(0.9, drop_path_mode="skip", **MIXER)
    assert [(b.drop_path1.kind, b.drop_path2.kind) for b in blocks_of(model)] == [("mlp", "mlp")] * 4
    block = blocks_of(model)[0]
    assert count_macs(model).branch(block.drop_path1) == 2 * 16 * 24 * 32
    model(images(8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_set_drop_path_finds_every_block():
    model = hybrid()
    assert len(set_drop_path(model, 0.2, mode="skip").blocks) == sum(model.depths)


# ---- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 72)])
def test_shapes(size):
    model = hybrid().eval()
    x = torch.randn(2, 3, *size)
    features = model.forward_features(x)
    height, width = (-(-(n) // 16) for n in size)
    assert features.shape == (2, 64, height, width)
    assert model.forward_head(features).shape == (2, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, 64) == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model(x), model.get_classifier()(model.forward_head(features, pre_logits=True)))


@pytest.mark.parametrize("make", [
    lambda: create_model("poolformer_n4", image_size=64, num_classes=5),
    lambda: create_model("caformer_n4", image_size=64, num_classes=5),
    isotropic,
    lambda: isotropic(**MIXER),
])  # fmt: skip
def test_an_empty_batch_passes(make):
    out = make()(torch.empty(0, 3, 64, 64))
    assert out.shape == (0, 5)
    out.sum().backward()


@torch.no_grad()
def test_pre_logits_of_an_mlp_head_are_timms():
    theirs: Any = timm.create_model("caformer_s18", num_classes=7).eval()
    ours = create_model("caformer_s18", num_classes=7, head=timm_head(model_config("caformer_s18"))).eval()
    load_into(ours, theirs.state_dict(), "timm", replace_classifier=False)
    x = torch.randn(1, 3, 64, 64)
    features = ours.forward_features(x)
    found = ours.forward_head(features, pre_logits=True)
    assert found.shape == (1, ours.head_hidden_size) == (1, theirs.head_hidden_size) == (1, 512)
    torch.testing.assert_close(found, theirs.forward_head(theirs.forward_features(x), pre_logits=True))
    assert isinstance(ours.head.fc, MlpHead) and torch.equal(ours.get_classifier()(found), ours(x))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_head_hidden_size_is_what_comes_out_without_a_classifier(kind):
    model = hybrid(head={"kind": kind}, drop_rate=0.5)
    for change, width in (
        (lambda: None, 64),
        (lambda: model.reset_classifier(9), 64),
        (lambda: model.reset_classifier(0), 64),
        (lambda: model.prune_intermediate_layers([0]), 16),
        (lambda: model.reset_classifier(0, "avg"), 16),
        (lambda: model.reset_classifier(3), 16),
    ):
        change()
        assert model.head_hidden_size == width
        if model.head.global_pool:
            features = model.forward_features(images())
            assert model.forward_head(features, pre_logits=True).shape == (2, width)


@pytest.mark.parametrize(("head", "kind"), [("linear", nn.Dropout), ("mlp", nn.Dropout)])
def test_dropout_stands_before_the_last_layer(head, kind):
    model = hybrid(head={"kind": head}, drop_rate=1.0)
    bias = (model.head.fc.fc2 if isinstance(model.head.fc, MlpHead) else model.head.fc).bias
    assert torch.equal(model(images()), bias.expand(2, 5))  # type: ignore[union-attr]
    assert not torch.equal(model.eval()(images()), bias.expand(2, 5))  # type: ignore[union-attr]


def test_heads_differ_in_their_order():
    first = hybrid(head={"order": "norm_pool"}).eval()
    x = first.forward_features(images())
    channels_last = x.permute(0, 2, 3, 1)
    torch.testing.assert_close(first.forward_head(x), first.head.fc(first.head.norm(channels_last).mean(dim=(1, 2))))
    last = hybrid(head={"order": "pool_norm"}).eval()
    torch.testing.assert_close(last.forward_head(x), last.head.fc(last.head.norm(channels_last.mean(dim=(1, 2)))))


def test_random_mixing_names_the_size_it_was_built_for():
    model = create_model("randformer_s12", depths=[1, 1, 1, 1], image_size=64)
    assert isinstance(blocks_of(model)[2].token_mixer, RandomMixing)
    assert model.pretrained_cfg["fixed_input_size"] and not hybrid().pretrained_cfg["fixed_input_size"]
    with pytest.raises(ValueError, match="built for 16 positions, got 6 x 6; build the model with image_size"):
        model(images(size=96))


# ---- models of one stage ----------------------------------------------------------------------------------------------


def test_tokens_in_front_belong_to_the_model():
    model = isotropic().eval()
    assert not [n for n, _ in model.stages.named_parameters() if "token" in n.replace("token_mixer", "")]
    seen = []
    blocks_of(model)[0].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    features = model.forward_features(images())
    assert [x.shape for x in seen[0]] == [(2, 1 + 2 + 16, 32)] * 2 and features.shape == (2, 19, 32)
    stem = model.stem(images().permute(0, 2, 3, 1))
    positions = model.embed.pos_embed
    torch.testing.assert_close(seen[0][0][:, 3:], stem.flatten(1, 2) + positions[:, 3:])  # type: ignore[index]
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert torch.equal(model(images()), model.head.fc(model.head.norm(features)[:, 0]))  # type: ignore[operator]


@pytest.mark.parametrize("order", ["pool_norm", "norm_pool"])
def test_average_pooling_leaves_the_tokens_in_front_out(order):
    model = isotropic(head={"pool": "avg", "order": order}).eval()
    features = model.forward_features(images())
    norm = model.head.norm
    patches = features[:, 3:]
    pooled = norm(patches).mean(dim=1) if order == "norm_pool" else norm(patches.mean(dim=1))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)


@pytest.mark.parametrize("settings", [{}, MIXER], ids=["vit", "mixer"])
def test_models_with_positions_name_the_size_they_were_built_for(settings):
    model = isotropic(**settings)
    assert model.pretrained_cfg["fixed_input_size"]
    with pytest.raises(ValueError, match="built for 4 x 4 positions, got 6 x 6; build the model with image_size"):
        model(images(size=96))
    assert isotropic(**settings, image_size=[96, 64])(torch.randn(1, 3, 96, 64)).shape == (1, 5)


def test_intermediates_of_one_stage_are_those_of_its_blocks():
    model = isotropic().eval()
    outs = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, args, out: outs.append(out))
    last, features = model.forward_intermediates(images())
    grids = [out[:, 3:].reshape(2, 4, 4, 32) for out in outs]
    assert torch.equal(last, outs[-1]) and torch.equal(last, model.forward_features(images()))
    assert len(features) == 4 and all(
        torch.equal(f.permute(0, 2, 3, 1), g) for f, g in zip(features, grids, strict=True)
    )
    nhwc = model.forward_intermediates(images(), [0, -2], intermediates_only=True, output_fmt="NHWC")
    assert [torch.equal(f, g) for f, g in zip(nhwc, (grids[0], grids[2]), strict=True)] == [True, True]
    normed = model.forward_intermediates(images(), 2, norm=True, intermediates_only=True, output_fmt="NHWC")
    for f, g in zip(normed, grids[2:], strict=True):
        torch.testing.assert_close(f, model.head.norm(g))
    outs.clear()
    assert len(model.forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)) == 1
    assert len(outs) == 2
    with pytest.raises(ValueError, match=r"indices must name blocks 0 to 3, got \[4\]"):
        model.forward_intermediates(images(), [4])


def test_intermediates_of_a_grid_without_tokens():
    model = isotropic(**MIXER).eval()
    last, features = model.forward_intermediates(images())
    assert torch.equal(last, features[-1]) and last.shape == (2, 32, 4, 4)


def test_grad_checkpointing_of_intermediates():
    model = isotropic()
    model.set_grad_checkpointing()
    with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
        model.forward_intermediates(images(), intermediates_only=True)[-1].sum().backward()
    assert residual.call_count == 16


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_feature_getter_of_one_stage(layout):
    model = isotropic().eval()
    expected = model.forward_intermediates(images(), [0, 2], intermediates_only=True, output_fmt=layout)
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 2), output_fmt=layout)
    assert all(torch.equal(a, b) for a, b in zip(getter(images()), expected, strict=True))
    assert getter.feature_info.channels() == [32, 32] and getter.feature_info.reduction() == [16, 16]
    assert getter.feature_info.module_name() == ["stages.0.blocks.0", "stages.0.blocks.2"]
    assert len(blocks_of(getter)) == 3 and len(blocks_of(model)) == 4
    assert all(
        model.get_submodule(info["module"]) is b for info, b in zip(model.feature_info, blocks_of(model), strict=True)
    )


def test_reset_classifier_and_pooling_with_a_class_token():
    model = isotropic().eval()
    features = model.forward_features(images())
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("head.fc.")}
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7) and model.head.global_pool == "token"
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images()), model.head.norm(features)[:, 3:].mean(dim=1))
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), model.head.norm(features))
    with pytest.raises(ValueError, match="needs pooled features: give global_pool='avg'"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="one of 'avg', 'token', '', got 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="one of 'avg', '', got 'token'"):
        isotropic(**MIXER).reset_classifier(3, "token")
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_a_new_pooling_is_part_of_the_config():
    model = isotropic().eval()
    model.reset_classifier(7, "avg")
    assert model.config.head.pool == "avg" and model.head.config is model.config
    again = MetaFormer(MetaFormerConfig.model_validate(model.config.model_dump())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))
    model.reset_classifier(7, "token")
    assert model.config.head.pool == "token" and not torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("wrong", [-1, "3", True, 2.0, None, torch.tensor(3)])
def test_a_wrong_number_of_classes_changes_nothing(wrong):
    model = isotropic()
    before, config, classifier = list(model.state_dict()), model.config, model.head.fc
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 0, got "):
        model.reset_classifier(wrong, "avg")
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "max")
    assert model.config is config and model.head.config is config and model.head.fc is classifier
    assert model.head.global_pool == "token" and model.num_classes == 5 == model.pretrained_cfg["num_classes"]
    assert list(model.state_dict()) == before
    model.reset_classifier(np.int64(3))  # type: ignore[arg-type]
    assert type(model.num_classes) is int and model(images()).shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"])
def test_prefix_tokens_of_intermediates_are_timms(name, norm):
    size = 56 if "14" in name else 64
    theirs: Any = timm.create_model(name, depth=3, img_size=size, num_classes=7).eval()
    ours = create_model(name, depths=[3], image_size=size, num_classes=7).eval()
    load_into(ours, theirs.state_dict(), "timm", replace_classifier=False)
    x = torch.randn(2, 3, *ours.config.height_width)
    settings = {"indices": [0, 2], "norm": norm, "return_prefix_tokens": True, "intermediates_only": True}
    found, expected = ours.forward_intermediates(x, **settings), theirs.forward_intermediates(x, **settings)
    assert len(found) == len(expected) == 2
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert found[0][1].shape == (2, ours.num_prefix_tokens, ours.num_features)
    last, pairs = ours.forward_intermediates(x, indices=1, return_prefix_tokens=True, output_fmt="NHWC")
    assert torch.equal(last, ours.forward_features(x)) and pairs[0][0].shape == (2, 4, 4, ours.num_features)


def test_prefix_tokens_that_the_model_has_not():
    for model in (hybrid(), isotropic(**MIXER)):
        with pytest.raises(ValueError, match="return_prefix_tokens: this model has no class or register tokens"):
            model.forward_intermediates(images(), return_prefix_tokens=True)


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_decay_of_one_stage(coarse):
    model = isotropic(**(MIXER if coarse else {}))
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}  # type: ignore[arg-type]
    assert all(groups[n] == 0 for n in groups if n.startswith(("stem.", "embed.")))
    assert [groups[f"stages.0.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert groups["head.norm.weight"] == 4 and groups["head.fc.weight"] == 5


def test_learned_tokens_and_positions_do_not_decay():
    model = isotropic()
    assert model.no_weight_decay() == {"embed.cls_token", "embed.reg_token", "embed.pos_embed"}
    assert isotropic(**MIXER).no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if decay[id(p)] == 0}
    assert names == {n for n, p in model.named_parameters() if p.ndim == 1 or n.startswith("embed.")}


# ---- intermediate features --------------------------------------------------------------------------------------------


def test_intermediates_are_the_outputs_of_the_stages():
    model = hybrid().eval()
    last, features = model.forward_intermediates(images())
    assert torch.equal(last, features[-1]) and torch.equal(last, model.forward_features(images()))
    expected = [(2, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info]
    assert [tuple(f.shape) for f in features] == expected
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]


def test_intermediates_in_either_layout():
    model = hybrid().eval()
    nchw = model.forward_intermediates(images(), [0, -1], intermediates_only=True)
    nhwc = model.forward_intermediates(images(), [0, -1], intermediates_only=True, output_fmt="NHWC")
    assert [tuple(f.shape) for f in nhwc] == [(2, 32, 32, 16), (2, 4, 4, 64)]
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(nchw, nhwc, strict=True))


def test_intermediates_by_number_norm_and_early_stop():
    model = hybrid(head={"order": "norm_pool"}).eval()
    plain = model.forward_intermediates(images(), 2, intermediates_only=True)
    assert [f.shape[1] for f in plain] == [32, 64]
    normed = model.forward_intermediates(images(), 2, norm=True, intermediates_only=True)
    assert torch.equal(normed[0], plain[0])
    torch.testing.assert_close(normed[1], model.head.norm(plain[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    called = []
    model.stages[2].register_forward_hook(lambda *_: called.append(2))
    last, features = model.forward_intermediates(images(), [1], stop_early=True)
    assert torch.equal(last, features[0]) and last.shape[1] == 24 and not called


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []])
def test_stages_that_do_not_exist(indices):
    with pytest.raises(ValueError, match="indices"):
        hybrid().forward_intermediates(images(), indices)
    with pytest.raises(ValueError, match="NLC"):
        hybrid().forward_intermediates(images(), output_fmt="NLC")


def test_pruning_keeps_what_the_features_need():
    model = hybrid().eval()
    expected = model.forward_intermediates(images(), [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2 and model.num_features == model.head_hidden_size == 24
    assert isinstance(model.head.fc, nn.Identity) and isinstance(model.head.norm, nn.Identity)
    found = model.forward_intermediates(images(), [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(model(images()), expected[1])
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)


def test_pruning_nothing_keeps_the_norm():
    model = hybrid()
    assert model.prune_intermediate_layers(1) == [3]
    assert len(model.stages) == 4 and not isinstance(model.head.norm, nn.Identity) and model.num_classes == 0


# ---- classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_reset_classifier_keeps_everything_else(head):
    model = hybrid(0.2, head={"kind": head}).eval().double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_classifier(7)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items() if not k.startswith("head.fc."))
    assert model.num_classes == model.config.num_classes == model.pretrained_cfg["num_classes"] == 7
    assert model(images().double()).shape == (2, 7)
    assert not any(m.training for m in model.modules()) and all(p.dtype == torch.float64 for p in model.parameters())
    model.reset_classifier(0)
    features = model.forward_features(images().double())
    assert torch.equal(model(images().double()), model.forward_head(features, pre_logits=True))
    assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0


def test_unpooled_features_come_as_nchw():
    model = hybrid().eval()
    features = model.forward_features(images())
    model.reset_classifier(0, "")
    expected = model.head.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(model(images()), expected) and expected.shape == (2, 64, 4, 4)
    with pytest.raises(ValueError, match="needs pooled features"):
        model.reset_classifier(3)
    assert model.num_classes == 0
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(3, "max")


def test_new_models_have_small_random_weights_and_zero_biases():
    model = hybrid()
    weight = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))])
    weight = weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05) and float(weight.mean().abs()) < 1e-3
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    classifier = model.head.fc
    assert isinstance(classifier, nn.Linear) and float(classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


# ---- timm's tools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["poolformer_s12", "randformer_s12", "caformer_s18"])
def test_layer_decay_covers_every_parameter_once_and_rises(name):
    model = create_model(name, num_classes=2)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)
    scale = {trained[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert all(g["weight_decay"] == 0 for g in optimizer.param_groups for p in g["params"] if p.ndim == 1)
    blocks = [f"stages.{s}.blocks.{b}.mlp.fc1.weight" for s, depth in enumerate(model.depths) for b in range(depth)]
    head = [n for n in scale if n.startswith("head.fc.") and n.endswith("weight")]
    order = [scale[n] for n in ("stem.conv.weight", *blocks, head[-1])]
    assert order == sorted(order) and len(set(order)) == len(blocks) + 2 and order[-1] == 1.0
    assert order[0] == pytest.approx(0.75 ** (len(blocks) + 1))
    for stage in range(4):
        parts = [n for n in scale if n.startswith((f"stages.{stage}.downsample", f"stages.{stage}.blocks.0."))]
        assert len({scale[n] for n in parts}) == 1
    assert scale["head.norm.weight"] == order[-2]


def test_coarse_groups_are_the_stages():
    groups = timm.models.group_parameters(hybrid(), hybrid().group_matcher(coarse=True), reverse=True)
    assert groups["stem.conv.weight"] == 0
    assert [groups[f"stages.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert groups["head.fc.weight"] == 5 and set(groups) == {n for n, _ in hybrid().named_parameters()}


def test_weight_decay_spares_vectors_only():
    model = hybrid()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.9)
    assert {p.ndim > 1 for g in groups for p in g["params"] if g["weight_decay"]} == {True}
    assert {p.ndim > 1 for g in groups for p in g["params"] if not g["weight_decay"]} == {False}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_feature_getter(layout):
    model = hybrid().eval()
    expected = model.forward_intermediates(images(), [1, 2], intermediates_only=True, output_fmt=layout)
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(1, 2), output_fmt=layout)
    features = getter(images())
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert getter.feature_info.channels() == [24, 32] and getter.feature_info.reduction() == [4, 8]
    assert getter.feature_info.module_name() == ["stages.1", "stages.2"]
    assert [n for n, _ in getter.model.stages.named_children()] == ["0", "1", "2"]  # type: ignore[union-attr]
    assert len(FeatureGetterNet(hybrid(), out_indices=4)(images())) == 4


def test_feature_info_names_modules_that_exist():
    model = hybrid()
    assert all(model.get_submodule(info["module"]) is model.stages[i] for i, info in enumerate(model.feature_info))


def test_model_ema():
    model = hybrid(0.3, drop_path_mode="skip")
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    assert all(torch.allclose(v, before[k] + 0.5) for k, v in ema.module.state_dict().items())
    with torch.no_grad():
        assert ema.module.eval()(images()).shape == (2, 5)


def test_resolve_data_config():
    with torch.device("meta"):
        model = create_model("poolformer_m36", in_chans=1, image_size=[160, 192])
    config = resolve_data_config(model=model)
    assert config["input_size"] == (1, 160, 192) and config["crop_pct"] == 0.95 and config["interpolation"] == "bicubic"
    assert config["mean"] == pytest.approx((0.449,)) and config["std"] == pytest.approx((0.226,))
    plain = resolve_data_config(model=create_model("poolformer_n4"))
    assert plain["input_size"] == (3, 32, 32) and plain["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18"])
def test_pretrained_cfg_is_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    found = ours.pretrained_cfg
    expected: Any = theirs.pretrained_cfg
    for key in ("architecture", "tag", "num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean",
                "std", "first_conv", "classifier", "fixed_input_size"):  # fmt: skip
        assert found[key] == expected[key], key
    assert ours.num_features == theirs.num_features and ours.default_cfg is found
    for mine, info in zip(ours.feature_info, theirs.feature_info, strict=True):  # type: ignore[arg-type]
        assert {k: mine[k] for k in ("num_chs", "reduction", "module")} == info
    assert ours.get_submodule(found["first_conv"]) is ours.stem.conv
    classifier = ours.get_submodule(found["classifier"])
    assert isinstance(classifier, nn.Linear) and classifier.out_features == 1000


def test_freezing_modules_by_name():
    model = hybrid()
    timm.utils.freeze(model, ["stem", "stages.0"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("stem.", "stages.0."))}
    model(images()).sum().backward()
    assert model.stem.conv.weight.grad is None and model.head.fc.weight.grad is not None  # type: ignore[union-attr]
    timm.utils.unfreeze(model, ["stem", "stages.0"])
    assert all(p.requires_grad for p in model.parameters())


FAMILIES = {
    "poolformer_s12": [1, 1, 1, 1],
    "poolformerv2_s12": [1, 1, 1, 1],
    "identityformer_s12": [1, 1, 1, 1],
    "randformer_s12": [1, 1, 1, 1],
    "convformer_s18": [1, 1, 1, 1],
    "caformer_s18": [1, 1, 1, 1],
    "vit_tiny_patch16_224": [4],
    "deit3_small_patch16_224": [4],
    "vit_wee_patch16_reg1_gap_256": [4],
    "mixer_s32_224": [4],
    "resmlp_12_224": [4],
}


def short(name: str, **arguments) -> MetaFormer:
    """A model of one of the families, of few blocks, for images of 64 pixels."""
    torch.manual_seed(0)
    return create_model(name, depths=FAMILIES[name], image_size=64, **{"num_classes": 5, **arguments})


def test_every_family_is_there():
    assert {n.partition("_")[0] for n in list_models()} - {n.partition("_")[0] for n in FAMILIES} == {
        "deit", "eva", "flexivit"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_timms_training_tools_on_every_family(name):
    model = short(name, drop_path_rate=0.3, drop_path_mode="skip")
    timm.utils.freeze(model, ["stem"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if "random_matrix" not in n} == {
        n for n, _ in model.named_parameters() if n.startswith("stem.")
    }
    timm.utils.unfreeze(model, ["stem"])
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    stem, head = next(iter(model.stem.parameters())), list(model.get_classifier().parameters())[-1]
    assert scales[id(stem)] == min(scales.values()) < scales[id(head)] == max(scales.values()) == 1.0
    assert all(scales[id(p)] == scales[id(stem)] for p in model.embed.parameters())
    assert len(set(scales.values())) == sum(model.depths) + 2
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with mock.patch.object(DropPath, "residual", autospec=True, side_effect=DropPath.residual) as residual:
        torch.nn.functional.cross_entropy(model(images(4)), torch.arange(4)).backward()
    assert residual.call_count == 4 * sum(model.depths), "each block twice"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    average.update(model)
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, (before[key] + model.state_dict()[key]) / 2)
    assert not torch.equal(before["stem.conv.weight"], model.stem.conv.weight)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_timms_feature_tools_on_every_family(name):
    model = short(name).eval()
    features = model.forward_features(images())
    last, nchw = model.forward_intermediates(images())
    nhwc = model.forward_intermediates(images(), intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(last, features) and len(nchw) == len(model.feature_info) == 4
    patches = features if features.ndim == 4 else features[:, model.num_prefix_tokens :].transpose(1, 2)
    assert torch.equal(nchw[-1].flatten(2), patches.flatten(2))
    for a, b, info in zip(nchw, nhwc, model.feature_info, strict=True):
        side = 64 // info["reduction"]
        assert torch.equal(a.permute(0, 2, 3, 1), b) and b.shape == (2, side, side, info["num_chs"])
    for layout, expected in (("NCHW", nchw), ("NHWC", nhwc)):
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(1, 2), output_fmt=layout)
        assert all(torch.equal(a, b) for a, b in zip(getter(images()), expected[1:3], strict=True))
        assert getter.feature_info.channels() == [i["num_chs"] for i in model.feature_info[1:3]]
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.fc.")}
    for classes, pool, shape in (
        (7, None, (2, 7)),
        (7, "avg", (2, 7)),
        (0, "avg", (2, model.num_features)),
        (0, "", tuple(features.shape)),
        (3, "avg", (2, 3)),
    ):
        model.reset_classifier(classes, pool)
        assert model(images()).shape == shape and model.num_classes == classes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())
    data = resolve_data_config(model=model)
    assert data["input_size"] == (3, 64, 64) and data["mean"] == tuple(model.config.mean)


# ---- torch.fx, torchvision's extractor, TorchScript and tracing -------------------------------------------------------

PYRAMID: dict[str, Any] = {"depths": [1, 1, 1, 1], "image_size": 64}
ONE_STAGE: dict[str, Any] = {"depths": [2], "image_size": 56}
TRACED: dict[str, dict[str, Any]] = {
    "poolformer_s12": PYRAMID,
    "poolformerv2_s12": PYRAMID,
    "convformer_s18": PYRAMID,
    "caformer_s18": PYRAMID,
    "identityformer_s12": PYRAMID,
    "randformer_s12": PYRAMID,
    "vit_tiny_patch16_224": {**ONE_STAGE, "image_size": 64},
    "deit3_small_patch16_224": {**ONE_STAGE, "image_size": 64},
    "vit_small_patch14_reg4_dinov2": ONE_STAGE,
    "mixer_s16_224": {**ONE_STAGE, "image_size": 64},
    "resmlp_12_224": {**ONE_STAGE, "image_size": 64},
    "eva_large_patch14_196": {**ONE_STAGE, "dims": [128]},
    "flexivit_small": {**ONE_STAGE, "image_size": 64},
}


def of_family(name: str) -> tuple[MetaFormer, Tensor, Tensor]:
    """A small model of a family, two images for it and one."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, drop_path_rate=0.4, drop_path_mode="skip", **TRACED[name])
    return model, images(2, TRACED[name]["image_size"]), images(1, TRACED[name]["image_size"])


@pytest.mark.parametrize("name", TRACED)
@plain_paths()  # as graphs and scripts are
def test_a_graph_of_evaluation_is_the_model(name):
    model, two, one = of_family(name)
    graph = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(graph(two), model(two)) and torch.equal(graph(one), model(one))
    assert set(graph.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", TRACED)
def test_a_graph_of_training_draws_trains_and_evaluates(name):
    model, two, _ = of_family(name)
    graph = torch.fx.symbolic_trace(model)
    torch.manual_seed(3)
    out = graph(two)
    torch.manual_seed(3)
    torch.testing.assert_close(out, model(two), rtol=1e-4, atol=1e-5)
    set_drop_path(graph, 1.0, profile="constant")  # the modules in the graph are the model's
    assert not torch.allclose(graph(two), out) and {b.drop_path1.rate for b in blocks_of(model)} == {1.0}
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with plain_paths():
        assert torch.equal(graph.eval()(two), model.eval()(two))


@pytest.mark.parametrize("name", TRACED)
@plain_paths()  # as graphs and scripts are
def test_torchvisions_extractor_gives_channels_first(name):
    model, two, _ = of_family(name)
    nodes = [f"stages.{i}" for i in range(len(model.depths))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NOTE: The nodes obtained by tracing")  # training has nodes that drop
        extractor = create_feature_extractor(model, {node: node for node in [*nodes, "head"]})
    extractor.train()(two)["head"].sum().backward()
    found = extractor.eval()(two)
    features, levels = model.eval().forward_intermediates(two)
    assert torch.equal(found["head"], model(two)) and torch.equal(found[nodes[-1]], features)
    if not model.isotropic:
        assert all(torch.equal(found[node], level) for node, level in zip(nodes, levels, strict=True))


@pytest.mark.parametrize("name", TRACED)
@plain_paths()  # as graphs and scripts are
def test_torchscript_in_evaluation_is_the_model(name, tmp_path):
    model, two, one = of_family(name)
    scripted = torch.jit.script(model.eval())
    scripted.save(tmp_path / "model.pt")
    for twin in (scripted, torch.jit.load(tmp_path / "model.pt"), torch.jit.script(torch.fx.symbolic_trace(model))):
        assert torch.equal(twin(two), model(two)) and torch.equal(twin(one), model(one))
        assert set(twin.state_dict()) == set(model.state_dict())
    assert torch.equal(model.train().eval()(two), scripted(two)), "the model itself is left as it was"
    with pytest.raises(torch.jit.Error, match="stochastic depth in evaluation only"):
        scripted.train()(two)


@pytest.mark.parametrize("name", TRACED)
def test_graphs_and_scripts_are_near_the_model_on_fast_paths(name):
    model, two, one = of_family(name)
    for twin in (torch.fx.symbolic_trace(model.eval()), torch.jit.script(model)):
        torch.testing.assert_close(twin(two), model(two), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin(one), model(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_takes_other_batches_and_warns_of_nothing(name):
    model, two, one = of_family(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced: Any = torch.jit.trace(model.eval(), two)
    torch.testing.assert_close(traced(two), model(two))
    torch.testing.assert_close(traced(one), model(one))


@pytest.mark.parametrize("name", ["randformer_s12", "vit_tiny_patch16_224", "mixer_s16_224"])
def test_graphs_and_scripts_name_the_size_they_were_built_for(name):
    model, _, _ = of_family(name)
    for twin in (torch.fx.symbolic_trace(model.eval()), torch.jit.script(model)):
        with pytest.raises(
            (ValueError, torch.jit.Error), match="positions, got 6 x 6; build the model with image_size"
        ):
            twin(images(size=96))


@plain_paths()  # as graphs and scripts are
def test_a_model_within_a_model_is_scripted():
    model = nn.Sequential(hybrid(0.5), nn.Softmax(-1)).eval()
    assert torch.equal(torch.jit.script(model)(images()), model(images()))


def test_hooks_of_stages_see_channels_first():
    for model, pyramid in ((hybrid(), True), (isotropic(**MIXER), True), (isotropic(), False)):
        seen = []
        model.stages[-1].register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        features = model.eval().forward_features(images())
        assert torch.equal(seen[0], features) and (features.ndim == 4) == pyramid


def test_stages_of_one_width_with_tokens():
    model = hybrid(depths=[1, 1], dims=[32, 32], token_mixer="attention", class_token=True, head_dim=8,
                   layer_scale=None, res_scale=None, downsample=None, head={"pool": "token"}).eval()  # fmt: skip
    features, (first, second) = model.forward_intermediates(images())
    assert features.shape[2] == 32 and first.shape == second.shape == (2, 32, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), model(images()))
    assert torch.equal(torch.jit.script(model)(images()), model(images()))
