"""World: the same answers in one process and in several, and every wrong environment or device said in words."""

import inspect
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from files.errors import ConfigError
from training.distributed import World, close_world, init_world, leave_words_to_main

ROOT = Path(__file__).parents[2]
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def torchrun(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a script in `folder` as two processes of torchrun on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    file = folder / "script.py"
    file.write_text(inspect.getsource(check) + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *address, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def check(world) -> None:
    """What World says for given inputs of each rank; run by one process here and, as source, by two under torchrun."""
    import torch

    other = world.size - 1
    assert world.is_main == (world.rank == 0)
    values = torch.arange(3, dtype=torch.float32, device=world.device) + world.rank
    summed = world.sum(values)
    assert summed.dtype == torch.float64 and summed.device == world.device
    assert summed.tolist() == [i * world.size + sum(range(world.size)) for i in range(3)]
    assert values.tolist() == [i + world.rank for i in range(3)]  # the input is untouched
    # float32 would lose the 1 beside 2**24
    assert world.sum(torch.tensor([2**24 + 1, 7])).tolist() == [(2**24 + 1) * world.size, 7 * world.size]
    assert world.sum(torch.tensor(2.0, requires_grad=True)).requires_grad is False
    for ask in (world.any, world.barrier):
        assert ask(False) is False
        assert ask(True) is True
        assert ask(world.rank == other) is True  # one process is enough
    assert world.barrier() is False


def test_a_single_process_needs_no_group():
    world = init_world("cpu")
    assert world == World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    assert not dist.is_initialized()
    check(world)
    close_world(world)


def test_world_size_one_under_torchrun_is_a_single_process(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert init_world("cpu").size == 1 and not dist.is_initialized()


def test_two_processes_on_gloo_and_a_checkpoint_they_share(tmp_path):
    script = """
from pathlib import Path
import numpy
import torch.distributed as dist
from training.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint
from training.distributed import close_world, init_world

world = init_world("cpu")
assert world.size == world.local_size == 2 and world.rank == world.local_rank and dist.get_backend() == "gloo"
check(world)
folder = Path() / "checkpoints"

def save(step, rank_state):
    return save_checkpoint(folder, step, shared={"step": step}, rank_state=rank_state, keep=1,
                           rank=world.rank, world_size=world.size, barrier=world.barrier)

for step in range(1, 6):
    save(step, {"rank": world.rank})

# a thread that meets the others beside training, in whatever order, takes none of training's messages
import threading, time, torch
from torch import nn
from training.distributed import data_parallel

apart, seen = world.apart(), []

def meet():
    for number in range(12):
        time.sleep(0.002 * (number % 3) * world.rank)
        seen.append(apart.sum(torch.tensor(float(number))).item())

thread = threading.Thread(target=meet)
thread.start()
for number in range(12):
    assert world.sum(torch.tensor(1000.0 + number)).item() == 2 * (1000 + number)
thread.join()
assert seen == [2.0 * number for number in range(12)]
tensors = [torch.full((2,), float(world.rank)), torch.tensor(7 + world.rank)]
world.share(tensors)
assert tensors[0].tolist() == [0.0, 0.0] and tensors[1].item() == 7

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
model[0].bias.requires_grad_(False)
before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
wrapped = data_parallel(model, world)
assert all(map(torch.equal, model.parameters(), before)) and torch.equal(torch.get_rng_state(), state)
assert all(p.grad is None for p in model.parameters()) and "forward" not in vars(model)
wrapped(torch.full((1, 3), 1.0 + world.rank)).sum().backward()
assert wrapped.reducer._rebuild_buckets() is False, "they are settled"
gradient = model[0].weight.grad.clone()
model.zero_grad()
sum(model(torch.full((1, 3), 1.0 + rank)).sum() / 2 for rank in range(2)).backward()
torch.testing.assert_close(gradient, model[0].weight.grad)
try:
    save(6, {"bad": numpy.float64(1)} if world.rank == 1 else {})
    raise SystemExit("rank 1 wrote what cannot be read")
except CheckpointError as error:
    assert ("another rank failed" in str(error)) == (world.rank == 0), error
world.barrier()  # rank 0 is the one that cleans up
loaded = latest_checkpoint(folder, rank=world.rank, world_size=world.size)
assert loaded.step == 5 and loaded.rank_state == {"rank": world.rank}
assert [entry.name for entry in folder.iterdir()] == ["step-00000005"]
world.barrier()
close_world(world)
assert not dist.is_initialized()
(Path() / f"done-{world.rank}").touch()
"""
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    world = init_world("auto")
    assert world.device == torch.device("cuda", 0) and torch.cuda.current_device() == 0
    check(world)
    assert init_world("cuda").device == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="is not there"):
        init_world(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_on_nccl(tmp_path):
    script = "\nfrom training.distributed import close_world, init_world\n"
    script += "world = init_world()\nassert world.device.index == world.local_rank\ncheck(world)\nclose_world(world)\n"
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- devices ----------------------------------------------------------------------------------------------------


def machine(monkeypatch, *, gpus: int = 0, mps: bool = False) -> None:
    """Pretends to be on a machine with these devices; nothing is put on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def torchrun_sets(monkeypatch, *, rank: int, size: int, local_rank: int | None = None) -> list:
    """Sets the environment of one process among several; returns the calls that would join the group."""
    local_rank = rank if local_rank is None else local_rank
    values = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    calls: list = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


@pytest.mark.parametrize(
    "gpus, mps, device, picked",
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "mps"),
        (2, True, "auto", "cuda:0"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
    ],
)
def test_device_of_a_single_process(monkeypatch, gpus, mps, device, picked):
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert init_world(device).device == torch.device(picked)


@pytest.mark.parametrize(
    "gpus, device, message",
    [
        (0, "cuda", r"'cuda' is not there; this machine has: cpu$"),
        (0, "cuda:0", r"'cuda:0' is not there"),
        (0, "mps", r"'mps' is not there"),
        (2, "cuda:2", r"'cuda:2' is not there; this machine has: cpu, cuda:0, cuda:1$"),
        (2, "cuda:-1", r"must be auto, cpu, cuda, cuda:N or mps"),
        (2, "cuda:", r"must be auto"),
        (2, "cuad", r"'cuad': must be .*; did you mean 'cuda'"),
        (2, "cpu:0", r"must be auto"),
        (2, "", r"must be auto"),
    ],
)
def test_device_that_is_not_there(monkeypatch, gpus, device, message):
    machine(monkeypatch, gpus=gpus)
    with pytest.raises(ConfigError, match=message):
        init_world(device)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_local_rank_gets_its_own_gpu(monkeypatch, device):
    machine(monkeypatch, gpus=2)
    calls = torchrun_sets(monkeypatch, rank=1, size=2)
    world = init_world(device)
    assert world == World(rank=1, local_rank=1, size=2, device=torch.device("cuda", 1))
    assert not world.is_main
    assert calls[0][0] == ("nccl",)
    assert calls[0][1]["device_id"] == world.device and calls[0][1]["timeout"].total_seconds() == 600


def test_several_processes_on_a_mac_use_the_cpu(monkeypatch):
    machine(monkeypatch, mps=True)
    calls = torchrun_sets(monkeypatch, rank=0, size=2)
    assert init_world("auto").device == torch.device("cpu")
    assert calls[0][0] == ("gloo",)


@pytest.mark.parametrize(
    "rank", [0, 1]
)  # the rank that would find a GPU fails as well, and does not wait for the other
def test_fewer_gpus_than_local_ranks(monkeypatch, rank):
    machine(monkeypatch, gpus=1)
    calls = torchrun_sets(monkeypatch, rank=rank, size=2)
    with pytest.raises(ConfigError, match=r"2 processes on this machine need a GPU each; it has: cpu, cuda:0\n"):
        init_world("auto")
    assert not calls


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_one_device_cannot_be_shared(monkeypatch, device):
    machine(monkeypatch, gpus=1, mps=True)
    torchrun_sets(monkeypatch, rank=0, size=2)
    with pytest.raises(ConfigError, match="cannot be shared by 2 processes"):
        init_world(device)


@pytest.mark.parametrize("rank, said", [(0, ["note", "careful", "failed"]), (1, ["failed"])])
def test_loggers_of_the_other_processes_tell_errors_alone(monkeypatch, caplog, rank, said):
    torchrun_sets(monkeypatch, rank=rank, size=2)
    loggers = {name: logging.getLogger(name) for name in ("models", "training", "others")}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.INFO)
        leave_words_to_main()
        for logger in (logging.getLogger("training.data.images"), logging.getLogger("models.factory")):
            caplog.clear()
            logger.info("note")
            logger.warning("careful")
            logger.error("failed")
            assert caplog.messages == said
        caplog.clear()
        loggers["others"].warning("of theirs")
        assert caplog.messages == ["of theirs"]
    finally:
        logging.disable(logging.NOTSET)
        for name, level in before.items():
            loggers[name].setLevel(level)


# ---- the environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE='two': must be an integer, at least 1"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is set but RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK='2': must be an integer, 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, r"RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"LOCAL_RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, r"LOCAL_WORLD_SIZE='1'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, r"rank 1 of 2 cannot join the others at None:None"),
    ],
)
def test_a_wrong_environment(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_world("cpu")
