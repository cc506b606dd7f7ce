"""Multiply-accumulates of a model and of each residual branch, counted on the meta device."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from layers.drop_path import Branch, DropPath
from stochastic_depth.blocks import Block, check_input_size, model_input_size, unwrap
from stochastic_depth.graft import GraftedDropPath
from stochastic_depth.places import Owner, block_names, find_owners


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one sample's forward pass, counted by torch.utils.flop_counter."""

    total: float
    branches: dict[int, float]  # by id of the DropPath that adds the branch
    users: dict[int, int] = field(default_factory=dict)  # by id of a DropPath that serves several blocks: how many
    around: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by id of a DropPath in others' branches: those

    def branch(self, module: DropPath) -> float:
        """Of the branches that one DropPath adds in a block; of one that serves several blocks, an equal part. What
        other drop-path modules add inside these branches is theirs."""
        return self.branches.get(id(module), 0.0) / self.users.get(id(module), 1)

    def block(self, block: Block) -> float:
        """Of all branches of a block."""
        return sum(self.branch(m) for m in block.drop_paths.values())


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Puts meta tensors in the places of parameters and buffers for a while.

    Not `torch.func.functional_call`, which leaves its tensors behind in modules that a model holds in several places.
    """
    stores = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    own = [(store, key, value) for store in stores for key, value in store.items() if value is not None]
    try:
        for store, key, value in own:
            store[key] = value.detach().to("meta")  # type: ignore[assignment]
        yield
    finally:
        for store, key, value in own:
            store[key] = value  # type: ignore[assignment]


class _BranchCounts:
    """Compute of each branch of one forward pass, by id of the DropPath that adds it.

    Attributes:
        branches: Multiply-accumulates by id.
        around: By id of a DropPath of ours that runs in branches of others, the ids of these.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.branches: dict[int, float] = {}
        self.around: dict[int, tuple[int, ...]] = {}
        self.open: list[int] = []  # ids of the DropPaths of whose branches one runs now
        self._started: dict[int, float] = {}  # by id: the count where a block or branch began at the latest

    @property
    def macs(self) -> float:
        """Multiply-accumulates so far."""
        return self.counter.get_total_flops() / 2

    @property
    def unclaimed(self) -> float:
        """Those that no branch has got so far."""
        return self.macs - sum(self.branches.values())

    def add(self, module: nn.Module, macs: float) -> None:
        """Adds to the branches of one DropPath."""
        self.branches[id(module)] = self.branches.get(id(module), 0.0) + macs

    def watch(self, owner: Owner) -> list[RemovableHandle]:
        """Hooks that count the branches of a foreign block."""
        slots = [m for m in owner.slots.values() if isinstance(m, GraftedDropPath) and m.applied]
        if not slots or owner.beside:  # whose compute is another module's
            return []
        handles = [self._begin(owner.module, owner.module)]
        if any(slot.role in ("block", "silent") for slot in slots):
            return [*handles, owner.module.register_forward_hook(lambda *_: self._end_block(owner.module, slots))]
        for slot in slots:
            alone = any(entry.alone for entry in slot.begins)
            for entry in slot.begins:
                first = owner.module.get_submodule(entry.part)
                handles.append(self._begin(first, slot))
                if entry.alone:
                    handles.append(first.register_forward_hook(lambda *_, s=slot: self._end_branch(owner.module, s)))
            end = self._restart if alone else self._end_branch
            handles.append(slot.register_forward_pre_hook(lambda *_, s=slot, end=end: end(owner.module, s)))
        return handles

    def _begin(self, part: nn.Module, key: nn.Module) -> RemovableHandle:
        return part.register_forward_pre_hook(lambda *_: self._started.update({id(key): self.macs}))

    def _end_block(self, block: nn.Module, slots: Sequence[nn.Module]) -> None:
        for slot in slots:
            self.add(slot, (self.macs - self._started[id(block)]) / len(slots))

    def _end_branch(self, block: nn.Module, slot: nn.Module) -> None:
        self.add(slot, self.macs - self._started.pop(id(slot), self._started[id(block)]))
        self._restart(block, slot)

    def _restart(self, block: nn.Module, _slot: nn.Module) -> None:
        self._started[id(block)] = self.macs  # the next branch begins here at the earliest


def count_macs(model: nn.Module, input_size: Sequence[int] | None = None) -> Macs:
    """Counts the compute of each residual branch, without computing: on the meta device.

    In our blocks a branch is what `DropPath.residual` is given; in a foreign block what runs between the beginning of the
    branch, where `set_drop_path` found it (else the drop-path module before, or the block's beginning), and its drop-path
    module. Of a block that is skipped as a whole each drop-path module has an equal share.

    Args:
        model: Ours, or a foreign one after `set_drop_path`.
        input_size: (C, H, W); default the model's `pretrained_cfg["input_size"]`.

    Raises:
        ValueError: No input size is known, or the model does not run on the meta device.
    """
    model = unwrap(model)
    check_input_size(input_size)
    input_size = input_size or model_input_size(model)
    if input_size is None:
        raise ValueError("counting compute needs input_size=(C, H, W), which this model does not tell")
    modules = [m for m in model.modules() if isinstance(m, DropPath)]
    counter = FlopCounterMode(display=False)
    counts = _BranchCounts(counter)

    def counting(module: DropPath) -> Callable[..., Tensor]:
        def residual(x: Tensor, branch: Branch, shortcut: Tensor | None = None) -> Tensor:
            before = counts.unclaimed
            if counts.open:
                counts.around[id(module)] = tuple(counts.open)
            counts.open.append(id(module))
            out = branch(x)
            counts.open.pop()
            counts.add(module, counts.unclaimed - before)
            return (x if shortcut is None else shortcut) + out

        return residual

    handles = [handle for owner in find_owners(model) for handle in counts.watch(owner)]
    training = {module: module.training for module in model.modules()}  # parts may be frozen in eval
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    model.eval()
    try:
        for module in modules:
            module.residual = counting(module)  # an instance attribute hides the method while we count
        with torch.no_grad(), _on_meta(model), counter:
            model(torch.empty(1, *input_size, device="meta", dtype=dtype))
    except Exception as error:  # the model's own code may not work on the meta device, or not at that size
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"counting compute at {tuple(input_size)} failed: {type(error).__name__}: {first}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.__dict__.pop("residual", None)
        for module, flag in training.items():
            module.training = flag
    return Macs(counts.macs, counts.branches, _users(model), counts.around)


def _users(model: nn.Module) -> dict[int, int]:
    """By id of each drop-path module, in how many blocks it stands."""
    owners = find_owners(model)
    places = {
        (name, id(slot))
        for name, owner in zip(block_names(owners), owners, strict=True)
        for slot in owner.slots.values()
    }
    return Counter(number for _, number in places)
