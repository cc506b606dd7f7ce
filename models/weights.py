"""Weights on disk, and files that survive a kill: written beside their final place, fsynced, then renamed.

A folder cannot replace another in one rename, so the one to be replaced is first set aside as `.old-NAME`; readers look
there when NAME is missing. Reading never unpickles code: `torch.load(weights_only=True)` and safetensors only.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from models.strict_yaml import ConfigError, nearest

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Keys of config.json: safetensors has no checksum of its own, nor has JSON.
WEIGHTS_HASH = "weights_sha256"
CONFIG_HASH = "config_sha256"  # of all other keys
TORCH_SUFFIXES = (
    ".pt",
    ".pth",
    ".pth.tar",
    ".bin",
)  # .pth.tar, which is no tar: sail-sg's files and timm's checkpoints


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or could not be written; the message names the file and what is wrong."""


# ---- weights -----------------------------------------------------------------------------------------------------------


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
        path: A folder with model.safetensors and perhaps config.json (or that file in it, which is the same), another
            .safetensors file, or a file of torch.save (.pt, .pth, .pth.tar, .bin) holding a state dict, on its own or
            under a key "state_dict" or "model", where averaged weights beside it ("state_dict_ema", "model_ema") go first.

    Returns:
        The tensors by name, and the folder's config (None for a file, or when there is no config.json).

    Raises:
        ConfigError: When there is nothing to read, or it is damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.name == WEIGHTS and (settled(path.parent) / CONFIG).exists():
        path = path.parent  # what is said there of the file holds for it under either name
    found = settled(path)
    if found.is_dir():
        return _load_folder(found, path)
    if not found.exists():
        raise ConfigError(f"{path}: no such file or folder{nearest_beside(path)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.name.endswith(TORCH_SUFFIXES):
        _check_zip(path)
        try:
            state = read_tensors(path)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # averaged ones first, as timm reads its own
            if isinstance(state.get(key), dict):
                state = state[key]
                break
        check_dense(state, path)
        return dict(state), None
    allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise ConfigError(f"{path}: cannot read weights from {path.suffix or 'this'}; allowed: {allowed}")


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


def _load_folder(folder: Path, named: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """`load_weights` of a folder; `named` is what the user called it."""
    if not (folder / WEIGHTS).is_file():
        best = folder / "best"
        hint = f"; did you mean {str(named / 'best')!r}?" if (best / WEIGHTS).is_file() else ""
        raise ConfigError(f"{named}: there is no {WEIGHTS} in this folder{hint}")
    config = None
    if (folder / CONFIG).exists():
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{named / CONFIG}: cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{named / CONFIG}: must be a JSON object, got {type(config).__name__}")
    state = _read_safetensors(folder / WEIGHTS)
    hashes = (WEIGHTS_HASH, CONFIG_HASH)
    # Ours: timm's config has neither hash and no section `model`. One damaged byte leaves a sign of it.
    if config and (isinstance(config.get("model"), dict) or not config.keys().isdisjoint(hashes)):
        missing = next((key for key in hashes if key not in config), None)
        if missing is not None:
            raise ConfigError(
                f"{named / CONFIG}: damaged, or not as it was written: {missing} is missing; "
                f"a copy of {WEIGHTS} on its own is loaded unchecked"
            )
        if config[CONFIG_HASH] != _config_sha256(config):
            raise ConfigError(f"{named / CONFIG}: damaged, or not as it was written: its hash is not {CONFIG_HASH}")
        if config[WEIGHTS_HASH] != weights_sha256(state):
            raise ConfigError(f"{named / WEIGHTS}: damaged: its hash is not {WEIGHTS_HASH} of {CONFIG} beside it")
        config = {key: value for key, value in config.items() if key not in hashes}
    return state, config


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


# ---- files and folders -------------------------------------------------------------------------------------------------


def save_text(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old or the new one.

    Raises:
        CheckpointError: It could not be written; what was there before is untouched.
    """
    temp = path.with_name(f".tmp-{path.name}")
    try:
        with together(bool, path):
            temp.unlink(missing_ok=True)
            write_durably(temp, lambda file: file.write(text.encode()))
            os.replace(temp, path)
            sync_folder(path.parent)
    except CheckpointError:
        with contextlib.suppress(OSError):  # give a full disk its room back
            temp.unlink()
        raise


@contextlib.contextmanager
def together(barrier: Callable[[bool], bool], final: Path) -> Iterator[None]:
    """Runs one stage on all ranks; when it fails on any, it fails on all, so that none is left waiting."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = barrier(error is not None)
    if error is not None:
        raise CheckpointError(f"{final} was not saved, what was there before is untouched: {_reason(error)}") from error
    if failed:
        raise CheckpointError(f"{final} was not saved, what was there before is untouched: another rank failed")


def _reason(error: BaseException) -> str:
    """The operating system's words where it was the cause: torch hides a full disk behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


# timm's training script keeps its arguments beside the weights; this reads them without running anything either.
_SAVE_ALONE = """
save its weights alone: python -c "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); \
torch.save(torch.load({!r}, weights_only=True)['state_dict'], 'weights.pth')\""""


def read_tensors(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise nearly anything
        # torch's own message advises loading it unsafely; ours names what is in the way.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}; only tensors and plain Python values are read" if found else "cannot be read"
        hint = _SAVE_ALONE.format(str(path)) if found and found[1] == "argparse.Namespace" else ""
        raise CheckpointError(f"{path}: refused: {what} ({type(error).__name__}){hint}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict, holds {type(state).__name__}")
    return state


def publish(temp: Path, final: Path) -> None:
    """Moves a finished folder to its place, durably, and then removes the one it replaces."""
    sync_folder(temp)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, old)
    os.rename(temp, final)
    sync_folder(final.parent)
    if old.exists():
        remove(old)


def settled(path: Path) -> Path:
    """`path`, or where a save that was killed between its two renames has set it aside."""
    old = path.parent / f".old-{path.name}"
    return old if path.name and not path.exists() and old.exists() else path


def tidy(folder: Path, pattern: str) -> None:
    """Undoes what killed saves left behind: brings back what was set aside, removes what was never finished."""
    for old in folder.glob(f".old-{pattern}"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            remove(old)
        else:
            os.rename(old, final)
            sync_folder(folder)
    for stray in folder.glob(f".tmp-{pattern}"):
        remove(stray)


def remove(path: Path) -> None:
    with warn_only(path):
        shutil.rmtree(path)


@contextlib.contextmanager
def warn_only(path: Path) -> Iterator[None]:
    """Rubbish that cannot be removed is no reason to stop a run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed: {error.strerror}", stacklevel=2)


def make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest_beside(path: Path) -> str:
    """A suggestion from the names beside a path that does not exist."""
    with contextlib.suppress(OSError):
        return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return ""
