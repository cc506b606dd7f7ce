"""models/timm_registry.py: timm's own functions build, list, load, adapt and save our models under a prefix."""

import importlib.util
import sys
import warnings
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import timm.models
import timm.optim
import timm.task
import timm.utils
import timm.utils.onnx
import torch
from timm.utils.onnx import onnx_export, onnx_forward
from torch import Tensor

import models.timm_registry
from files.errors import ConfigError
from layers.drop_path import DropPath
from layers.fast import plain_paths
from models.factory import create_model
from models.layouts import timm_head
from models.metaformer import MetaFormer
from models.registry import list_models, model_config, register_model, unregister_model
from models.timm_registry import register_with_timm

SMALL = "dpz_caformer_n4"
ONNX = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


@pytest.fixture(scope="module", autouse=True)
def registered() -> list[str]:
    return register_with_timm()


def build(name: str = SMALL, **arguments) -> MetaFormer:
    model = timm.create_model(name, **arguments)
    assert isinstance(model, MetaFormer)
    return model


def test_every_model_is_known(registered: list[str]) -> None:
    assert registered == sorted(f"dpz_{name}" for name in list_models())
    assert set(timm.list_models("dpz_*")) == set(registered)
    assert "dpz_caformer_s18" in timm.list_models("dpz_caf*") and "caformer_s18" not in timm.list_models("dpz_*")
    assert timm.list_models(module="timm_registry") == timm.list_models("dpz_*")


