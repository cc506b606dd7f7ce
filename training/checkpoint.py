"""Checkpoints of a run: written so that a kill at any moment leaves the old or the new one.

Everything is written into a hidden folder beside its final place, every file and folder is fsynced, and only then is
the folder renamed and the parent fsynced; what it replaces is removed last (see models/weights.py).
Reading never unpickles code: `torch.load(weights_only=True)` only.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files.durable import (
    CheckpointError,
    make_folder,
    nearest_beside,
    publish,
    remove,
    settled,
    tidy,
    together,
    warn_only,
    write_durably,
)
from files.errors import ConfigError
from files.words import counted
from models.weights import read_tensors

FORMAT = 1
MANIFEST = "manifest.json"
SHARED = "shared.pt"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified.

    Attributes:
        step: Optimizer steps done when it was saved.
        path: The folder it came from.
        world_size: Number of processes that saved it.
        shared: What is the same on every rank.
        rank_state: What belongs to the rank that asked; where the number of processes is another now, to rank 0.
        rank_states: Of every rank that saved, in order, where the number of processes is another now; else empty.
    """

    step: int
    path: Path
    world_size: int
    shared: dict[str, Any]
    rank_state: dict[str, Any]
    rank_states: tuple[dict[str, Any], ...] = ()


# ---- a run's checkpoints ----------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    shared: dict[str, Any],
    rank_state: dict[str, Any],
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[bool], bool] = bool,
) -> Path:
    """Writes folder/step-NNNNNNNN and then removes what is beyond `keep`. Every rank calls it; ranks share the folder.

    A checkpoint of the same step is replaced. Checkpoints of later steps are removed once this one is in place: they
    are damaged or belong to a history that resuming from an earlier step has given up, and would be resumed next time.

    Args:
        folder: The run's folder of checkpoints; made if missing, in a folder that is there.
        step: Optimizer steps done, >= 0.
        shared: State that is the same on all ranks; rank 0's is written. Tensors and plain Python values.
        rank_state: State of this rank alone.
        keep: Number of intact checkpoints to keep, >= 1, this one included.
        barrier: Waits for all ranks and returns whether any of them passed True: `World.barrier`.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: On every rank, when any rank could not write. Earlier checkpoints are then untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got step={step}, keep={keep}")
    assert 0 <= rank < world_size
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    temp = folder / f".tmp-{final.name}"
    try:
        with together(barrier, final):
            if rank == 0:
                make_folder(folder, parents=False)  # a run folder deleted meanwhile is not made again
                tidy(folder, "step-*")
                temp.mkdir()
        with together(barrier, final):
            _write_state(temp / _rank_file(rank), rank_state)
            if rank == 0:
                _write_state(temp / SHARED, shared)
        with together(barrier, final):
            if rank == 0:
                _write_manifest(temp, step=step, world_size=world_size)
                publish(temp, final)
                _prune(folder, step=step, keep=keep)
    except CheckpointError:
        if rank == 0:  # no rank writes any more; give a full disk its room back
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path, *, rank: int = 0, world_size: int | None = 1) -> Checkpoint:
    """Reads one checkpoint folder after verifying every file in it, those of other ranks included.

    Every rank checks all files so that all ranks come to the same verdict.

    Args:
        path: A folder step-NNNNNNNN.
        rank: Whose state to read beside the shared one.
        world_size: Number of processes now, or None to look at the checkpoint as the rank that saved it.

    Raises:
        CheckpointError: When it is damaged, or holds anything but tensors and plain values.
        ConfigError: When there is no such folder, or no such rank in it.
    """
    path = Path(path)
    folder = settled(path)
    if not folder.exists():
        raise ConfigError(f"{path}: no such checkpoint{nearest_beside(path)}")
    manifest = _check(folder, hashes=True)
    saved = manifest["world_size"]
    changed = world_size not in (None, saved)
    if not changed and not 0 <= rank < saved:
        raise ConfigError(f"{path}: saved by {counted(saved, 'process')}, so there is no rank {rank} in it")
    wanted = range(saved) if changed else [rank]
    states = tuple(read_tensors(folder / _rank_file(which)) for which in wanted)
    return Checkpoint(
        step=manifest["step"],
        path=folder,
        world_size=saved,
        shared=read_tensors(folder / SHARED),
        rank_state=states[0],
        rank_states=states if changed else (),
    )


def latest_checkpoint(
    folder: Path, *, rank: int = 0, world_size: int | None = 1, warn: Callable[[str], object] = warnings.warn
) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, or None. `warn` gets a line per damaged one, on rank 0 alone."""
    for _, path in sorted(_steps(Path(folder)).items(), reverse=True):
        try:
            return load_checkpoint(path, rank=rank, world_size=world_size)
        except CheckpointError as error:
            if rank == 0:
                warn(f"damaged checkpoint passed over: {error}")
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any checkpoint in `folder`, intact or not."""
    return bool(_steps(Path(folder)))


# ---- random states ----------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as tensors and plain values."""
    version, python_words, python_gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(python_words), "gauss": python_gauss},
        "numpy": {
            "words": torch.tensor([int(word) for word in numpy_words]),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(numpy_gauss),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(state: dict[str, Any]) -> None:
    """Puts back what `random_states` returned; states of devices that are not here are left out."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = np.array(numpy["words"].tolist(), dtype=np.uint32)
    np.random.set_state(("MT19937", words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, cuda in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(cuda, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ---- files and folders ------------------------------------------------------------------------------------------


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state with torch.save, and refuses one that could not be read back."""
    write_durably(path, lambda file: torch.save(state, file))
    read_tensors(path, mmap=True)  # unpickles without reading the tensors: found out now, not when it is needed


def _write_manifest(folder: Path, *, step: int, world_size: int) -> None:
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _file_sha256(folder / name)}
        for name in _expected_files(world_size)
    }
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    manifest["sha256"] = _manifest_sha256(manifest)
    write_durably(folder / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode() + b"\n"))


