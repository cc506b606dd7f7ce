"""Where other people's models drop paths: the one file that knows foreign classes."""

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layers.branches import held_modules
from layers.drop_path import DropPath
from stochastic_depth.law import drop_law

# Classes (or their bases) as timm's DropPath, transformers' ConvNextDropPath and torchvision's StochasticDepth.
CLASS_NAME = re.compile(r"(drop_?path|stochastic_?depth)_?(v?\d+d?)?$", re.IGNORECASE)

ATTRIBUTE = re.compile(r"drop_?path|path_?drop|stochastic_?depth", re.IGNORECASE)
PLACE = re.compile(r"(drop_?path|stochastic_?depth)_?\d*", re.IGNORECASE)

# Attributes that may hold `None` at rate 0. Not numbered ones: timm's DaViT has no branch where drop_path2 is None.
OPTIONAL = ("drop_path", "stochastic_depth")

# Containers of what shares the rate of the block around it: branches side by side (timm's parallel ViT), and the
# transformer inside a MobileViT block.
NESTED = ("attns", "ffns", "transformer")

# Blocks that update the class token alone (CaiT, XCiT, VOLO). Their authors never drop them, so they count as no block.
CLASS_ATTENTION = ("LayerScaleBlockClassAttn", "ClassAttentionBlock", "ClassBlock")

# Residual blocks without a place for stochastic depth: by module and class, the last module of each branch, and the
# attribute that says whether there is a shortcut ("": always).
BRANCH_ENDS: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("torchvision.models.resnet", "BasicBlock"): (("bn2",), ""),
    ("torchvision.models.resnet", "Bottleneck"): (("bn3",), ""),
    ("torchvision.models.regnet", "ResBottleneckBlock"): (("f",), ""),
    ("torchvision.models.vision_transformer", "EncoderBlock"): (("dropout", "mlp"), ""),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): (("conv",), "use_res_connect"),
    ("torchvision.models.mobilenetv3", "InvertedResidual"): (("block",), "use_res_connect"),
    ("torchvision.models.mnasnet", "_InvertedResidual"): (("layers",), "apply_residual"),
    # timm's own place drops the block's input there: see MISPLACED
    ("timm.models.resnest", "ResNestBottleneck"): (("bn3",), ""),
}

MISPLACED = ("ResNestBottleneck",)
"""Classes whose own forward applies drop path to something else than a branch (timm 1.0.31)."""


@dataclass
class Owner:
    """A module that holds drop-path modules.

    Attributes:
        slots: What stands under each attribute (`drop_paths.0` in a list).
        beside: Name of the block that a model's own list of drop-path modules has one element for; else empty.
    """

    name: str
    module: nn.Module
    slots: dict[str, nn.Module | None]
    beside: str = ""


def find_owners(model: nn.Module) -> list[Owner]:
    """Modules with a drop-path module, or a place for one, in order of registration."""
    owners = []
    listed: set[nn.Module] = set()  # lists of drop-path modules: their slots are those of the module around them
    for name, module in model.named_modules():
        if type(module).__name__ in CLASS_ATTENTION or module in listed:
            continue
        # without the part that torch.compile puts into the name: names tell blocks and stages apart
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        slots: dict[str, nn.Module | None] = {}
        for key, child in module.named_children():
            if elements := _listed_slots(key, child):
                listed.add(child)
                if _one_for_each_block(name, module, child):
                    owners += [Owner(name, module, {i: e}, f"{name}.{i}".lstrip(".")) for i, e in elements.items()]
                else:
                    slots |= elements
            elif is_slot(key, child):
                slots[key] = child
        for key, value in (*vars(module).items(), *module._modules.items()):
            if value is None and key in OPTIONAL:  # timm's ResNet at rate 0
                slots[key] = None
        if ends := branch_ends(module):
            slots = {f"drop_path_{end}": getattr(module, f"drop_path_{end}", None) for end in ends}
        if slots:
            owners.append(Owner(name, module, slots))
    return owners


def _listed_slots(key: str, module: nn.Module) -> dict[str, nn.Module | None]:
    """The drop-path modules in a list (or dict, or sequence) of such by name; empty if it is none."""
    if not ATTRIBUTE.search(key) or not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return {}
    elements = dict(module.named_children())
    if isinstance(module, nn.Sequential):  # may be a branch's end: dropout and drop path
        known = {i: e for i, e in elements.items() if isinstance(e, DropPath) or named_drop_path(e)}
        elements = known or {i: e for i, e in elements.items() if is_identity(e)}
    elif not all(is_slot(key, element) for element in elements.values()):
        return {}
    return {f"{key}.{i}": element for i, element in elements.items()}


def _one_for_each_block(name: str, module: nn.Module, drop_paths: nn.Module) -> bool:
    """Whether a list of drop-path modules stands beside a model's list of blocks, and not inside a block."""
    count = len(list(drop_paths.children()))
    lists = (child for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential, nn.ModuleDict)))
    blocks = any(child is not drop_paths and len(child) == count and [*child.parameters()] for child in lists)
    return count > 1 and blocks and not any(part.isdigit() for part in name.split("."))