def test_a_second_call_changes_and_says_nothing(registered: list[str]) -> None:
    before = timm.models.model_entrypoint(SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert register_with_timm() == registered
    assert timm.models.model_entrypoint(SMALL) is before


def test_the_module_holds_what_timm_lists_in_it() -> None:
    module = sys.modules[models.timm_registry.__name__]
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_model_of_ones_own_follows_and_a_changed_one_replaces_it() -> None:
    own = model_config("poolformer_n4")
    try:
        register_model(own.model_copy(update={"num_classes": 3}), name="mine_n4")
        assert "dpz_mine_n4" in register_with_timm() and build("dpz_mine_n4").num_classes == 3
        unregister_model("mine_n4")
        register_model(own.model_copy(update={"num_classes": 4}), name="mine_n4")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            register_with_timm()
        assert build("dpz_mine_n4").num_classes == 4
    finally:
        unregister_model("mine_n4")
        timm.models._registry._model_entrypoints.pop("dpz_mine_n4", None)
        timm.models._registry._clear_model_entries("dpz_mine_n4")
        models.timm_registry._configs.pop("dpz_mine_n4", None)


def test_a_clash_is_an_error_and_registers_nothing() -> None:
    before = timm.list_models()
    with pytest.raises(ConfigError, match="timm has a model 'caformer_b36' already; choose another prefix"):
        register_with_timm("")
    assert timm.list_models() == before


@pytest.mark.parametrize("prefix", ["dpz.", "a/", "hub:", "dpz "])
def test_a_prefix_that_timm_would_misread_is_an_error(prefix: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name in timm"):
        register_with_timm(prefix)


def test_arguments_reach_the_model() -> None:
    model = build(
        "dpz_caformer_s18", num_classes=5, drop_path_rate=0.2, in_chans=1, drop_path_mode="skip", depths=[1, 1, 2, 1]
    )
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    *_, last = (m for m in model.modules() if isinstance(m, DropPath))
    assert last.drop_prob == 0.2 and last.mode == "skip" and model.depths == (1, 1, 2, 1)


def test_img_size_is_our_image_size() -> None:
    assert build("dpz_randformer_s12", img_size=64, depths=[1, 1, 1, 1])(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert build(img_size=(64, 32)).config.image_size == [64, 32]
    with pytest.raises(ConfigError, match="in timm, image_size is called img_size"):
        build(image_size=64)


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(ConfigError, match="drop_path_rat: unknown key"):
        build(drop_path_rat=0.1)


def test_unpooled() -> None:
    assert build(num_classes=0, global_pool="")(torch.randn(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    with pytest.raises(ValueError, match="global_pool"):
        build(global_pool="max")


def test_pooling_is_reset_wherever_it_is_given() -> None:
    name = "dpz_deit_tiny_patch16_224"
    assert build(name, depths=[1]).head.global_pool == "token", "the model's own"
    average = build(name, depths=[1], num_classes=3, global_pool="avg").eval()
    assert average.head.global_pool == average.config.head.pool == "avg"
    images = torch.randn(1, 3, 224, 224)
    features = average.head.norm(average.forward_features(images))[:, 1:].mean(dim=1)
    torch.testing.assert_close(average(images), average.get_classifier()(features))
    assert build(global_pool="avg").head.global_pool == "avg"


def test_features_are_nchw() -> None:
    torch.manual_seed(0)
    net: Any = timm.create_model(
        "dpz_poolformer_s12", features_only=True, out_indices=(1, 3), depths=[1, 1, 1, 1], in_chans=1
    ).eval()
    torch.manual_seed(0)
    whole = create_model("poolformer_s12", depths=[1, 1, 1, 1], in_chans=1).eval()
    images = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        got = net(images)
        expected = whole.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert [tuple(x.shape) for x in got] == [(2, 128, 8, 12), (2, 512, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert net.feature_info.channels() == [128, 512] and net.feature_info.reduction() == [8, 32]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224", "caformer_s18"])
def test_the_default_features_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours: Any = timm.create_model(f"dpz_{name}", features_only=True)
        theirs: Any = timm.create_model(name, features_only=True)
    assert ours.feature_info.out_indices == theirs.feature_info.out_indices
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()


def test_all_stages_are_the_default_features() -> None:
    net = timm.create_model(SMALL, features_only=True)
    assert [x.shape[1] for x in net(torch.randn(1, 3, 32, 32))] == [32, 64]


def test_a_checkpoint_path_of_ours_loads(tmp_path) -> None:
    ours = create_model("caformer_n4", num_classes=7, in_chans=1).eval()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(ours.state_dict(), path)
    loaded = build(num_classes=7, in_chans=1, checkpoint_path=str(path)).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), ours(images))


@pytest.mark.parametrize("name", ["caformer_s18", "deit_tiny_patch16_224"])
def test_pretrained_weights_in_timms_layout_load_with_other_classes_and_channels(name: str, tmp_path) -> None:
    config = model_config(name)
    theirs = timm.create_model(name).eval()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), path)
    overlay = {"pretrained_cfg_overlay": {"file": str(path)}, "pretrained": True}
    same = build(f"dpz_{name}", head=timm_head(config), **overlay).eval()
    images = torch.randn(1, 3, *config.height_width)
    with torch.no_grad():
        torch.testing.assert_close(same(images), theirs(images), rtol=1e-4, atol=1e-5)
    adapted = build(f"dpz_{name}", num_classes=3, in_chans=1, **overlay)
    conv = next(v for v in theirs.state_dict().values() if v.ndim == 4)
    torch.testing.assert_close(adapted.stem.conv.weight, conv.sum(1, keepdim=True))
    assert torch.equal(adapted.stages[0].blocks[0].norm1.weight, same.stages[0].blocks[0].norm1.weight)  # type: ignore
    assert adapted(images[:, :1]).shape == (1, 3)


def test_tags_are_timms() -> None:
    assert "dpz_caformer_s18.sail_in22k_ft_in1k_384" in timm.list_models("dpz_caformer_s18*", pretrained=True)
    cfg = timm.models.get_pretrained_cfg("dpz_caformer_s18.sail_in22k_ft_in1k_384")
    assert cfg is not None and cfg.input_size == (3, 384, 384)
    assert cfg.hf_hub_id == "timm/caformer_s18.sail_in22k_ft_in1k_384" and cfg.classifier == "head.fc.fc2"
    assert not timm.models.is_model_pretrained("dpz_identityformer_s12")


def test_a_training_script_of_timm(tmp_path) -> None:
    """The calls of timm's train.py, in its order."""
    model = build(num_classes=5, in_chans=1, drop_path_rate=0.2)
    data = timm.data.resolve_data_config({"in_chans": 1}, model=model)
    assert getattr(model, "in_chans") == 1  # noqa: B009  (where newer timm looks for the channels)
    assert data["input_size"][1:] == (32, 32) and data["crop_pct"] == model.config.crop_pct
    model.set_grad_checkpointing()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    images, targets = torch.randn(8, 1, 32, 32), torch.arange(8) % 5
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    again = build(num_classes=5, in_chans=1, checkpoint_path=str(tmp_path / "last.pth.tar"))
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("safe", [False, True, "both"])  # False is timm's default
def test_timm_saves_and_loads_a_folder_of_ours(tmp_path, safe) -> None:
    model = build("dpz_convformer_n4", num_classes=5, in_chans=1, drop_path_rate=0.2, device="cpu").eval()
    timm.models.save_for_hf(model, str(tmp_path / "hub"), safe_serialization=safe)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    ours = create_model("convformer_n4", checkpoint=tmp_path / "hub", num_classes=5, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(images), model(images)) and torch.equal(ours(images), model(images))


# ---- device and dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_model_is_built_in_a_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build(
        num_classes=5, drop_path_rate=0.3, drop_path_mode="skip", global_pool="avg", device="cpu", dtype=dtype
    )
    torch.manual_seed(0)
    plain = build(num_classes=5, global_pool="avg")
    assert all(torch.equal(v, plain.state_dict()[k].to(dtype)) for k, v in model.state_dict().items())
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    assert model(images).dtype == dtype
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("name", ["poolformer_s12", "deit_tiny_patch16_224", "randformer_s12", "resmlp_12_224"])
@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_model_is_built_on_a_device(name: str, device) -> None:
    model = build(f"dpz_{name}", device=device, dtype=torch.bfloat16, num_classes=3, global_pool="avg")
    assert {(t.device.type, t.dtype) for t in model.state_dict().values()} == {("meta", torch.bfloat16)}
    net = timm.create_model(f"dpz_{name}", device=device, features_only=True)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    with torch.device("meta"):
        assert {p.device.type for p in build(device="cpu").parameters()} == {"cpu"}, "what is named goes first"


def test_pretrained_weights_are_loaded_in_the_dtype(tmp_path) -> None:
    ours = create_model("caformer_n4", num_classes=7)
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 7}
    half = build(num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(v, ours.state_dict()[k].bfloat16()) for k, v in half.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r"dtype must be a floating-point torch\.dtype such as torch\.bfloat16, got 'bfloat16'$",
        ),
        ({"dtype": torch.int8}, r"dtype must be a floating-point torch\.dtype .*, got torch\.int8$"),
        ({"dtype": torch.complex64}, r"dtype must be a floating-point torch\.dtype .*, got torch\.complex64$"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here: "),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here: "),
        ({"device": ["cpu"]}, "device .* cannot be used here: "),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model caformer_n4: {message}"):
        build(**arguments)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_teacher_of_ours_in_timms_distillation(tmp_path, dtype) -> None:
    """What timm's train.py does with --kd-model-name and --kd-pretrained-path: it names device and dtype."""
    teacher = create_model("caformer_n4", num_classes=5).eval()
    safetensors.torch.save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    student = build("dpz_poolformer_n4", num_classes=5, dtype=dtype)
    task = timm.task.LogitDistillationTask(
        student,
        SMALL,
        teacher_pretrained_path=str(tmp_path / "model.safetensors"),
        device=torch.device("cpu"),
        dtype=dtype,
    )
    assert same(task.teacher.model.state_dict(), {k: v.to(dtype) for k, v in teacher.state_dict().items()})
    images, targets = torch.randn(4, 3, 32, 32, dtype=dtype), torch.arange(4)
    result = task(images, targets)
    result["loss"].backward()
    assert result["loss"].isfinite() and all(p.grad is not None for p in student.parameters())
    assert not any(p.requires_grad and p.grad is not None for p in task.teacher.parameters())


# ---- ONNX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ONNX, reason="needs the export extra")
@pytest.mark.filterwarnings("ignore")  # of torch's older exporter, which timm takes by default
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("poolformer_n4", {}, 32),
        ("caformer_n4", {}, 32),
        ("convformer_n4", {}, 32),
        ("poolformerv2_s12", {"depths": [1, 1, 1, 1]}, 64),
        ("randformer_s12", {"depths": [1, 1, 1, 1], "img_size": 64}, 64),
        ("deit_tiny_patch16_224", {"depths": [1], "img_size": 64}, 64),
        ("mixer_s32_224", {"depths": [1], "img_size": 64}, 64),
        ("resmlp_12_224", {"depths": [1], "img_size": 64}, 64),
    ],
)
def test_timms_exporter_writes_our_models(name: str, arguments: dict, size: int, dynamo: bool, tmp_path) -> None:
    """The calls of timm's onnx_export.py; the file is then run at other batches and, where the model can, other sizes."""
    import onnxruntime

    model = build(f"dpz_{name}", exportable=True, num_classes=5, drop_path_rate=0.1, **arguments)
    flexible = not model.config.fixed_size
    model = timm.utils.reparameterize_model(model)
    file = str(tmp_path / "model.onnx")
    timm.utils.onnx.onnx_export(
        model,
        file,
        batch_size=2,
        input_size=(3, size, size),
        dynamic_size=flexible,
        use_dynamo=dynamo,
        check_forward=True,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, height, width in [(1, size, size), (3, size, size), *([(1, size + 32, size * 2)] if flexible else [])]:
        images = torch.randn(batch, 3, height, width)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- features of every kind -------------------------------------------------------------------------------------------

SHORT: dict[str, dict[str, Any]] = {
    "dpz_poolformer_s12": {"depths": [1, 1, 1, 1], "out_indices": (1, 3)},
    "dpz_caformer_n4": {"drop_path_rate": 0.5, "drop_path_mode": "skip"},
    "dpz_vit_tiny_patch16_224": {"depths": [4], "img_size": 64, "out_indices": (0, -2)},
    "dpz_vit_small_patch14_reg4_dinov2": {"depths": [3], "img_size": 56},
    "dpz_mixer_s32_224": {"depths": [3], "img_size": 64},
}


def features(name: str, feature_cls: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, feature_cls=feature_cls, **SHORT[name])


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("feature_cls", ["fx", "hook"])
def test_graphs_and_hooks_give_what_the_getter_gives(name: str, feature_cls: str) -> None:
    if feature_cls == "hook" and name not in ("dpz_poolformer_s12", "dpz_caformer_n4"):
        with pytest.raises(ConfigError, match=r"'hook' is not available: .*modules return.*allowed: getter .*, fx$"):
            features(name, feature_cls)
        return
    getter, other = features(name, "getter"), features(name, feature_cls)
    assert other.training and other.feature_info.channels() == getter.feature_info.channels()
    assert other.feature_info.reduction() == getter.feature_info.reduction()
    size = SHORT[name].get("img_size", 64 if name == "dpz_poolformer_s12" else 32)
    images = torch.randn(2, 3, size, size)
    outputs = []
    for net in (getter, other):
        torch.manual_seed(1)
        outputs.append(net(images))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with plain_paths():  # as graphs and scripts are
        got, expected = other.eval()(images), getter.eval()(images)
    assert [x.shape[1] for x in got] == getter.feature_info.channels()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if feature_cls == "fx":
        scripted = torch.jit.script(other)(images)
        assert all(torch.equal(a, b) for a, b in zip(scripted, expected, strict=True))


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
def test_features_that_rebuild_the_model_are_refused(feature_cls: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"feature_cls '{feature_cls}' is not available: .*allowed: getter .*, hook$"
    ):
        features("dpz_caformer_n4", feature_cls)
    with pytest.raises(ConfigError, match="feature_cls 'getr' is not available; allowed: getter"):
        features("dpz_caformer_n4", "getr")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the export extra")
@pytest.mark.parametrize("dynamic_size", [False, True])
@pytest.mark.parametrize("name", ["dpz_poolformer_n4", "dpz_convformer_n4", "dpz_caformer_n4"])
def test_timms_onnx_exporter(name: str, dynamic_size: bool, tmp_path) -> None:
    model = build(name, num_classes=5, drop_path_rate=0.2)
    path = tmp_path / "model.onnx"
    onnx_export(model, str(path), batch_size=2, input_size=(3, 32, 32), check_forward=True, dynamic_size=dynamic_size)
    size = 48 if dynamic_size else 32
    images = torch.randn(3, 3, size, size)
    torch.testing.assert_close(torch.from_numpy(onnx_forward(str(path), images)), model(images), rtol=1e-3, atol=1e-4)
