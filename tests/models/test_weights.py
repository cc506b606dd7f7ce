"""Weights and the files they are in: every damage is named, and no kill or full disk costs what was there before."""

import argparse
import hashlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint

from files.durable import CheckpointError, save_text, settled, tidy
from files.errors import ConfigError
from models import weights as weights_module
from models.registry import model_config
from models.weights import load_weights, read_tensors, save_weights, weights_sha256
from tests.models.parts import make, names


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class Evil:
    """Pickles to a call that makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_weights_sha256_changes_with_name_dtype_shape_and_every_bit():
    base = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor(1.0)}
    flipped = base["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    different = [
        base,
        {"c": base["a"], "b": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": flipped},
        {**base, "b": torch.tensor([1.0])},
        {**base, "b": torch.tensor(-0.0)},
        {**base, "b": torch.tensor(0.0)},
        {"a": base["a"]},
        {**base, "e": torch.empty(0)},
        {**base, "e": torch.empty(0, 1)},
        {},
    ]
    assert len({weights_sha256(state) for state in different}) == len(different)


def test_weights_sha256_ignores_order_layout_and_gradients():
    image = torch.randn(2, 3, 4, 5)
    square = torch.randn(4, 4)
    plain = {"image": image, "square": square, "half": torch.ones(3, dtype=torch.bfloat16)}
    other = {
        "half": torch.ones(6, dtype=torch.bfloat16)[::2],
        "square": torch.nn.Parameter(square.t().contiguous().t()),
        "image": image.contiguous(memory_format=torch.channels_last),
    }
    assert not other["square"].is_contiguous() and not other["image"].is_contiguous()
    assert weights_sha256(plain) == weights_sha256(other)


def test_weights_sha256_is_what_the_description_says():
    expected = hashlib.sha256(b'["w", "torch.bfloat16", [2]]' + bytes([0x80, 0x3F, 0, 0x40])).hexdigest()
    assert weights_sha256({"w": torch.tensor([1.0, 2.0]).bfloat16()}) == expected


def test_weights_sha256_refuses_what_is_not_a_dense_tensor():
    with pytest.raises(ValueError, match="extra"):
        weights_sha256({"extra": 1})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(3),
    }


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


def test_weights_round_trip_and_replace(tmp_path, weights):
    folder, config = tmp_path / "best", {"name": "tiny", "depths": [2, 2], "rate": 0.1}
    save_weights(folder, {"old": torch.ones(2)}, {})
    save_weights(folder, weights, config)
    assert names(tmp_path) == ["best"] and names(folder) == ["config.json", "model.safetensors"]
    state, loaded = load_weights(folder)
    assert_same(state, weights)
    assert loaded == config
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == weights_sha256(weights)
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    for path, said in ((folder / "model.safetensors", config), (tmp_path / "alone.safetensors", None)):
        state, found = load_weights(path)
        assert_same(state, weights)
        assert found == said


def test_weights_into_a_linked_folder_keep_the_link(tmp_path, weights):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_weights(tmp_path / "link", weights, {})
    assert (tmp_path / "link").is_symlink()
    assert_same(load_weights(tmp_path / "real")[0], weights)


def test_weights_never_delete_foreign_files(tmp_path, weights):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files \(notes\.txt\)"):
        save_weights(tmp_path, weights, {})
    with pytest.raises(ConfigError, match="not a folder"):
        save_weights(tmp_path / "notes.txt", weights, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_tied_weights_are_saved_under_every_name(tmp_path):
    tied = torch.randn(6)
    state = {"a": tied, "b": tied, "part": tied[2:4]}
    save_weights(tmp_path / "best", state, {})
    assert_same(load_weights(tmp_path / "best")[0], state)


def test_every_damage_to_weights_is_refused(tmp_path, weights):
    file = tmp_path / "best" / "model.safetensors"
    save_weights(file.parent, weights, {})
    good = file.read_bytes()
    for position in range(len(good)):
        flip(file, position)
        try:
            # A flip in the metadata or in white space changes no weight.
            assert_same(load_weights(file.parent)[0], weights)
            assert position < good.index(b"conv.weight")
        except ConfigError as error:
            assert "model.safetensors" in str(error)
        file.write_bytes(good)
    for size in range(0, len(good), 7):
        file.write_bytes(good[:size])
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            load_weights(file.parent)


def test_every_damage_to_a_config_is_refused(tmp_path):
    file = tmp_path / "best" / "config.json"
    save_weights(file.parent, {"w": torch.ones(1)}, {"model": model_config("caformer_n4").model_dump()})
    good = file.read_bytes()
    content, harmless = json.loads(good), 0
    for position, byte in enumerate(good):
        for other in (byte ^ 1, byte ^ 32):
            bad = good[:position] + bytes([other]) + good[position + 1 :]
            file.write_bytes(bad)
            try:
                load_weights(file.parent)
            except ConfigError as error:
                assert "config.json" in str(error) or "model.safetensors: damaged" in str(error)
            else:
                assert json.loads(bad) == content  # 1E-05 for 1e-05
                harmless += 1
    assert 0 < harmless < len(good)


def test_a_config_that_lacks_a_hash_is_refused(tmp_path, weights):
    file = tmp_path / "best" / "config.json"
    save_weights(file.parent, weights, {"model": {"name": "tiny"}})
    content = json.loads(file.read_text())
    for lost in (("weights_sha256",), ("config_sha256",), ("weights_sha256", "config_sha256")):
        file.write_text(json.dumps({key: value for key, value in content.items() if key not in lost}))
        with pytest.raises(
            ConfigError, match=rf"config\.json: damaged, or not as it was written: {lost[0]} is missing"
        ):
            load_weights(file.parent)
    file.write_text(json.dumps(content, sort_keys=True))  # written anew, but saying the same
    assert load_weights(file.parent)[1] == {"model": {"name": "tiny"}}


def test_naming_the_file_in_a_folder_spares_no_check(tmp_path, weights):
    file = tmp_path / "best" / "model.safetensors"
    save_weights(file.parent, weights, {"mark": 1})
    os.rename(file.parent, tmp_path / ".old-best")  # killed between its two renames
    assert load_weights(file)[1] == {"mark": 1}
    os.rename(tmp_path / ".old-best", file.parent)
    flip(file, -1)
    with pytest.raises(ConfigError, match=r"best/model\.safetensors: damaged: its hash is not weights_sha256"):
        load_weights(file)
    (file.parent / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"best/config\.json: cannot be read as JSON"):
        load_weights(file)


@pytest.mark.parametrize("text", ["", "[1]", "{", "nope", "[" * 100_000])
def test_a_damaged_config_beside_weights(tmp_path, weights, text):
    save_weights(tmp_path / "best", weights, {})
    (tmp_path / "best" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_weights(tmp_path / "best")


def test_weights_without_config_or_without_hash(tmp_path, weights):
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(state, str(tmp_path / "model.safetensors"))
    assert load_weights(tmp_path)[1] is None
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    loaded, config = load_weights(tmp_path)
    assert_same(loaded, weights)
    assert config == {"architecture": "x"}


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_averaged_weights_go_first_as_in_timm(tmp_path, averaged):
    state = {"state_dict": {"a": torch.zeros(2)}, averaged: {"a": torch.ones(2)}}
    torch.save(state, tmp_path / "last.pth.tar")
    assert torch.equal(load_weights(tmp_path / "last.pth.tar")[0]["a"], torch.ones(2))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pth.tar", ".bin", ".ckpt"])
def test_state_dict_files(tmp_path, weights, key, suffix):
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / f"w{suffix}")
    state, config = load_weights(tmp_path / f"w{suffix}")
    assert_same(state, weights)
    assert config is None


def test_every_damage_to_a_torch_file_is_refused(tmp_path):
    file, weights = tmp_path / "w.pth", {"w": torch.randn(9)}
    torch.save(weights, file)
    good, refused = file.read_bytes(), 0
    for position in range(len(good)):
        flip(file, position)
        try:
            assert_same(load_weights(file)[0], weights)  # the flip was in what fills a zip up
        except ConfigError as error:
            assert str(error).startswith(f"{file}: refused: ")
            refused += 1
        file.write_bytes(good)
    assert refused > len(good) / 4
    for size in range(0, len(good), 17):
        file.write_bytes(good[:size])
        with pytest.raises(ConfigError, match=r"w\.pth: refused"):
            load_weights(file)


def test_a_torch_file_of_the_older_format(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_same(load_weights(tmp_path / "w.pth")[0], weights)


def run_advice(error: ConfigError, start: str) -> None:
    """Runs the Python in the command that an error ends with, behind `start`, in the folder one stands in."""
    command = shlex.split(str(error).partition(start)[2].partition(", or ")[0])
    assert command[:2] == ["python", "-c"], str(error)
    assert len(str(error).splitlines()) <= 3
    try:
        exec(command[2], {})
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (["state_dict"], "state_dict"),
        (["state_dict", "state_dict_ema"], "state_dict_ema"),
        (["model", "model_ema"], "model_ema"),
        (["state_dict", "ema_state_dict"], "ema_state_dict"),
        (["model"], "model"),
    ],
)
def test_a_checkpoint_of_timms_script_says_how_to_save_its_weights_alone(tmp_path, monkeypatch, keys, taken):
    monkeypatch.chdir(tmp_path)
    state = {key: {"conv.weight": torch.full((2,), float(i))} for i, key in enumerate(keys)}
    torch.save({"epoch": 3, **state}, "plain.pth.tar")
    assert_same(load_weights(Path("plain.pth.tar"))[0], state[taken])
    arguments = argparse.Namespace(model="caformer_n4", lr=0.1, mean=(0.5,), betas=None)
    torch.save({"epoch": 3, "arch": "caformer_n4", **state, "args": arguments}, "it's last.pth.tar")
    with pytest.raises(
        ConfigError, match=r"^it's last\.pth\.tar: refused: holds argparse\.Namespace; only tensors"
    ) as error:
        load_weights(Path("it's last.pth.tar"))
    run_advice(error.value, "save its weights alone: ")
    assert_same(load_weights(Path("weights.pth"))[0], state[taken])


def test_other_objects_in_a_checkpoint_are_named_with_what_to_do(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {"root": Path("x")}}, tmp_path / "x.ckpt")
    with pytest.raises(
        ConfigError, match=r"x\.ckpt: refused: holds pathlib\S*; only .*\nsave the weights alone in the"
    ):
        load_weights(tmp_path / "x.ckpt")


RAW, AVERAGE = ({"conv.weight": torch.full((2,), value), "conv.bias": torch.zeros(1)} for value in (0.0, 1.0))


def trained() -> dict:
    """State of an optimizer, which holds tensors as well."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"model_state_dict": RAW, "optimizer_state_dict": trained(), "loss": 0.1}, RAW),
        ({"net": RAW, "acc": torch.tensor(0.9)}, RAW),
        ({"model": {"name": "caformer_n4"}, "state": {"network": RAW}}, RAW),
        ({"state_dict": RAW, "optimizer_states": [trained()], "callbacks": {"ModelCheckpoint{}": {"best": "x"}}}, RAW),
        ({"state_dict": RAW, "state_dict_ema": None, "model_ema": {}}, RAW),
        ({"ema_state_dict": AVERAGE, "model_state_dict": RAW}, AVERAGE),
        # what Lightning's WeightAveraging and mmengine's EMAHook write: the average has moved to state_dict
        ({"state_dict": AVERAGE, "current_model_state": RAW, "averaging_state": {"n_averaged": torch.tensor(3)}}, AVERAGE),
        ({"meta": {"epoch": 1}, "state_dict": AVERAGE, "ema_state_dict": {"steps": torch.tensor(3)} | {
            f"module.{key}": value for key, value in RAW.items()}}, AVERAGE),
        ({"state_dict": AVERAGE, "ema_state_dict": RAW, "message_hub": {"log_scalars": {}}}, AVERAGE),
    ],
)  # fmt: skip
def test_the_obvious_weights_of_a_checkpoint_are_taken(tmp_path, checkpoint, expected):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert_same(load_weights(tmp_path / "x.ckpt")[0], expected)


