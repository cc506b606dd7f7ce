"""The processes of one run: who this one is, its device, and the few things they agree on.

Everything works the same in a single process, where there is no process group and nothing is sent.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from files.errors import ConfigError, nearest
from files.notices import is_main_process
from training.data.dataset import ReadError


@dataclass(frozen=True)
class World:
    """This process among the processes of the run.

    Attributes:
        rank: 0 .. size - 1, over all machines.
        local_rank: Rank on this machine; the index of the GPU it uses.
        size: Number of processes.
        device: Where this process computes.
        local_size: Number of processes on this machine.
        group: The process group they meet in; None: torch's default one.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = field(default=1, compare=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def barrier(self, failed: bool = False) -> bool:
        """Waits for all processes; returns whether any of them passed True, so that a failure is known to all."""
        return self.any(failed)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process, by one all-reduce of a number. Every process must call it."""
        if self.size == 1:
            return flag
        return self._reduce(torch.tensor(float(flag)), dist.ReduceOp.MAX).item() > 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes in float64: a new tensor on this world's device (on the CPU for MPS, without float64)."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every process the main one's values of these, in place. Every process must call it."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def apart(self) -> "World":
        """The same processes in a group of their own on the CPU, for a thread that works beside training.

        Two threads that met in one group would take each other's messages. Every process must call it.
        """
        if self.size == 1:
            return self
        return replace(self, device=torch.device("cpu"), group=dist.new_group(backend="gloo"))

    def _reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        values = values.detach().to(device, torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(values, operation, group=self.group)
        return values


ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def leave_words_to_main() -> None:
    """Keeps the project's loggers quiet on all processes but the main one, whose words would be the same.

    Called first of all, since it asks the environment as `init_world` does. Errors are told by whoever has them.
    """
    if not is_main_process():
        logging.disable(logging.INFO)
        for ours in ("models", "training"):
            logging.getLogger(ours).setLevel(logging.ERROR)


def init_world(device: str = "auto", *, timeout: timedelta = timedelta(minutes=10)) -> World:
    """Joins the processes that torchrun started, or stands alone when it did not.

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:N" or "mps". With several processes "cuda" is
            the GPU of the local rank, and neither "cuda:N" nor "mps" makes sense.
        timeout: How long a process waits for the others before it fails.

    Raises:
        ConfigError: When the device is not there, or the environment is not what torchrun sets.
    """
    size = _from_environment("WORLD_SIZE", default=1, low=1)
    if size == 1:
        picked = _pick_device(device, local_rank=0, local_size=1, size=1)
        world = World(rank=0, local_rank=0, size=1, device=picked)
    else:
        rank = _from_environment("RANK", high=size - 1)
        local_rank = _from_environment("LOCAL_RANK", high=size - 1)
        local_size = _from_environment("LOCAL_WORLD_SIZE", default=local_rank + 1, low=local_rank + 1)
        picked = _pick_device(device, local_rank=local_rank, local_size=local_size, size=size)
        world = World(rank=rank, local_rank=local_rank, size=size, device=picked, local_size=local_size)
    on_cuda = world.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(world.device)
    if size > 1:
        try:
            dist.init_process_group(
                "nccl" if on_cuda else "gloo", timeout=timeout, device_id=world.device if on_cuda else None
            )
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(f"rank {world.rank} of {size} cannot join the others at {address}: {error}") from error
    return world


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model such that its gradients are averaged over processes; as it is where there is one process.

    After its first pass, DDP puts parameters into buckets in the order in which their gradients came, and rounding of a sum
    over three or more processes depends on where in a bucket a number lies. A run that goes on would have the first order
    for a step for which the uninterrupted one has the second; so that order is brought about here, by a pass that computes
    nothing but sums of parameters.
    """
    if world.size == 1 or isinstance(model, FSDPModule):  # which does it by itself
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    before = vars(model).get("forward")  # a model may have one of its own beside its class's
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # what `model.compile()` would call instead
    try:
        model.forward = lambda _: torch.stack([p.float().sum() for p in model.parameters() if p.requires_grad]).sum()
        wrapped(torch.zeros(1)).backward()
    finally:
        model._compiled_call_impl = compiled
        if before is None:
            del model.forward
        else:
            model.forward = before
    model.zero_grad(set_to_none=True)
    return wrapped


def close_world(world: World) -> None:
    """Leaves the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _pick_device(device: str, *, local_rank: int, local_size: int, size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus)), *(["mps"] if mps else [])])
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps and size == 1 else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in device and not (kind == "cuda" and index.isdecimal())):
        hint = nearest(kind, ("auto", "cpu", "cuda", "mps"))
        raise ConfigError(f"device {device!r}: must be auto, cpu, cuda, cuda:N or mps{hint}")
    if (kind == "cuda" and not gpus) or (kind == "mps" and not mps) or (index and int(index) >= gpus):
        raise ConfigError(f"device {device!r} is not there; this machine has: {here}")
    if size > 1 and (index or kind == "mps"):
        raise ConfigError(f"device {device!r} cannot be shared by {size} processes; give cuda, cpu or auto")
    if kind != "cuda":
        return torch.device(kind)
    if local_size > gpus:
        raise ConfigError(
            f"{local_size} processes on this machine need a GPU each; it has: {here}\n"
            f"start {gpus} (torchrun --nproc-per-node {gpus}), or give runtime.device=cpu"
        )
    return torch.device("cuda", int(index) if index else local_rank)


def _from_environment(name: str, *, default: int | None = None, low: int = 0, high: int | None = None) -> int:
    """An integer that torchrun puts into the environment."""
    text = os.environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise ConfigError(f"WORLD_SIZE is set but {name} is not; start several processes with torchrun")
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"environment variable {name}={text!r}: must be an integer, {allowed}; torchrun sets it")
    return int(text)


def stop_together(world: World, problem: ReadError | None) -> None:
    """Raises on every process what one of them could not read, so that none is left waiting for another."""
    if world.any(problem is not None):
        raise problem or ReadError("stopped, because another process could not read its data")
