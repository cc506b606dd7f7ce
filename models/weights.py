"""Weights on disk, and files that survive a kill: written beside their final place, fsynced, then renamed.

A folder cannot replace another in one rename, so the one to be replaced is first set aside as `.old-NAME`; readers look
there when NAME is missing. Reading never unpickles code: `torch.load(weights_only=True)` and safetensors only.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from files.durable import CheckpointError, make_folder, nearest_beside, publish, settled, tidy, together, write_durably
from files.errors import ConfigError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

# What the hub's libraries write instead, timm's `save_for_hf` by default the second; a large model comes in parts, which
# an index names.
HUB_WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Keys of config.json: safetensors has no checksum of its own, nor has JSON.
WEIGHTS_HASH = "weights_sha256"

CONFIG_HASH = "config_sha256"  # of all other keys

# .pth.tar, which is no tar: sail-sg's files and timm's checkpoints; .ckpt: Lightning's
TORCH_SUFFIXES = (".pt", ".pth", ".pth.tar", ".bin", ".ckpt")

# Keys of checkpoints that hold a state dict, averaged ones first, as timm looks for them; `ema_state_dict` is what several
# trainers call the average.
STATE_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")


def weights_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the sorted names.

    The bytes are those of the contiguous layout, so strides and memory formats do not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = _plain(name, tensor)
        # JSON and the fixed number of bytes that dtype and shape imply leave no two dicts with the same stream.
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(folder: Path, state_dict: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Writes folder/config.json and folder/model.safetensors, replacing both at once.

    Tensors that share memory (tied weights) are written one by one, each in full, so that every name can be loaded.

    Args:
        folder: New, empty, or written by this function before.
        state_dict: Tensors by name.
        config: What is needed to build the model; goes to JSON. Its keys `weights_sha256` and `config_sha256` are ours.

    Raises:
        ConfigError: When the folder holds other files, which replacing it would delete.
        CheckpointError: When it could not be written; what was there before is untouched.
    """
    final = Path(folder).resolve()  # a link to a folder stays a link
    temp = final.with_name(f".tmp-{final.name}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{folder}: cannot save weights there, it is not a folder")
    foreign = sorted({entry.name for entry in final.iterdir()} - {CONFIG, WEIGHTS}) if final.exists() else []
    if foreign:
        raise ConfigError(f"{folder}: cannot save weights there, it holds other files ({', '.join(foreign[:3])})")
    tensors, storages = {}, set()
    for name, tensor in state_dict.items():
        tensor = _plain(name, tensor)
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    content = {**config, WEIGHTS_HASH: weights_sha256(tensors)}
    content[CONFIG_HASH] = _config_sha256(json.loads(json.dumps(content)))
    text = json.dumps(content, indent=2, allow_nan=False)
    try:
        with together(bool, final):
            make_folder(final.parent)
            tidy(final.parent, glob.escape(final.name))
            temp.mkdir()
            data = safetensors.torch.save(tensors, metadata={"format": "pt"})  # the metadata timm and others expect
            write_durably(temp / WEIGHTS, lambda file: file.write(data))
            write_durably(temp / CONFIG, lambda file: file.write(text.encode() + b"\n"))
            publish(temp, final)
    except CheckpointError:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Reads a folder of `save_weights`, or a file with a state dict, onto the CPU.

    Args:
        path: A folder with model.safetensors, pytorch_model.bin or the parts that an index of either names, or with one
            file of weights of another name, and perhaps config.json (or model.safetensors or pytorch_model.bin in it,
            which is the same); another .safetensors file; or a file of torch.save (.pt, .pth, .pth.tar, .bin, .ckpt)
            holding a state dict or a checkpoint with one, see `choose_state`.

    Returns:
        The tensors by name, and the folder's config (None for a file, or when there is no config.json).

    Raises:
        ConfigError: When there is nothing to read, or it is damaged, or holds anything but tensors and plain values, or
            does not say which of several weights to take.
    """
    path = Path(path)
    if path.name in (WEIGHTS, *HUB_WEIGHTS) and (settled(path.parent) / CONFIG).exists():
        # what is said there of the file holds for it under either name
        return _load_folder(settled(path.parent), path.parent, path.name)
    found = settled(path)
    if found.is_dir():
        return _load_folder(found, path)
    if not found.exists():
        raise ConfigError(f"{path}: no such file or folder{nearest_beside(path)}")
    return _read_file(path), None


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in one file, or in the parts that an index names."""
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise ConfigError(f"{path}: {_foreign_folder(path.parent) or 'a part of a checkpoint; name its folder'}")
    if not path.name.endswith((".safetensors", *TORCH_SUFFIXES)):
        allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ConfigError(f"{path}: cannot read weights from {path.suffix or 'this'}; allowed: {allowed}")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise ConfigError(f"{path}: one part of several; name their folder, or the .index.json in it")
    return _read_one(path)