@pytest.mark.parametrize(
    ("checkpoint", "message", "saved"),
    [
        ({"student": RAW, "teacher": AVERAGE, "epoch": 1}, r'several state dicts: \["student"\], \["teacher"\]\n', RAW),
        ({"state_dict": RAW, "callbacks": {"EMA": {"ema_state_dict": AVERAGE}}},
         r'averaged weights in \["callbacks"\]\["EMA"\]\["ema_state_dict"\] beside \["state_dict"\]; which', AVERAGE),
        ({"state_dict": RAW, "callbacks": {"StochasticWeightAveraging": {"average_model_state": AVERAGE}}},
         "averaged weights in .*; which to load, nothing says", AVERAGE),
        ({"model": RAW, "swa_model": AVERAGE}, r'averaged weights in \["swa_model"\] beside \["model"\]', AVERAGE),
        ({"net": RAW, "netEMA": AVERAGE}, r'averaged weights in \["netEMA"\] beside \["net"\]', AVERAGE),
        ({"ema": AVERAGE}, r'averaged weights in \["ema"\]; which', AVERAGE),
        ({"model": RAW, "ema": {"decay": 0.99, "shadow_params": [torch.ones(2)]}},
         r'averaged weights in \["ema"\]\["shadow_params"\], without their names, beside \["model"\]; have the', RAW),
        ({"state_dict": RAW, "ema_state_dict": {"shadow_params": [torch.ones(2)], "num_updates": 3}},
         r'averaged weights in \["ema_state_dict"\]\["shadow_params"\], without their names', RAW),
    ],
)  # fmt: skip
def test_weights_that_nothing_chooses_are_refused_with_a_command(tmp_path, monkeypatch, checkpoint, message, saved):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "x.ckpt")
    with pytest.raises(ConfigError, match=rf"^x\.ckpt: holds {message}") as error:
        load_weights(Path("x.ckpt"))
    run_advice(error.value, "save it alone: ")
    assert_same(load_weights(Path("weights.pth"))[0], saved)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(2)}, "not a state dict: its key 1 is not text"),
        ({"w": 1.0}, "not a state dict: 'w' is not a tensor"),
        ({"w": torch.eye(2).to_sparse()}, "w must be a dense tensor, is torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, "w must be a dense tensor, is on the meta device, without values"),
    ],
    ids=["key", "number", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict_of_dense_tensors(tmp_path, state, message):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'w.pth'}: {message}$"):
        load_weights(tmp_path / "w.pth")


