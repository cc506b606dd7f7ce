"""Smaller models: which blocks are meant, equal logits, settings that stay, and what cannot be written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from files.errors import ConfigError
from models.export import export_model
from models.factory import class_names_of, create_model, saved_config
from models.metaformer import MetaFormer
from models.pruning import blocks_of, chosen_blocks, empty_stage, named_blocks, smaller_model, without_blocks
from models.weights import save_weights
from stochastic_depth import set_drop_path
from stochastic_depth.proof import randomise_scales
from stochastic_depth.removal import removed


def model_of(**settings: Any) -> MetaFormer:
    torch.manual_seed(0)
    model = create_model(
        "caformer_n4", **{"depths": [3, 3], "dims": [16, 32], "image_size": 16, "num_classes": 5, **settings}
    ).eval()
    randomise_scales(model)
    return model


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"res_scale": 1.0, "layer_scale": [None, 0.1]},
    "mixed": {"res_scale": [1.0, None], "layer_scale": 0.1, "mlp_bias": True},
    "stem without norm": {"res_scale": 1.0, "stem": {"norm": "none"}},
}


@pytest.mark.parametrize("words", [["2"], ["1"], ["1", "2", "6"], ["stages.1.blocks.0", "stages.1.blocks.1"]])
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_model_with_its_branches_off(name: str, words: list[str]) -> None:
    model, images = model_of(**SETTINGS[name]), torch.randn(2, 3, 16, 16)
    chosen = chosen_blocks(words, blocks_of(model))
    with torch.no_grad():
        whole = model(images)
        with removed(chosen):
            expected = model(images)
        small = without_blocks(model, chosen)
        assert difference(small(images), expected) < 1e-6 < difference(whole, expected)
        if name == "plain":
            assert torch.equal(small(images), expected)
        assert torch.equal(model(images), whole), "the model is left as it was"
    assert sum(small.config.depths) == 6 - len(words) and small.depths == tuple(small.config.depths)


def test_an_isotropic_model_loses_levels() -> None:
    model = create_model("deit_tiny_patch16_224", depths=[4], image_size=32, num_classes=3).eval()
    small, images = smaller_model(model, ["stages.0.blocks.1"]), torch.randn(1, 3, 32, 32)
    assert [level["module"] for level in small.feature_info] == [f"stages.0.blocks.{i}" for i in range(3)]
    with torch.no_grad(), removed([blocks_of(model)[1]]):
        assert torch.equal(small(images), model(images))
    assert len(small.forward_intermediates(images, intermediates_only=True)) == 3


def test_settings_of_the_kept_blocks_stay() -> None:
    model = create_model("convformer_n4", depths=[2, 3], class_names=["a", "b"])
    set_drop_path(model, None, profile=[0.1, 0.2, 0.3, 0.4, 0.5], mode="skip")
    small = smaller_model(model, ["stages.0.blocks.0", "stages.1.blocks.1"])
    assert [block.drop_path1.drop_prob for stage in small.stages for block in stage.blocks] == [0.2, 0.3, 0.5]  # type: ignore
    assert small.stages[0].blocks[0].drop_path2.mode == "skip" and class_names_of(small) == ["a", "b"]  # type: ignore
    assert small.config.published is None and small.config.pretrained == [] and small.training


def test_it_loads_again_by_its_yaml_and_by_depths(tmp_path: Path) -> None:
    model = model_of(class_names=list("abcde"))
    small = smaller_model(model, ["stages.0.blocks.1", "stages.1.blocks.2"])
    export_model(small, "zoo", tmp_path / "small")
    images = torch.randn(2, 3, 16, 16)
    again = create_model(tmp_path / "small" / "model.yaml", checkpoint=tmp_path / "small").eval()
    assert torch.equal(again(images), small(images)) and class_names_of(again) == list("abcde")
    named = {"depths": [2, 2], "dims": [16, 32], "image_size": 16, "num_classes": 5}
    assert torch.equal(
        create_model("caformer_n4", checkpoint=tmp_path / "small", **named).eval()(images), small(images)
    )
    with pytest.raises(ConfigError, match="depths"):
        create_model("caformer_n4", checkpoint=tmp_path / "small", **{**named, "depths": [3, 3]})


def test_timm_has_no_such_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = create_model("poolformerv2_s12")
    small = smaller_model(model, ["stages.2.blocks.3"]).to_empty(device="cpu")
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with pytest.raises(
        ConfigError, match=r"another network than this one: depths is \[2, 2, 5, 2\], timm's \[2, 2, 6, 2\]"
    ):
        export_model(small, "timm", tmp_path / "out")


def test_an_empty_stage_is_refused() -> None:
    model = model_of()
    names = [f"stages.1.blocks.{i}" for i in range(3)]
    assert empty_stage(model, names[:2]) == "" and empty_stage(model, names) == "stage 2 of 2 would have no block"
    with pytest.raises(ConfigError, match="stage 2 of 2 would have no block; a model's config has at least one"):
        without_blocks(model, chosen_blocks(names, blocks_of(model)))


def test_a_factor_that_has_nowhere_to_go_is_refused() -> None:
    model = create_model("deit_tiny_patch16_224", depths=[2], res_scale=1.0, image_size=32)
    with pytest.raises(ConfigError, match="multiplies its shortcut"):
        smaller_model(model, ["stages.0.blocks.0"])


@pytest.mark.parametrize("fmt", ["zoo", "timm"])
def test_a_foreign_model_keeps_what_is_computed_only(fmt: Any, tmp_path: Path) -> None:
    model = create_model("timm/test_vit", num_classes=3).eval()
    small = without_blocks(model, chosen_blocks(["1"], blocks_of(model)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match=f"format {fmt} has it built with all its blocks.*use --format onnx or torch"):
        export_model(small, fmt, tmp_path / "out")
    assert export_model(model, "zoo", tmp_path / "whole").error == 0, "the model itself is whole"


@pytest.mark.slow
def test_a_foreign_model_is_exported_as_a_program(tmp_path: Path) -> None:
    model = create_model("timm/test_resnet", num_classes=3, image_size=32).eval()
    randomise_scales(model)
    images = torch.randn(3, 3, 32, 32)
    chosen = chosen_blocks(["layer1.0"], blocks_of(model))
    with torch.no_grad(), removed(chosen):
        expected = model(images)
    exported = export_model(without_blocks(model, chosen), "torch", tmp_path / "small.pt2")
    assert difference(exported.run(images), expected) < 1e-5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["7"], "there is no block 7: the model's blocks are 1 to 6"),
        (["0"], "there is no block 0"),
        (["stages.1.block.0"], "no block 'stages.1.block.0'; did you mean 'stages.1.blocks.0'?"),
        (["-1"], "no block '-1'; blocks are 1 to 6, or stages.0.blocks.0 and so on"),
        (["2", "stages.0.blocks.1"], r"block 2 (stages.0.blocks.1) is named twice"),
        (["1", "2", "3", "4", "5", "6"], "these are all blocks of the model; leave one at least"),
    ],
)
def test_blocks_that_cannot_be_meant(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_blocks(words, blocks_of(model_of()))
    assert str(caught.value).startswith("--drop-blocks: ") and told in str(caught.value)


def test_blocks_that_cannot_be_removed_are_said() -> None:
    blocks = blocks_of(create_model("timm/test_resnet", image_size=32).eval())
    with pytest.raises(ConfigError, match=r"block 2 \(layer2\.0\) cannot be removed: its output has another shape"):
        chosen_blocks(["2"], blocks)
    assert [block.name for block in chosen_blocks(["1"], blocks)] == ["layer1.0"]
    with pytest.raises(ConfigError, match="VGG has no residual block"):
        with torch.device("meta"):
            vgg = create_model("timm/vgg11", num_classes=2)
        blocks_of(vgg)


def test_what_is_named_in_a_file(tmp_path: Path) -> None:
    def write(kind: str, *sets: list[str]) -> str:
        (path := tmp_path / f"{kind}.json").write_text(
            json.dumps({"kind": kind, "rows": [{"removed": s} for s in sets]})
        )
        return str(path)

    greedy = write("greedy", [], ["b"], ["b", "a"])
    assert named_blocks(greedy) == ["b", "a"] and named_blocks(f"{greedy}:1") == ["b"]
    assert named_blocks(write("list", [], ["c", "d"])) == ["c", "d"] and named_blocks("4, x.1") == ["4", "x.1"]
    (tmp_path / "other.json").write_text("[]")
    for text, told in (
        (f"{greedy}:3", "holds an order of 2 blocks, got :3"),
        (f"{greedy}:x", "how many of its blocks to remove, got 'x'"),
        (write("one", [], ["a"]), "does not say which"),
        (str(tmp_path / "list.json") + ":1", "holds one set, not an order"),
        (str(tmp_path / "other.json"), "is no blocks.json"),
        (str(tmp_path / "none.json"), "there is no such file"),
        ("4,,5", "names no block"),
    ):
        with pytest.raises(ConfigError) as caught:
            named_blocks(text)
        assert told in str(caught.value), text


def test_a_folder_of_weights_of_a_smaller_model_says_so(tmp_path: Path) -> None:
    small = smaller_model(model_of(), ["stages.0.blocks.0"])
    save_weights(tmp_path / "small", small.state_dict(), saved_config(small))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model"]["depths"] == [2, 3]