def is_slot(key: str, module: nn.Module) -> bool:
    """Whether a module under the attribute `key` is, or stands for, a drop-path module; whether we know it is left open.

    What holds drop-path modules of its own is none: these are found in it.
    """
    if isinstance(module, DropPath):
        return True
    if not ATTRIBUTE.search(key) and not named_drop_path(module):
        return False
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not len(module):
        return False
    inner = [(name.rpartition(".")[2], m) for name, m in module.named_modules() if name]
    if any(named_drop_path(m) or ATTRIBUTE.search(attribute) for attribute, m in inner):
        return False
    # a class called like stochastic depth that has both parts and parameters is a whole block
    leaf = not inner or next(module.parameters(), None) is None
    return bool(ATTRIBUTE.search(key)) or (named_drop_path(module) and leaf)


def named_drop_path(module: nn.Module) -> bool:
    """Whether a module's class, or one that it derives from, is called like one of stochastic depth."""
    return any(CLASS_NAME.search(cls.__name__) for cls in type(module).__mro__)


def is_identity(module: nn.Module | None) -> bool:
    """Whether this stands for rate 0: nothing, an identity, or an empty sequence."""
    return module is None or isinstance(module, nn.Identity) or (type(module) is nn.Sequential and not len(module))


def branch_ends(module: nn.Module) -> tuple[str, ...]:
    """Names of the last modules of a block's branches, where the block has no (good) place for stochastic depth."""
    ends, shortcut = BRANCH_ENDS.get((type(module).__module__, type(module).__name__), ((), ""))
    return ends if not shortcut or getattr(module, shortcut) else ()


def block_names(owners: Sequence[Owner]) -> list[str]:
    """For each owner the name of the residual block it belongs to: owners of one block share a drop-path rate.

    A block is named by its last index, that of parts which share its rate (`NESTED`) left out; owners of different
    classes that sit in one indexed container (timm's DaViT) are one block.
    """
    names = []
    for owner in owners:
        if owner.beside:
            names.append(owner.beside)
            continue
        parts = owner.name.split(".")
        for i, part in enumerate(parts):
            if part in NESTED:
                parts = parts[:i]
                break
        while len(parts) > 1 and not parts[-1].isdigit():
            parts.pop()
        names.append(".".join(parts) if parts[-1].isdigit() else owner.name)
    classes: dict[str, list[str]] = {}
    for name, owner in zip(names, owners, strict=True):
        classes.setdefault(name.rpartition(".")[0], []).append(type(owner.module).__name__)
    merged = []
    for name in names:
        parent = name.rpartition(".")[0]
        kinds = classes[parent]
        one = parent.rpartition(".")[2].isdigit() and len(kinds) > 1 and len(set(kinds)) == len(kinds)
        merged.append(parent if one else name)
    return merged


def class_attention_blocks(model: nn.Module) -> int:
    """Number of blocks that are left alone since they update the class token only (`CLASS_ATTENTION`)."""
    return sum(type(module).__name__ in CLASS_ATTENTION for module in model.modules())


def is_foreign(model: nn.Module) -> bool:
    """Whether a model has places for stochastic depth that are not ours."""
    return any(not isinstance(child, DropPath) for owner in find_owners(model) for child in owner.slots.values())


def misplaced(owner: Owner) -> bool:
    """Whether a block's own drop path is at work and drops something else than a branch."""
    return type(owner.module).__name__ in MISPLACED and isinstance(getattr(owner.module, "drop_path", None), nn.Module)


def foreign_rate(module: nn.Module | None) -> float:
    """The rate of a drop-path module, timm's, torchvision's or another's; 0 for an identity or nothing.

    Raises:
        ValueError: It is not known what the module does.
    """
    if is_identity(module):
        return 0.0
    if isinstance(module, DropPath):
        return module.drop_prob
    assert module is not None
    if (law := drop_law(module)) is None:
        raise ValueError(f"{type(module).__name__} is not known to drop whole samples")
    return law.rate(module)


def unknown_modules(model: nn.Module) -> dict[str, str]:
    """What stands in places for stochastic depth and is neither known nor an identity: by name, what it is."""
    unknown: dict[str, str] = {}
    for owner in find_owners(model):
        for key, child in owner.slots.items():
            if child is not None and not isinstance(child, DropPath) and not is_identity(child) and not drop_law(child):
                unknown[f"{owner.name}.{key}".lstrip(".")] = type(child).__name__
    return unknown | functions(model)


def functions(model: nn.Module) -> dict[str, str]:
    """Functions and other callables without parts in places for stochastic depth: by name, what it is."""
    return {
        f"{name}.{key}".lstrip("."): getattr(value, "__name__", type(value).__name__)
        for name, module in model.named_modules()
        for key, value in (*vars(module).items(), *_methods(module).items())
        if PLACE.fullmatch(key) and callable(value) and not isinstance(value, (nn.Module, type))
    }


def _methods(module: nn.Module) -> dict[str, Any]:
    """Methods in places for stochastic depth that drop by themselves: their code reaches no drop-path module."""
    methods = {key: getattr(module, key) for key in _named_as_places(type(module))}
    return {key: method for key, method in methods.items() if not _hands_on(method)}


@functools.lru_cache(maxsize=1024)
def _named_as_places(kind: type) -> tuple[str, ...]:
    """The methods of a class that are called as a place for stochastic depth is."""
    names = (key for cls in kind.__mro__ for key in vars(cls) if PLACE.fullmatch(key))
    return tuple(key for key in dict.fromkeys(names) if inspect.isroutine(inspect.getattr_static(kind, key)))


def _hands_on(method: Any) -> bool:
    """Whether a method may call a drop-path module, or a place for one."""
    return any(
        is_slot(key, part)
        for holder in held_modules(method) or ()
        for key, part in (("", holder), *holder.named_children())
    )
