"""models/export.py: every form computes what the model does, refuses what it cannot, and leaves nothing half-written."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from files.errors import ConfigError
from models import export
from models.export import (
    FORMATS,
    TOLERANCE,
    ExportError,
    Format,
    compare_speed,
    example_images,
    export_model,
    relative_error,
)
from models.factory import class_names_of, create_model
from models.fold import fold_scales, load_folded
from models.layouts import timm_head
from models.metaformer import MetaFormer
from models.registry import model_config
from models.weights import load_weights, save_weights
from tests.models.parts import KINDS, SHORT, built, logits

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the export extra")
OUTPUT: dict[Format, str] = {"zoo": "out", "timm": "out", "onnx": "out.onnx", "torch": "out.pt2", "folded": "out"}


def exported(fmt: Format, folder: Path, model: MetaFormer, **options) -> export.Exported:
    return export_model(model, fmt, folder / OUTPUT[fmt], **options)


def test_folded_folder(tmp_path: Path) -> None:
    model = built("poolformer_s12", **SHORT, num_classes=7)
    result = exported("folded", tmp_path, model)
    images = example_images(model)(4)
    again = load_folded(tmp_path / "out")
    assert not again.training and torch.equal(logits(again, images), logits(fold_scales(model), images))
    assert result.error < 1e-5
    with pytest.raises(ConfigError, match="weights do not fit"):
        create_model("poolformer_s12", checkpoint=tmp_path / "out", **SHORT, num_classes=7)


def test_zoo_folder(tmp_path: Path) -> None:
    model = built("poolformer_s12", **SHORT, num_classes=7, class_names=NAMES, act="star_relu")
    assert exported("zoo", tmp_path, model).error == 0
    folder, images = tmp_path / "out", example_images(model)(2)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "model.yaml"}
    again = create_model(folder / "model.yaml", checkpoint=folder)
    assert torch.equal(logits(again.eval(), images), logits(model, images)) and class_names_of(again) == NAMES
    assert again.config == model.config
    exported("zoo", tmp_path, model, force=True)
    with pytest.raises(ConfigError, match=r"holds other files \(model\.yaml\)"):
        exported("folded", tmp_path, model, force=True)


def test_zoo_folder_of_another_librarys_model_is_read_as_it_says(tmp_path: Path) -> None:
    model = create_model("timm/test_vit", num_classes=3, in_chans=1, image_size=32).eval()
    about = exported("zoo", tmp_path, model).about
    call = about.removeprefix("for ").partition("), ")[0].replace('"FOLDER"', "folder") + ")"
    again = eval(call, {"create_model": create_model, "folder": tmp_path / "out"})
    images = example_images(model)(2)
    assert torch.equal(logits(again.eval(), images), logits(model, images))


def test_zoo_folder_of_a_config_with_keys_that_lost_their_effect(tmp_path: Path) -> None:
    model = built("caformer_n4", token_mixer="pooling", pool_size=5)
    assert model.config.head_dim == 16, "of attention, which it has no more"
    assert exported("zoo", tmp_path, model).error == 0


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_classes_are_counted_in_any_layout_that_loads(prefix: str) -> None:
    model = built("poolformer_n4", num_classes=7)
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    assert export.count_classes(state, "head.fc") == 7
    assert export.count_classes({k: v for k, v in state.items() if "head.fc" not in k}, "head.fc") == 0


def test_a_folder_that_is_not_folded_is_refused(tmp_path: Path) -> None:
    model = built("caformer_n4")
    exported("folded", tmp_path, model)
    state, config = load_weights(tmp_path / "out")
    assert config is not None
    save_weights(tmp_path / "out", state, config | {"model": config["model"] | {"num_classes": 3}})
    with pytest.raises(ConfigError, match=r"do not fit the config beside them: head\.fc\.weight"):
        load_folded(tmp_path / "out")
    save_weights(tmp_path / "out", state, config | {"format": "other"})
    with pytest.raises(ConfigError, match="not a folded model"):
        load_folded(tmp_path / "out")


@pytest.mark.parametrize("name", ["caformer_n4", pytest.param("poolformer_n4", marks=pytest.mark.slow)])
def test_torch_program(name: str, tmp_path: Path) -> None:
    model = built(name, num_classes=7)
    assert exported("torch", tmp_path, model).error < TOLERANCE["torch"]
    extra = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "out.pt2", extra_files=extra).module()
    for batch in (1, 2, 5):
        images = example_images(model)(batch)
        assert relative_error(logits(model, images), logits(program, images)) < TOLERANCE["torch"]
    assert json.loads(extra["preprocessing.json"])["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_a_torch_program_runs_without_our_code(tmp_path: Path) -> None:
    model = built("caformer_n4", num_classes=7)
    exported("torch", tmp_path, model)
    images = example_images(model)(2)
    torch.save((images, logits(model, images)), tmp_path / "pair.pt")
    script = """
