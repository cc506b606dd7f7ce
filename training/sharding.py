"""Fully sharded data parallel, torch's FSDP2: each process holds a piece of the weights, gradients and optimizer state.

A block is gathered when it runs and let go afterwards. Each process saves its own pieces in its part of a checkpoint;
what is shared (best/, exports, hashes) is gathered whole.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from files.errors import ConfigError

_PIECE = "piece_of_a_sharded_tensor"


def shard(model: nn.Module, blocks: Sequence[str]) -> None:
    """Shards a model in place over all processes, block by block; what is in no block is one more group.

    Args:
        model: On its device, with equal weights on every process.
        blocks: Names of its residual blocks, each of which is gathered when it runs.

    Raises:
        ConfigError: torch cannot shard it.
    """
    inner = [model.get_submodule(name) for name in blocks if name]
    try:
        for block in {id(block): block for block in inner if isinstance(block, nn.Module)}.values():
            fully_shard(block)
        fully_shard(model)
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"runtime.parallel: 'fsdp' cannot shard {type(model).__name__}: {first}; use ddp") from None


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Holds the whole model on every process for a while, so that they may run it a different number of times.

    Every process enters and leaves it; a model that is not sharded stays as it is.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(group is not model, recurse=False)  # as `fully_shard` sets it


@contextlib.contextmanager
def gradients_exchanged(trained: nn.Module, *, now: bool) -> Iterator[None]:
    """Around a forward and backward pass: whether gradients go to the other processes with it or with a later one."""
    if isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(now)
    waiting = isinstance(trained, DistributedDataParallel) and not now
    with trained.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its pieces; every process calls it. One that is whole is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict gathered from the pieces; every process calls it."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


class Pieces:
    """What a process saves of a sharded model or optimizer: its own pieces, as plain tensors.

    Args:
        inner: The model or the optimizer.
        model: The model, which tells how things are spread.
    """

    def __init__(self, inner: nn.Module | torch.optim.Optimizer, model: nn.Module) -> None:
        self.inner = inner
        self.mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))

    def state_dict(self) -> dict[str, Any]:
        return tree_map_only(DTensor, _to_piece, self.inner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the pieces back.

        Raises:
            ValueError: They were saved by another number of processes.
        """
        self.inner.load_state_dict(_from_pieces(state, self.mesh))


def _to_piece(tensor: DTensor) -> dict[str, Any]:
    (placement,) = tensor.placements
    return {
        _PIECE: tensor.to_local(),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "shard_dim": placement.dim if isinstance(placement, Shard) else None,
        "processes": tensor.device_mesh.size(),
    }


def _from_pieces(state: Any, mesh: DeviceMesh) -> Any:
    if isinstance(state, dict) and _PIECE in state:
        if state["processes"] != mesh.size():
            raise ValueError(
                f"it is sharded over {state['processes']} processes and this run has {mesh.size()}; "
                f"go on with {state['processes']}, or start from its best/ (model.checkpoint)"
            )
        placement = Replicate() if state["shard_dim"] is None else Shard(state["shard_dim"])
        return DTensor.from_local(
            state[_PIECE].to(mesh.device_type),
            mesh,
            [placement],
            run_check=False,
            shape=torch.Size(state["shape"]),
            stride=tuple(state["stride"]),
        )
    if isinstance(state, dict):
        return type(state)((key, _from_pieces(value, mesh)) for key, value in state.items())
    if isinstance(state, list):
        return [_from_pieces(value, mesh) for value in state]
    return state
