"""What a residual branch holds: the modules that a callable may run, and which of them take statistics of the batch.

`DropPath` needs to know it before it runs a branch on a part of the batch: a batch norm wants two samples, and a branch
that is given none must keep its statistics. A module is known by its parts. Of another callable (a bound method, a lambda,
a closure, a `functools.partial`) we read what its code can reach: variables of the closure, defaults, globals and `self`,
each followed along the attributes that the code takes of it. So of a block with two branches each method holds the
modules it names and no others. Where a variable is used in another way, all that it holds counts: too much is safe.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LOOKED_AT = 20_000
"""Objects looked at before a callable counts as one that cannot be looked into."""

_LEAVES = (str, bytes, int, float, complex, Tensor, type, types.ModuleType, types.CodeType)
_NO_CODE = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
_VARIABLES = ("FAST", "DEREF", "CLOSURE", "GLOBAL", "NAME")  # in the names of instructions that load one


def held_modules(branch: object) -> list[nn.Module] | None:
    """The modules that a callable may run, with all their parts; `None` where it cannot be looked into."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # the objects too, since an id is unique among living ones only
    todo = [branch]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen[id(value)] = value
        if len(seen) > LOOKED_AT:
            return None
        if isinstance(value, nn.Module):
            found.update((id(m), m) for m in value.modules())
            continue
        reached = _reached_from(value)
        if reached is None:
            return None
        todo += reached
    return list(found.values())


def takes_batch_statistics(module: nn.Module) -> bool:
    """Whether a module takes statistics of the batch in training: torch's batch norms and their like elsewhere.

    Such as timm's EvoNorm-B0. Frozen ones, which hold statistics but never take any, do not count.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return "running_var" in dict(module.named_buffers(recurse=False)) and not (
        instance or "Frozen" in type(module).__name__
    )


def batch_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Of some modules those that take statistics of the next batch; one in evaluation uses what it has."""
    return [
        m for m in modules if takes_batch_statistics(m) and (m.training or getattr(m, "running_mean", True) is None)
    ]


def wants_known_batch(module: nn.Module) -> bool:
    """Whether a module compiles for a known number of samples only: batch norms, and what inductor cannot lay out
    otherwise, all convolutions but ours (`layers.token_mixers.DepthwiseConv` tells more)."""
    return is_fixed_conv(module) or takes_batch_statistics(module)


def is_fixed_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that inductor compiles for a known number of samples only."""
    return isinstance(module, nn.modules.conv._ConvNd) and not getattr(module, "any_batch", False)


def masked_compiled(branch: object) -> bool:
    """Whether compiled code masks a branch, where it does not know how many samples are kept.

    The compiler sees modules, and the owner of a method; what else a callable holds it cannot say.
    """
    owner = branch if isinstance(branch, nn.Module) else getattr(branch, "__self__", None)
    return not isinstance(owner, nn.Module) or any(wants_known_batch(m) for m in owner.modules())


def samples_to_compute(kept: int, batch: int, norms: Sequence[nn.Module] | None) -> int:
    """How many samples of a batch a branch runs on: those kept, or all where its batch norms have too few.

    Args:
        kept: Samples that are kept, in [0, batch].
        batch: Samples of the batch.
        norms: Batch norms that the branch runs; `None` where nobody knows.
    """
    if kept == 1 and (norms is None or norms):
        return batch
    if kept == 0 and norms and any(map(_waits_for_others, norms)):
        return batch
    return kept


@contextmanager
def left_alone(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norms take no statistics meanwhile, neither means nor the number of batches."""
    training = [norm for norm in norms if norm.training]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True


def _waits_for_others(norm: nn.Module) -> bool:
    """Whether other processes wait for this one's samples."""
    distributed = torch.distributed
    return isinstance(norm, nn.SyncBatchNorm) and distributed.is_available() and distributed.is_initialized()


def _reached_from(value: Any) -> list[Any] | None:
    """What an object that is no module leads to; `None` for code that cannot be read."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return _reached_by_code(value.__func__, value.__self__)
    if isinstance(value, types.FunctionType):
        return _reached_by_code(value)
    if isinstance(value, _NO_CODE):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if hasattr(value, "__wrapped__"):  # functools.cache and other wrappers
        return [value.__wrapped__]
    own = [v for name in _slots(type(value)) if (v := getattr(value, name, None)) is not None]
    own += getattr(value, "__dict__", {}).values()
    if not callable(value) or _is_torchs(type(value)):
        return own
    call = type(value).__call__
    return _reached_by_code(call, value) if isinstance(call, types.FunctionType) else None


def _reached_by_code(function: Any, owner: object = None) -> list[Any]:
    """What a function's code can reach; `owner` is its first argument where that is known."""
    if not isinstance(function, types.FunctionType):  # a method that is another callable
        return [function, owner]
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    reached = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if hasattr(function, "__wrapped__"):
        reached.append(function.__wrapped__)
    if _is_torchs(function):  # torch's own code runs what it is given
        return [*reached, owner, *(cell.cell_contents for cell in cells.values())]
    known: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            known[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if owner is not None and function.__code__.co_argcount:
        known[function.__code__.co_varnames[0]] = owner
    elif owner is not None:  # def forward(*args)
        reached.append(owner)
    for name, attributes in _loads(function.__code__):
        value = known[name] if name in known else function.__globals__.get(name)
        for attribute in attributes:
            try:
                value = getattr(value, attribute)
            except Exception:  # then it may be any part of what we have so far
                break
        reached.append(value)
    return reached


@functools.lru_cache(maxsize=1024)
def _loads(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Variables that code reads, with the attributes it takes of them at once: `self.a.b(x)` -> ("self", ("a", "b"))."""
    instructions = list(dis.get_instructions(code))
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for i, instruction in enumerate(instructions):
        if not any(kind in instruction.opname for kind in _VARIABLES):
            continue
        *first, last = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        chain = []
        for following in instructions[i + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(following.argval)
        found.update({(name, ()): None for name in first})
        found[last, tuple(chain)] = None
    for constant in code.co_consts:  # functions and comprehensions inside
        if inspect.iscode(constant):
            found.update(dict.fromkeys(_loads(constant)))
    return tuple(found)


def _is_torchs(definition: Any) -> bool:
    return str(getattr(definition, "__module__", "")).partition(".")[0] == "torch"


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