import sys, torch
images, expected = torch.load("pair.pt")
torch.testing.assert_close(torch.export.load("out.pt2").module()(images), expected)
assert not {"models", "layers"} & {name.partition(".")[0] for name in sys.modules}
"""
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


@needs_onnx
@pytest.mark.parametrize("name", ["caformer_n4", pytest.param("poolformer_n4", marks=pytest.mark.slow)])
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    names = ["cat", "dog", "fox \N{FOX FACE}"]
    model = built(name, num_classes=7, class_names=names)
    result = exported("onnx", tmp_path, model)
    assert result.error < TOLERANCE["onnx"] and "opset 20" in result.about
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert given.name == "images" and given.shape[1:] == [3, 32, 32] and isinstance(given.shape[0], str)
    assert returned.name == "logits" and returned.shape[1:] == [7]
    for batch in (1, 3, 5):
        images = example_images(model)(batch)
        (actual,) = session.run(None, {"images": images.numpy()})
        assert relative_error(logits(model, images), torch.from_numpy(actual)) < TOLERANCE["onnx"]
    properties = {p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert json.loads(properties["preprocessing"])["mean"] == list(model.pretrained_cfg["mean"])
    assert json.loads(properties["class_names"]) == names
    assert {p.name for p in tmp_path.iterdir()} == {"out.onnx"}, "weights are inside"


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["torch", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_exports(name: str, fmt: Format, tmp_path: Path) -> None:
    assert exported(fmt, tmp_path, built(name, **KINDS[name])).error < TOLERANCE[fmt]


@pytest.mark.parametrize(
    "name",
    [
        "poolformerv2_s12",
        pytest.param("poolformer_s12", marks=pytest.mark.slow),
        pytest.param("caformer_s18", marks=pytest.mark.slow),
        pytest.param("convformer_s18", marks=pytest.mark.slow),
        pytest.param("deit_tiny_patch16_224", marks=pytest.mark.slow),
        pytest.param("mixer_s16_224", marks=pytest.mark.slow),
        pytest.param("resmlp_12_224", marks=pytest.mark.slow),
    ],
)
def test_timm_folder(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    size: dict[str, Any] = {} if model_config(name).stem.stride == 16 else {"image_size": [64, 96]}
    model = built(name, num_classes=7, in_chans=1, head=timm_head(config), crop_pct=0.9, mean=[0.4], std=[0.2], **size)
    assert exported("timm", tmp_path, model).error < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = example_images(model)(2)
    assert type(theirs).__module__.startswith("timm.")
    assert relative_error(logits(model, images), logits(theirs, images)) < 1e-5
    data = timm.data.resolve_model_data_config(theirs)  # type: ignore[attr-defined]
    assert list(data["mean"]) == [0.4] and list(data["std"]) == [0.2] and data["crop_pct"] == 0.9
    assert tuple(data["input_size"]) == (1, *model.config.height_width)
    ours = create_model(name, checkpoint=tmp_path / "out", num_classes=7, in_chans=1, head=timm_head(config), **size)
    assert relative_error(logits(model, images), logits(ours.eval(), images)) < 1e-6


NAMES = ["cat", "dog", "fox \N{FOX FACE}"]


def test_class_names_are_in_the_other_formats(tmp_path: Path) -> None:
    model = built("caformer_n4", class_names=NAMES)
    exported("folded", tmp_path / "named", model)
    assert class_names_of(load_folded(tmp_path / "named" / "out")) == NAMES
    extra = {"class_names.json": ""}
    exported("torch", tmp_path / "named", model)
    torch.export.load(tmp_path / "named" / "out.pt2", extra_files=extra)
    assert json.loads(extra["class_names.json"]) == NAMES
    exported("folded", tmp_path, built("caformer_n4"))
    assert "class_names" not in (load_weights(tmp_path / "out")[1] or {"class_names": ""})
    assert class_names_of(load_folded(tmp_path / "out")) is None


def test_class_names_of_a_timm_folder(tmp_path: Path) -> None:
    model = built("poolformerv2_s12", class_names=NAMES, image_size=64)
    exported("timm", tmp_path, model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == NAMES
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert list(theirs.pretrained_cfg["label_names"]) == NAMES  # pyright: ignore[reportIndexIssue, reportArgumentType]
    again = create_model("poolformerv2_s12", checkpoint=tmp_path / "out", num_classes=3, image_size=64)
    assert class_names_of(again) == NAMES


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("identityformer_s12", SHORT, r"timm \S+ has no model 'identityformer_s12'; use --format torch or onnx"),
        ("poolformer_s12", {"image_size": 64}, r"head\.order=pool_norm head\.norm=layer_norm"),
        ("poolformerv2_s12", SHORT, r"another network than this one: depths is \[1, 1, 1, 1\], timm's \[2, 2, 6, 2\]"),
        ("poolformerv2_s12", {"image_size": 64, "act": "gelu"}, "act is gelu, timm's star_relu"),
        ("poolformerv2_s12", {"image_size": 64, "pool_size": 5}, "pool_size is 5, timm's 3"),
    ],
)
def test_timm_refuses_with_the_reason(name: str, overrides: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        exported("timm", tmp_path, built(name, **overrides))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt", ["torch", "folded"])
def test_what_is_there_is_replaced_only_by_force(fmt: Format, tmp_path: Path) -> None:
    first, second = built("caformer_n4", num_classes=3), built("caformer_n4", num_classes=4)
    if fmt == "folded":
        exported(fmt, tmp_path, first)
    else:
        (tmp_path / OUTPUT[fmt]).write_bytes(b"old")
    with pytest.raises(ConfigError, match="exists already"):
        exported(fmt, tmp_path, second)
    result = exported(fmt, tmp_path, second, force=True)
    assert result.run(example_images(second)(1)).shape == (1, 4)
    assert {p.name for p in tmp_path.iterdir()} == {OUTPUT[fmt]}
    if fmt == "folded":
        assert load_weights(tmp_path / "out")[0]["head.fc.weight"].shape[0] == 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_force_replaces_no_other_kind_of_thing(fmt: Format, tmp_path: Path) -> None:
    output = tmp_path / OUTPUT[fmt]
    if output.suffix:
        output.mkdir()
    else:
        output.write_text("mine")
    with pytest.raises(ConfigError, match="--force does not replace it"):
        exported(fmt, tmp_path, built("caformer_n4"), force=True)


def test_force_deletes_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes\.txt\)"):
        exported("folded", tmp_path, built("caformer_n4"), force=True)


@pytest.mark.parametrize(
    ("fmt", "name"), [("torch", "out"), ("onnx", "out.pt2"), ("timm", "out.onnx"), ("folded", "a.pt2")]
)
def test_an_ending_of_another_format_is_refused(fmt: Format, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a file ending in|is a folder, not"):
        export_model(built("caformer_n4"), fmt, tmp_path / name)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ConfigError, match=r"needs onnxruntime: pip install -e '\.\[export\]'"):
        exported("onnx", tmp_path, built("caformer_n4"))


@pytest.mark.parametrize("wrong", [lambda x: x + 1e-3, lambda x: x * torch.nan, lambda x: x[:, 1:]])
def test_an_export_that_differs_is_not_kept(wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("caformer_n4")
    before = exported("folded", tmp_path, model).path / "config.json"
    content = before.read_bytes()

    def write(model: MetaFormer, draft: Path):
        draft.mkdir()
        return "wrong", lambda images: wrong(model(images))

    monkeypatch.setitem(export._WRITERS, "folded", write)
    with pytest.raises(ExportError, match="differ from the model's"):
        exported("folded", tmp_path, model, force=True)
    assert before.read_bytes() == content and {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("fmt", ["torch", "folded", "timm"])
def test_logits_of_the_model_itself_must_be_finite(fmt: Format, tmp_path: Path) -> None:
    model = built("caformer_n4")
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.fc1.weight[0, 0] = torch.nan  # type: ignore
    message = (
        r"the model's own logits are not finite; its weights are not, first stages\.0\.blocks\.0\.mlp\.fc1\.weight"
    )
    with pytest.raises(ExportError, match=message):
        exported(fmt, tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt", ["folded", "timm", "zoo"])
def test_an_unpooled_model_is_refused_where_nothing_could_say_so(fmt: Format, tmp_path: Path) -> None:
    model = built("caformer_n4")
    model.reset_classifier(0, "")
    with pytest.raises(ConfigError, match=f"an unpooled model cannot be had as {fmt}: what is written beside"):
        exported(fmt, tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_average_pooling_of_a_class_token_model_is_exported(tmp_path: Path) -> None:
    model = built("deit_tiny_patch16_224", depths=[1])
    model.reset_classifier(3, "avg")
    assert exported("folded", tmp_path, model).error < 1e-5
    assert load_folded(tmp_path / "out").head.global_pool == "avg"


@pytest.mark.parametrize(
    ("classes", "pool", "shapes"),
    [
        (7, None, "images (batch, 3, 32, 32) -> logits (batch, 7)"),
        (0, "avg", "images (batch, 3, 32, 32) -> features (batch, 64)"),
        (0, "", "images (batch, 3, 32, 32) -> features (batch, 64, 8, 8)"),
    ],
)
def test_what_comes_out_is_said(classes: int, pool: str | None, shapes: str, tmp_path: Path) -> None:
    model = built("caformer_n4", head={"kind": "mlp"})
    model.reset_classifier(classes, pool)
    result = exported("torch", tmp_path, model)
    assert shapes in result.about and result.error < TOLERANCE["torch"]


def test_a_failure_of_the_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: MetaFormer, draft: Path):
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export._WRITERS, "torch", write)
    with pytest.raises(ExportError, match="not written: No space left on device"):
        exported("torch", tmp_path, built("caformer_n4"))
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = built("caformer_n4").train()
    exported("folded", tmp_path, model)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_relative_error_knows_nan_and_shapes() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a + torch.tensor([0.0, 1.0])) == 0.25
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert not relative_error(a, a * torch.nan) <= 1.0 and not relative_error(a, a[:1]) <= 1.0


def test_speed_is_measured_of_both() -> None:
    calls: list[int] = []
    before, after = compare_speed(built("caformer_n4"), lambda x: calls.append(len(x)) or x, batch=2, rounds=3)
    assert before > 0 and after > 0 and calls == [2] * 5


def test_a_disk_without_room_is_told_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: MetaFormer, draft: Path):
        raise AssertionError

    monkeypatch.setitem(export._WRITERS, "torch", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"not written: no room: needs \d+\.\d MB, 0\.0 MB are free"):
        export_model(built("caformer_n4"), "torch", tmp_path / "new" / "out.pt2")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_where_torch_s_writer_would_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out.pt2").write_text("dear")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"out\.pt2: not written: No space left on device"):
        exported("torch", tmp_path, built("poolformer_s12", **SHORT, num_classes=7), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt2"] and (tmp_path / "out.pt2").read_text() == "dear"