def _read_one(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in one file that says all of itself."""
    _check_no_pointer(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_zip(path)
    try:
        checkpoint = read_tensors(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    state = choose_state(checkpoint, path)
    check_dense(state, path)
    return dict(state)


def _read_parts(index: Path) -> dict[str, torch.Tensor]:
    """The state dict in the files that a hub folder's index names, whole or not at all."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not a readable index of weights: {type(error).__name__}: {error}") from error
    state: dict[str, torch.Tensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: refused: names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index.parent / name}: is missing, but {index.name} beside it names it")
        state |= _read_one(index.parent / name)
    if state.keys() != weight_map.keys():
        first = sorted(state.keys() ^ weight_map.keys())[0]
        raise ConfigError(f"{index}: does not match the files that it names: {first} is in only one of them")
    return state


def _check_no_pointer(path: Path) -> None:
    """Refuses what a clone leaves in place of the weights where Git LFS is not set up."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if pointer:
        raise ConfigError(f"{path}: a pointer of Git LFS, not the weights; fetch them with: git lfs pull")


_AVERAGED = re.compile(r"(?<![A-Za-z])(ema|swa|averag|shadow)|EMA|SWA")  # words in keys of averaged weights
_NO_MODEL = ("optim", "lr_sched", "scaler", "amp", "loops")  # beginnings of keys that hold other things than a model
Place = tuple[str, ...]


def choose_state(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The state dict in a checkpoint: under the first of `STATE_KEYS`, else the only one in it, else the checkpoint itself.

    Two trainers put the average under `state_dict` and move what was there: mmengine to `ema_state_dict`, Lightning to
    `current_model_state`.

    Args:
        checkpoint: What a file of torch.save held.
        path: That file, for messages.

    Raises:
        ConfigError: It holds several and none is the obvious one; says how to save one alone.
    """
    if not checkpoint.keys().isdisjoint(("ds_config", "ds_version")):
        raise ConfigError(f"{path}: {_DEEPSPEED.format(path.parent)}")
    known = next((key for key in STATE_KEYS if _has_tensors(checkpoint.get(key))), None)
    if _has_tensors(checkpoint.get("state_dict")) and (
        _is_mmengines(checkpoint) or "current_model_state" in checkpoint
    ):
        known = "state_dict"
    elif known is None or not _AVERAGED.search(known):
        return _choose_unknown(checkpoint, known, path)
    return checkpoint[known]


def _choose_unknown(checkpoint: Mapping[str, Any], known: str | None, path: Path) -> Mapping[str, Any]:
    """`choose_state` where no average stands under a key that says so; `known` is the key of the other weights."""
    states, averages = dict(_state_dicts(checkpoint)), list(_averages(checkpoint))
    raw = [(known,)] if known else [place for place in states if place not in averages]
    if not averages and len(raw) < 2:
        return checkpoint[known] if known else next(iter(states.values()), checkpoint)
    places = ", ".join(map(_subscript, raw[:4])) + (" and more" if len(raw) > 4 else "")
    if not averages:
        raise ConfigError(
            f"{path}: holds several state dicts: {places}\n{_save_alone(path, raw[0])}, or another of them"
        )
    average, beside = _subscript(averages[0]), f" beside {places}" if raw else ""
    if averages[0] in states:
        what = f"holds averaged weights in {average}{beside}; which to load, nothing says"
        advice = f"\n{_save_alone(path, averages[0])}" + (f", or {_subscript(raw[0])} in the same way" if raw else "")
    else:
        what = f"holds averaged weights in {average}, without their names,{beside}"
        advice = "; have the program that wrote it write them as a state dict"
        advice += f"\nor, to load {_subscript(raw[0])}, {_save_alone(path, raw[0])}" if raw else ""
    raise ConfigError(f"{path}: {what}{advice}")


def _is_mmengines(checkpoint: Mapping[str, Any]) -> bool:
    """Whether mmengine wrote it: its average counts its steps, and its checkpoints hold a message hub."""
    average = checkpoint.get("ema_state_dict")
    return isinstance(average, dict) and ("steps" in average or "message_hub" in checkpoint)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())