def _check(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """The manifest, after checking it, and that its files are there with their sizes and, if asked, their hashes."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a manifest") from error
    if digest != _manifest_sha256(manifest):
        raise CheckpointError(f"{path}: damaged: its hash is not the one it holds")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    step, world_size, files = (manifest.get(key) for key in ("step", "world_size", "files"))
    numbers = type(step) is int and type(world_size) is int  # a bool is no number
    if not numbers or not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise CheckpointError(f"{path}: is not a manifest")
    if len(files) != world_size + 1 or set(files) != set(_expected_files(world_size)):
        raise CheckpointError(f"{path}: does not list the files of {counted(world_size, 'process')}")
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        try:
            if file.stat().st_size != facts.get("size"):
                raise CheckpointError(f"{file}: damaged: {file.stat().st_size} bytes, should be {facts.get('size')}")
            if hashes and _file_sha256(file) != facts.get("sha256"):
                raise CheckpointError(f"{file}: damaged: its hash is not the one in {MANIFEST}")
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return manifest


def _prune(folder: Path, *, step: int, keep: int) -> None:
    """Removes checkpoints later than `step`, and those older than the `keep` newest that look intact."""
    intact = 0
    for other, path in sorted(_steps(folder).items(), reverse=True):
        if other > step or intact == keep:
            # Hidden first: a removal that is cut short must not leave half a checkpoint in sight.
            hidden = path.with_name(f".tmp-{path.name}")
            with warn_only(path):
                os.rename(path, hidden)
                remove(hidden)
        else:
            with contextlib.suppress(CheckpointError):
                _check(folder=path, hashes=False)
                intact += 1


def _steps(folder: Path) -> dict[int, Path]:
    """Path by step of every checkpoint in the folder, those set aside included, intact or not."""
    names = [entry.name.removeprefix(".old-") for entry in folder.iterdir()] if folder.is_dir() else []
    return {int(name[5:]): folder / name for name in names if re.fullmatch(r"step-\d{8,}", name, re.ASCII)}


def _expected_files(world_size: int) -> list[str]:
    return [SHARED, *(_rank_file(rank) for rank in range(world_size))]


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
