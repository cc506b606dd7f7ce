"""Sharded runs: what DDP computes, in pieces; resumed exactly; refused where it cannot be."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from files.errors import ConfigError
from models.weights import weights_sha256
from tests.training.parts import build_tiny
from training.distributed import World
from training.sharding import gathered, gradients_exchanged, is_sharded, whole, whole_state

ROOT = Path(__file__).resolve().parents[2]
TIMING = ("images_per_second", "seconds")
TINY = [
    "model.name=caformer_n4",
    "model.image_size=8",
    "model.depths=[1,1]",
    "model.dims=[16,32]",
    "data.batch_size=128",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "optim.accumulate=2",
    "drop_path.rate=0.4",
    "checkpoint={every_epochs: null, every_steps: 2, keep: 9}",
]


def test_what_is_not_sharded_stays_as_it_is() -> None:
    model = nn.Linear(3, 2)
    assert not is_sharded(model)
    assert whole(model.weight) is model.weight
    assert weights_sha256(whole_state(model)) == weights_sha256(model.state_dict())
    with gathered(model), gradients_exchanged(model, now=False):
        model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None


def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(ConfigError, match="'fsdp' shards over several processes, and there is one"):
        build_tiny("runtime.parallel=fsdp")


def test_compiling_and_sharding_are_not_combined() -> None:
    two = World(rank=0, local_rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"runtime\.compile: does not go with"):
        build_tiny("runtime.parallel=fsdp", "runtime.compile=true", world=two)


def torchrun(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def train(folder: Path, *settings: str | Path, processes: int = 2) -> dict:
    done = torchrun("--output", folder, *settings, processes=processes)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_pieces_compute_what_whole_models_do_and_resume_exactly(tmp_path: Path) -> None:
    plain = train(tmp_path / "ddp", *TINY)
    sharded = train(tmp_path / "fsdp", *TINY, "runtime.parallel=fsdp")
    assert plain["steps"] == sharded["steps"] == 6
    for a, b in zip(rows(tmp_path / "ddp"), rows(tmp_path / "fsdp"), strict=True):
        assert all(float(a[key]) == pytest.approx(float(b[key]), rel=1e-4) for key in a)
    whole_weights, gathered_weights = (
        load_file(tmp_path / kind / "best/model.safetensors") for kind in ("ddp", "fsdp")
    )
    assert whole_weights.keys() == gathered_weights.keys()
    for name, tensor in whole_weights.items():
        torch.testing.assert_close(gathered_weights[name], tensor, rtol=1e-3, atol=1e-4)

    states = [tmp_path / kind / "checkpoints/step-00000006/rank-00000.pt" for kind in ("ddp", "fsdp")]
    shared = [path.with_name("shared.pt") for path in states]
    assert shared[1].stat().st_size < shared[0].stat().st_size / 5, "what each process holds is not in the shared part"

    shutil.copytree(tmp_path / "fsdp", tmp_path / "again")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}")
    again = train(tmp_path / "again", "--resume", "auto")
    assert (again["weights_sha256"], again["ema_sha256"]) == (sharded["weights_sha256"], sharded["ema_sha256"])
    assert rows(tmp_path / "again") == rows(tmp_path / "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_foreign_models_are_sharded_too(tmp_path: Path, name: str) -> None:
    settings = [f"model={{name: {name}, image_size: 32, in_chans: 1}}", "optim.epochs=1", "optim.warmup_epochs=0",
                "data.batch_size=256", "drop_path.rate=0.3", "runtime.parallel=fsdp"]  # fmt: skip
    result = train(tmp_path / "run", *settings)
    assert result["steps"] == 2 and result["ema_sha256"]