def test_state_dict_files_that_are_refused(tmp_path):
    target = tmp_path / "made-by-the-pickle"
    torch.save({"x": Evil(target)}, tmp_path / "evil.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "w.onnx").write_text("x")
    for name, message in {
        "evil.pt": "refused",
        "other.pt": "'epoch' is not a tensor",
        "list.pt": "must hold a dict",
        "text.pth": "refused",
        "w.onnx": r"cannot read weights from \.onnx; allowed: \.safetensors, \.pt, \.pth, \.pth\.tar, \.bin, \.ckpt",
        "othr.pt": r"no such file or folder; did you mean 'other\.pt'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_weights(tmp_path / name)
    assert not target.exists()


def test_a_run_folder_is_pointed_to_its_best(tmp_path, weights):
    save_weights(tmp_path / "best", weights, {})
    with pytest.raises(ConfigError, match=r"no model\.safetensors in this folder; did you mean '.*best'"):
        load_weights(tmp_path)
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(ConfigError, match=r"no model\.safetensors in this folder$"):
        load_weights(tmp_path)


def plain(weights: dict) -> dict:
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def shards(folder: Path, weights: dict, suffix: str) -> Path:
    """A hub folder with weights in two parts; returns the index."""
    folder.mkdir()
    parts = [dict(list(plain(weights).items())[i::2]) for i in (0, 1)]
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    where = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05}-of-00002{suffix}"
        safetensors.torch.save_file(part, folder / file) if stem == "model" else torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def test_a_hub_folder_with_a_torch_file_only(tmp_path, weights):
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same(load_weights(tmp_path)[0], weights)
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        state, config = load_weights(path)
        assert_same(state, weights)
        assert config == {"architecture": "x"}
    other = {"other": torch.ones(1)}
    safetensors.torch.save_file(other, tmp_path / "model.safetensors")
    assert_same(load_weights(tmp_path)[0], other)
    state, config = load_weights(tmp_path / "pytorch_model.bin")  # the one that is named
    assert_same(state, weights)
    assert config == {"architecture": "x"}


def test_nothing_in_a_hub_folders_torch_file_is_run(tmp_path):
    target = tmp_path / "made-by-the-pickle"
    torch.save({"x": Evil(target)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: refused: holds \S*open; only tensors"):
        load_weights(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_hub_folder_in_parts(tmp_path, weights, suffix):
    index = shards(tmp_path / "hub", weights, suffix)
    (index.parent / "config.json").write_text('{"architecture": "x"}')
    for path in (index.parent, index):
        state, config = load_weights(path)
        assert_same(state, weights)
        assert config == {"architecture": "x"}
    part = next(index.parent.glob(f"*-of-00002{suffix}"))
    with pytest.raises(
        ConfigError, match=r"-of-00002\S+: one part of several; name their folder, or the \.index\.json"
    ):
        load_weights(part)
    part.unlink()
    with pytest.raises(ConfigError, match=rf"{part.name}: is missing, but \S+\.index\.json beside it names it"):
        load_weights(index.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable index of weights: JSONDecodeError"),
        ("[]", "not a readable index of weights: TypeError"),
        ('{"weight_map": []}', "not a readable index of weights: AttributeError"),
        ('{"weight_map": {"w": 1}}', "refused: names 1, which is no file beside it"),
        (
            '{"weight_map": {"w": "../x.safetensors"}}',
            r"refused: names '\.\./x\.safetensors', which is no file beside it",
        ),
        ('{"weight_map": {"v": "a.safetensors"}}', "does not match the files that it names: v is in only one of them"),
    ],
)
def test_a_damaged_index_of_parts(tmp_path, text, message):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.safetensors\.index\.json: {message}"):
        load_weights(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.pth", "last.ckpt", "model_best.pth.tar"])
def test_a_folder_with_one_file_of_another_name(tmp_path, weights, name):
    (tmp_path / "README.md").write_text("x")
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(plain(weights), tmp_path / name)
    else:
        torch.save(weights, tmp_path / name)
    assert_same(load_weights(tmp_path)[0], weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(
        ConfigError, match=r"no model\.safetensors in this folder, but .*other\.pth.*; name the one you"
    ):
        load_weights(tmp_path)


@pytest.mark.parametrize("place", ["snapshots/0a1b", "checkpoints"])
def test_a_folder_above_the_weights_points_to_them(tmp_path, weights, place):
    (tmp_path / place).mkdir(parents=True)
    torch.save(weights, tmp_path / place / "epoch=1-step=9.ckpt")
    with pytest.raises(ConfigError, match=rf"no model\.safetensors in this folder; did you mean '.*{place}'\?$"):
        load_weights(tmp_path)
    assert_same(load_weights(tmp_path / place)[0], weights)


def test_a_distributed_checkpoint_says_how_to_join_it(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed here
        torch.distributed.checkpoint.save({"model": {"conv.weight": torch.ones(2)}}, checkpoint_id="saved")
    for path in (Path("saved"), next(Path("saved").glob("*.distcp"))):
        with pytest.raises(
            ConfigError, match="a distributed checkpoint of torch, in pieces; join them with: "
        ) as error:
            load_weights(path)
    python, *command = shlex.split(str(error.value).partition("join them with: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    assert_same(load_weights(Path("weights.pth"))[0], {"conv.weight": torch.ones(2)})


@pytest.mark.parametrize(
    "inside", ["zero_to_fp32.py", "mp_rank_00_model_states.pt", "global_step9/mp_rank_00_model_states.pt"]
)
def test_a_folder_of_deepspeed_says_how_to_join_it(tmp_path, inside):
    (tmp_path / "global_step9").mkdir()
    torch.save({"module": RAW, "ds_config": {}, "ds_version": "0.15"}, tmp_path / inside)
    message = rf"^{tmp_path}\S*: a checkpoint of DeepSpeed, .*: python zero_to_fp32\.py {tmp_path}\S* OUTPUT, and "
    with pytest.raises(ConfigError, match=message):
        load_weights(tmp_path)
    if inside.endswith(".pt"):
        with pytest.raises(ConfigError, match=message):
            load_weights(tmp_path / inside)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pth"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 9\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match=rf"{name}: a pointer of Git LFS, not the weights; .* git lfs pull$"):
            load_weights(path)


def test_the_folder_one_stands_in(tmp_path, weights, monkeypatch):
    save_weights(tmp_path / "best", weights, {})
    monkeypatch.chdir(tmp_path / "best")
    assert_same(load_weights(Path())[0], weights)
    assert_same(load_weights(Path("../best"))[0], weights)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_any_dtype(tmp_path, dtype):
    state = {"w": torch.tensor([[0.0, 1.0, 0.5]]).to(dtype), "none": torch.empty(0, 2, dtype=dtype)}
    save_weights(tmp_path / "best", state, {})
    loaded = load_weights(tmp_path / "best")[0]
    assert loaded["w"].dtype == loaded["none"].dtype == dtype and loaded["none"].shape == (0, 2)
    assert torch.equal(loaded["w"].view(torch.uint8), state["w"].view(torch.uint8))


class Killed:
    """For kill_script.py: saves that are killed at any of their operations."""

    scenarios: ClassVar = {"first": 6, "weights": 8, "set_aside": 8, "first_text": 4, "text": 4, "stray_text": 4}

    def prepare(self, scenario: str, folder: Path) -> None:
        folder.mkdir()
        if not scenario.startswith("first"):
            self.save(scenario, folder, 1)
        if scenario == "set_aside":  # killed between its two renames
            shutil.copytree(folder / "best", folder / ".tmp-best")
            os.rename(folder / "best", folder / ".old-best")
        if scenario == "stray_text":
            (folder / ".tmp-metrics.csv").write_text("half")

    def act(self, scenario: str, folder: Path) -> None:
        self.save(scenario, folder, 9)

    def save(self, scenario: str, folder: Path, mark: int) -> None:
        if scenario.endswith("text"):
            save_text(folder / "metrics.csv", f"{mark}\n" * 100)
        else:
            save_weights(folder / "best", {"mark": torch.tensor(mark)}, {"mark": mark})

    def read(self, scenario: str, folder: Path) -> int | None:
        if scenario.endswith("text"):
            if not (folder / "metrics.csv").exists():
                return None
            text = (folder / "metrics.csv").read_text()
            assert text == text[:2] * 100, text
            return int(text[0])
        if not settled(folder / "best").exists():
            return None
        state, config = load_weights(folder / "best")
        assert config == {"mark": int(state["mark"])}, config
        return int(state["mark"])


@pytest.mark.parametrize("lose", [pytest.param("kill", marks=pytest.mark.slow), "lose"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(kill_anywhere, lose):
    assert kill_anywhere(lose) == list(Killed.scenarios)


def test_a_full_disk_leaves_the_old_weights_and_says_so(tmp_path, fill_disk):
    def save(mark: int) -> None:
        save_weights(tmp_path / "best", {"w": torch.full((300,), float(mark))}, {"mark": mark})

    save(1)
    assert fill_disk(lambda: save(2), tmp_path) > 10
    assert load_weights(tmp_path / "best")[1] == {"mark": 2}


def test_weights_that_cannot_be_written_leave_no_rubbish(tmp_path, weights, monkeypatch):
    save_weights(tmp_path / "best", weights, {"mark": 1})

    def fail(temp: Path, final: Path) -> None:
        raise PermissionError(13, "Permission denied", str(final))

    monkeypatch.setattr(weights_module, "publish", fail)
    with pytest.raises(CheckpointError, match=r"best was not saved.*untouched: Permission denied: .*best"):
        save_weights(tmp_path / "best", weights, {"mark": 2})
    assert names(tmp_path) == ["best"]
    assert load_weights(tmp_path / "best")[1] == {"mark": 1}


def test_a_folder_that_was_set_aside_is_found_and_brought_back(tmp_path):
    old = make(tmp_path / ".old-a", "1")
    make(tmp_path / ".tmp-a", "half")
    assert settled(tmp_path / "a") == old
    tidy(tmp_path, "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "mark").read_text() == "1"
    make(old, "0")  # one that was replaced, but not yet removed
    assert settled(tmp_path / "a") == tmp_path / "a"
    tidy(tmp_path, "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "mark").read_text() == "1"
    assert settled(tmp_path / "b") == tmp_path / "b"


def test_the_leftovers_of_other_folders_are_left_alone(tmp_path, weights):
    make(tmp_path / ".tmp-best1", "of another save, perhaps still going on")
    make(tmp_path / ".old-best1", "1")
    save_weights(tmp_path / "best[1]", weights, {})
    assert names(tmp_path) == [".old-best1", ".tmp-best1", "best[1]"]


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, container):
    path, target = tmp_path / "x.pt", tmp_path / "made-by-the-pickle"
    if container == "torch":
        torch.save({"x": Evil(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Evil(target)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"x\.pt: refused: holds \S*open; only tensors and plain"):
        read_tensors(path)
    assert not target.exists()
    torch.load(path, weights_only=False) if container == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # the test would have noticed
