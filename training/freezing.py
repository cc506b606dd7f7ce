"""Linear probe, then fine-tuning: parts of a model that are not trained for the first epochs, or at all.

While a part is frozen its parameters need no gradient, its batch norms keep their statistics and its stochastic depth and
dropout are off: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features" (https://arxiv.org/abs/2202.10054), LP-FT.
The optimizer holds all parameters from the start and passes over those without a gradient, so its state fits at every
epoch; what is frozen is a pure function of the epoch, and nothing of it is saved.
"""

import math
from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

from files.errors import ConfigError, nearest
from layers.drop_path import DropPath
from stochastic_depth.setting import StochasticDepth
from training.recipe import FreezeSection


class Freezing:
    """What of a model is frozen in which epoch.

    Args:
        section: The config's.
        model: Freshly built: what needs no gradient now, never will.
        depth: Its stochastic depth, with the rates for the time after.

    Attributes:
        epochs: The first epochs, in which it is frozen; infinity: all.
        parameters: What is not trained then.
        modules: What is in evaluation mode then, with all below.
        drop_paths: Stochastic depth that is off then, with its nominal rates.

    Raises:
        ConfigError: The stages are none of the model's, or nothing would be left to train.
    """

    def __init__(self, section: FreezeSection, model: nn.Module, depth: StochasticDepth) -> None:
        self.epochs = math.inf if section.epochs == "all" else section.epochs
        frozen = _frozen_names(section.stages, model) if self.epochs else set()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if frozen >= trained.keys():
            raise ConfigError("freeze.stages: nothing would be left to train")
        self.parameters = [p for name, p in trained.items() if name in frozen]
        self.modules = _frozen_modules(model, {id(p) for p in self.parameters})
        inside = {id(m) for module in self.modules for m in module.modules()}
        self.drop_paths: list[tuple[DropPath, float]] = [
            (m, m.drop_prob) for block in depth.blocks for m in block.drop_paths.values() if id(m) in inside
        ]
        self._frozen: bool | None = None

    def set_epoch(self, epoch: int) -> bool:
        """Freezes or thaws for an epoch; call it after `model.train()`.

        Returns:
            Whether what is trained is another than before, or this is the first call: DDP must wrap the model again.
        """
        frozen = epoch < self.epochs
        if frozen:
            for module in self.modules:
                module.eval()
        if frozen == self._frozen:
            return False
        self._frozen = frozen
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        for module, rate in self.drop_paths:
            module.drop_prob = 0.0 if frozen else rate
        return True

    def describe(self) -> str:
        """A line of the plan; empty where nothing is ever frozen."""
        if not self.parameters:
            return ""
        when = "the whole run" if math.isinf(self.epochs) else f"epochs 1 to {self.epochs}"
        count = sum(p.numel() for p in self.parameters)
        return f"frozen    {count / 1e6:.3g} M parameters in {when}, where their drop path is off"


def _frozen_names(stages: str | int | list[str], model: nn.Module) -> set[str]:
    """Names of the parameters of the first stages, of parts by name, or of all but the classifier."""
    names = [name for name, _ in model.named_parameters()]
    if isinstance(stages, list):
        parts = [name for name, _ in model.named_modules() if name] + names
        for part in stages:
            if not any(name == part or name.startswith(f"{part}.") for name in names):
                raise ConfigError(f"freeze.stages: the model has no part {part!r} to freeze{nearest(part, parts)}")
        return {name for name in names if any(name == part or name.startswith(f"{part}.") for part in stages)}
    if stages == "all":
        given = model.get_classifier()  # type: ignore[operator]
        heads: Sequence[nn.Module] = given if isinstance(given, list | tuple) else (given,)
        kept = {id(p) for head in heads for p in head.parameters()}
        if not kept:
            raise ConfigError("freeze.stages: the model has no classifier to train; name the parts to freeze")
        return {name for name, p in model.named_parameters() if id(p) not in kept}
    assert isinstance(stages, int)
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        tops = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(f"freeze.stages: this model does not say what its stages are; name parts of it: {tops}")
    groups: Any = group_parameters(model, matcher(coarse=True), reverse=True)
    last = max(groups.values()) - 1  # the head is the last group
    if stages > last:
        raise ConfigError(f"freeze.stages: must be from 0 (the stem) to {last} in this model, got {stages}")
    return {name for name, group in groups.items() if group <= stages}


def _frozen_modules(model: nn.Module, frozen: set[int]) -> list[nn.Module]:
    """The outermost modules that are frozen as a whole.

    One without parameters (dropout, an activation) goes with the next beside it that has some, else with the one before:
    the dropout in front of a classifier that is trained is on.

    Args:
        model: Where to look.
        frozen: Ids of the parameters that are frozen.
    """
    children = list(model.children())
    states: list[bool | None] = []
    for child in children:
        own = [id(p) in frozen for p in child.parameters() if p.requires_grad]
        states.append(all(own) if own else None)
    found: list[nn.Module] = []
    for i, (child, state) in enumerate(zip(children, states, strict=True)):
        neighbours = (*states[i + 1 :], *reversed(states[:i]))
        if state or (state is None and next((other for other in neighbours if other is not None), False)):
            found.append(child)
        elif state is not None:
            found += _frozen_modules(child, frozen)
    return found