def _is_state_dict(value: Any) -> bool:
    """Whether it looks like the state dict of a network: tensors by dotted names."""
    return _has_tensors(value) and any(isinstance(k, str) and "." in k for k in value)


def _state_dicts(node: Mapping[Any, Any], place: Place = ()) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The state dicts in a checkpoint, by where they are."""
    for key, value in node.items():
        if not isinstance(key, str) or not isinstance(value, dict) or key.startswith(_NO_MODEL):
            continue
        if _is_state_dict(value):
            yield (*place, key), value
        elif len(place) < 4:
            yield from _state_dicts(value, (*place, key))


def _averages(node: Mapping[Any, Any], place: Place = ()) -> Iterator[Place]:
    """Where a checkpoint holds averaged weights, with names or without."""
    for key, value in node.items():
        if not isinstance(key, str) or key.startswith(_NO_MODEL):
            continue
        here = (*place, key)
        if isinstance(value, dict) and not _is_state_dict(value):
            if len(place) < 4:
                yield from _averages(value, here)
        elif any(map(_AVERAGED.search, here)) and (_is_state_dict(value) or _is_list_of_tensors(value)):
            yield here


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value)


def _subscript(place: Place) -> str:
    """('a', 'b') -> ["a"]["b"], which is Python as well."""
    return "".join(f"[{json.dumps(key)}]" for key in place)


def _save_alone(path: Path, place: Place) -> str:
    """A command that writes one state dict of a checkpoint to a file of its own."""
    load = f"torch.load({json.dumps(str(path))}, weights_only=True){_subscript(place)}"
    command = shlex.quote(f'import torch; torch.save({load}, "weights.pth")')
    return f"save it alone: python -c {command}"


def misfits(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps weights from fitting a model whose state dict is `own`, a line for each tensor; empty if they fit."""
    faults = [f"{k} has shape {list(state[k].shape)}, expected {list(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]  # fmt: skip
    faults += [f"{k} is missing" for k in own if k not in state]
    return faults + [f"{k} is not in the model" for k in state if k not in own]


def check_dense(state: Mapping[Any, Any], origin: object) -> None:
    """Refuses what is not a dict of dense tensors by name.

    Raises:
        ConfigError: Naming the key.
    """
    for key, value in state.items():
        if not isinstance(key, str):
            raise ConfigError(f"{origin}: not a state dict: its key {key!r} is not text")
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{origin}: not a state dict: {key!r} is not a tensor")
        if not _is_dense(value) or value.is_meta:
            what = "on the meta device, without values" if value.is_meta else str(value.layout)
            raise ConfigError(
                f"{origin}: {key} must be a dense tensor, is {'quantized' if value.is_quantized else what}"
            )


def _check_zip(path: Path) -> None:
    """Refuses a file of torch.save that does not match its own checksums, which torch does not look at.

    torch's format before 1.6 is no zip and has none.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged zip can raise nearly anything
        raise ConfigError(f"{path}: refused: cut short or damaged ({type(error).__name__})") from error
    if damaged is not None:
        raise ConfigError(f"{path}: refused: damaged: {damaged} in it does not match its checksum")


def _load_folder(
    folder: Path, named: Path, file: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """`load_weights` of a folder; `named` is what the user called it, `file` the one of its files that is meant."""
    file = file or _weights_in(folder, named)
    if not (folder / file).is_file():
        raise ConfigError(f"{named / file}: no such file or folder{nearest_beside(folder / file)}")
    config = None
    if (folder / CONFIG).exists():
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{named / CONFIG}: cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{named / CONFIG}: must be a JSON object, got {type(config).__name__}")
    state = _read_file(folder / file)
    hashes = (WEIGHTS_HASH, CONFIG_HASH)
    # Ours: timm's config has neither hash and no section `model`. One damaged byte leaves a sign of it.
    if config and (isinstance(config.get("model"), dict) or not config.keys().isdisjoint(hashes)):
        missing = next((key for key in hashes if key not in config), None)
        if missing is not None:
            raise ConfigError(
                f"{named / CONFIG}: damaged, or not as it was written: {missing} is missing; "
                f"a copy of {file} on its own is loaded unchecked"
            )
        if config[CONFIG_HASH] != _config_sha256(config):
            raise ConfigError(f"{named / CONFIG}: damaged, or not as it was written: its hash is not {CONFIG_HASH}")
        if config[WEIGHTS_HASH] != weights_sha256(state):
            raise ConfigError(f"{named / file}: damaged: its hash is not {WEIGHTS_HASH} of {CONFIG} beside it")
        config = {key: value for key, value in config.items() if key not in hashes}
    return state, config


def _weights_in(folder: Path, named: Path) -> str:
    """The name of the file that holds a folder's weights, or names their parts.

    Raises:
        ConfigError: There is none, or there are several; says where to look.
    """
    if found := next((name for name in (WEIGHTS, *HUB_WEIGHTS) if (folder / name).is_file()), None):
        return found
    if foreign := _foreign_folder(folder, named):
        raise ConfigError(f"{named}: {foreign}")
    files = _weight_files(folder)
    if len(files) == 1:
        return files[0]
    if files:
        some = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
        raise ConfigError(f"{named}: there is no {WEIGHTS} in this folder, but {some}; name the one you mean")
    below = [folder / "best", *sorted((folder / "snapshots").glob("*")), folder / "checkpoints"]
    place = next((f for f in below if f.is_dir() and (_weight_files(f) or (f / HUB_WEIGHTS[0]).is_file())), None)
    hint = f"; did you mean {str(named / place.relative_to(folder))!r}?" if place else ""
    raise ConfigError(f"{named}: there is no {WEIGHTS} in this folder{hint}")


def files_read(path: Path) -> list[Path]:
    """The files that `load_weights` may read from a path, there or not."""
    if not os.path.isdir(path) and path.name not in (WEIGHTS, *HUB_WEIGHTS):
        return [path]
    folder = path if os.path.isdir(path) else path.parent
    parts = _weight_files(folder) if os.path.isdir(folder) else []
    return [folder / name for name in (CONFIG, WEIGHTS, *HUB_WEIGHTS, *parts)]


def _weight_files(folder: Path) -> list[str]:
    """Names of the files in a folder that weights can be read from."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    return [name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES)) and not name.startswith(".")]


_DEEPSPEED = (
    "a checkpoint of DeepSpeed, whose weights may be in pieces; join them with the script that it puts there: "
    "python zero_to_fp32.py {0} OUTPUT, and name OUTPUT"
)

_DISTRIBUTED = (
    "a distributed checkpoint of torch, in pieces; join them with: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} weights.pth"
)


def _foreign_folder(folder: Path, named: Path | None = None) -> str:
    """What to do with a folder that holds weights in pieces of another program, or ""."""
    if any(folder.glob("*.distcp")):
        return _DISTRIBUTED.format(named or folder)
    pieces = ("zero_to_fp32.py", "mp_rank_*_model_states.pt", "global_step*/mp_rank_*_model_states.pt")
    if any(any(folder.glob(pattern)) for pattern in pieces):
        return _DEEPSPEED.format(named or folder)
    return ""


def _config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a config.json says, in any order and with any white space, but for this hash itself."""
    content = {key: value for key, value in config.items() if key != CONFIG_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file (cut short or damaged?): {error}") from error


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU in contiguous layout, or a ValueError when it has none."""
    if not isinstance(tensor, torch.Tensor) or not _is_dense(tensor):
        raise ValueError(f"{name}: a state dict of dense tensors is needed, got {type(tensor).__name__}")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _save_advice(path: Path, found: str) -> str:
    """What to do with a file that holds more than tensors and plain values, on a line of its own."""
    if found != "argparse.Namespace":
        return "\nsave the weights alone in the program that made it: torch.save(model.state_dict(), 'weights.pth')"
    # timm's training script keeps its arguments beside the weights; this reads them without running anything either,
    # and takes the weights that `choose_state` would take.
    code = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"c = torch.load({json.dumps(str(path))}, weights_only=True); "
        f"torch.save(next((c[k] for k in {json.dumps(STATE_KEYS)} if isinstance(c.get(k), dict) "
        'and any(map(torch.is_tensor, c[k].values()))), c), "weights.pth")'
    )
    return f"\nsave its weights alone: python -c {shlex.quote(code)}"


def read_tensors(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise nearly anything
        # torch's own message advises loading it unsafely; ours names what is in the way.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}; only tensors and plain Python values are read" if found else "cannot be read"
        hint = _save_advice(path, found[1]) if found else ""
        raise CheckpointError(f"{path}: refused: {what} ({type(error).__name__}){hint}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict, holds {type(state).__name__}")
    return state
