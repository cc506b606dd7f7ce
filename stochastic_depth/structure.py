"""What two modules have in common when they compute alike: a key for what was proven of one and is said of the other."""

import functools
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from layers.rates import as_number
from stochastic_depth.places import ATTRIBUTE

DEEPEST = 4  # containers and objects in one another, from a module's attribute on

OF_ANY_MODULE = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Classes, plain attributes and hooks of all parts of a module, and shapes of its parameters and buffers.

    Attributes are compared by value: what a block does may hang on a flag. Drop-path modules and rates are left out.
    """
    parts = [
        (name, type(m), m.extra_repr(), _attributes(vars(m), 0))
        for name, m in module.named_modules()
        if not isinstance(m, DropPath)
    ]
    shapes = [
        (name, tuple(t.shape)) for named in (module.named_parameters(), module.named_buffers()) for name, t in named
    ]
    return tuple(parts), tuple(shapes)


def outline(module: nn.Module) -> tuple[Any, ...]:
    """Classes of all parts of a module and shapes of its parameters: likely, not certain, to compute alike."""
    parts = tuple((name, type(m)) for name, m in module.named_modules())
    return parts, tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _attributes(values: Mapping[str, Any], depth: int) -> tuple[Any, ...]:
    """What `described` says of attributes, but for what every module has and for drop-path rates."""
    return tuple(
        (key, described(value, depth))
        for key, value in values.items()
        if key not in OF_ANY_MODULE and not (ATTRIBUTE.search(key) and as_number(value) is not None)
    )


def described(value: Any, depth: int = 0) -> Any:
    """A key that is equal for values that code is likely to treat alike.

    Numbers, texts, enums and classes go by value, functions by their code and what it closes over, containers and plain
    objects by what they hold (down to `DEEPEST`), tensors by shape (of one number: by value), modules by class.
    """
    kind = type(value)
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        return kind, repr(value.item())
    if value is None or isinstance(value, (type, types.BuiltinFunctionType, torch.dtype, torch.device)):
        return value
    if isinstance(value, (bool, str, bytes, Enum)):
        return kind, str(value) if isinstance(value, Enum) else value
    if (number := as_number(value)) is not None:
        return kind, repr(number)  # not the number: NaN equals nothing
    if isinstance(value, nn.Module):
        return kind, value.extra_repr()
    shape = getattr(value, "shape", None)
    if isinstance(value, Tensor) or (isinstance(shape, tuple) and hasattr(value, "dtype")):
        return kind, tuple(value.shape)
    if depth == DEEPEST:
        return kind
    deeper = depth + 1
    if isinstance(value, types.MethodType):
        return kind, described(value.__func__, deeper), type(value.__self__)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return value.__code__, described([cells, value.__defaults__, value.__kwdefaults__], deeper)
    if isinstance(value, functools.partial):
        return kind, described([value.func, value.args, value.keywords], deeper)
    if isinstance(value, Mapping):
        return kind, tuple((described(k, deeper), described(v, deeper)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return kind, tuple(described(v, deeper) for v in value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(described(v, deeper) for v in value)
    return kind, _attributes(vars(value), deeper) if hasattr(value, "__dict__") else ()


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False
