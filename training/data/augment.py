"""The config's section `augment`: what happens to training images and labels; and the policies that timm knows."""

import math
import re

from pydantic import Field, field_validator, model_validator
from timm.data.auto_augment import rand_augment_choices

from files.errors import FieldError, nearest
from training.section import Fraction, Pair, Section

_WHOLE, _NUMBER = r"[0-9]+", r"[0-9]+(?:\.[0-9]+)?"
_MSTD = (_NUMBER, 0, 1000)
# timm passes over a section that it does not understand ('rand-magnitude9'), or fails on it with an assertion, or in
# training; so this is the one place where policies are checked, and what passes here runs. Name -> its settings, each
# with the pattern of its value and, of numbers, the smallest and the largest. Alpha of augmix: draws of a Dirichlet
# distribution far below 0.1 underflow to 0 / 0.
_POLICIES: dict[str, dict[str, tuple[str, float, float]]] = {
    "rand": {
        "m": (_WHOLE, 0, 100),
        "n": (_WHOLE, 1, 100),
        "p": (_NUMBER, 0, 1),
        "mstd": _MSTD,
        "mmax": (_WHOLE, 1, 100),
        "inc": (_WHOLE, 0, 1),
        "t": ("weights|3a|3aw", -math.inf, math.inf),
    },
    "augmix": {
        "m": (_WHOLE, 0, 100),
        "w": (_WHOLE, 1, 100),
        "d": (_WHOLE, 1, 100),
        "a": (_NUMBER, 0.1, 1000),
        "b": (_WHOLE, 0, 1),
        "mstd": _MSTD,
    },
    **{name: {"mstd": _MSTD} for name in ("original", "originalr", "v0", "v0r", "3a")},
}
_POLICIES_HELP = (
    "allowed: rand[-mN][-nN][-pF][-mstdF][-mmaxN][-inc0|1][-tweights|-t3a|-t3aw] as in rand-m9-mstd0.5-inc1,\n"
    "augmix[-mN][-wN][-dN][-aF][-b0|1][-mstdF], original|originalr|v0|v0r|3a[-mstdF]; N is whole, F any number"
)


def policy_problem(policy: str) -> str | None:
    """What is wrong with a policy for `augment.auto_augment`, or None: then it runs on any image."""
    name, *sections = policy.split("-")
    if name not in _POLICIES:
        return f"unknown policy '{name}'{nearest(name, _POLICIES)}"
    given: dict[str, str] = {}
    for section in sections:
        matches = {key: re.fullmatch(f"{key}({setting[0]})", section) for key, setting in _POLICIES[name].items()}
        found = [(key, match[1]) for key, match in matches.items() if match]
        if not found:
            return f"'{section}' is not a setting of {name}"
        key, value = found[0]
        _, low, high = _POLICIES[name][key]
        if key in given:
            return f"'{key}' is given twice"
        if math.isfinite(low) and not low <= float(value) <= high:
            return f"'{key}' must be from {low:g} to {high:g}, got {value}"
        given[key] = value
    choices = rand_augment_choices(given.get("t", ""))
    if isinstance(choices, dict) and int(given.get("n", 1)) > len(choices):  # drawn without replacement
        return f"'n' must be from 1 to {len(choices)} with t{given['t']}, got {given['n']}"
    return None


class AugmentSection(Section):
    """What happens to training images and labels."""

    auto_augment: str | None = Field(default=None, description="A timm policy, for example rand-m9-mstd0.5-inc1.")
    random_erasing: Fraction = Field(default=0.0, description="Probability per image.")
    mixup: float = Field(default=0.0, ge=0, description="Alpha of the beta distribution; 0: off.")
    cutmix: float = Field(default=0.0, ge=0, description="Alpha of the beta distribution; 0: off.")
    mixup_off_epoch: int = Field(default=0, ge=0, description="Epoch from which mixup and cutmix are off; 0: never.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the label spread over all classes.")
    crop_scale: Pair | None = Field(
        default=None, description="[smallest, largest] area of a random resized crop, in (0, 1]. Default: resize only."
    )
    crop_ratio: Pair = Field(default=[3 / 4, 4 / 3], description="[smallest, largest] width over height of that crop.")
    hflip: Fraction = Field(default=0.5, description="Probability of a horizontal flip.")
    color_jitter: float = Field(
        default=0.0, ge=0, le=10, description="Strength of brightness, contrast and saturation jitter."
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="Largest rotation, degrees either way.")
    translate: float = Field(
        default=0.0, ge=0, lt=1, description="Largest shift, as a fraction of the image, either way."
    )
    zoom: float = Field(default=0.0, ge=0, lt=1, description="Largest change of scale, as a fraction, either way.")

    @field_validator("mixup", "cutmix")
    @classmethod
    def _check_alpha(cls, alpha: float) -> float:
        if alpha and not 1e-3 <= alpha <= 1e6:  # NumPy's beta distribution gives NaN beyond
            raise ValueError(f"must be 0, or between 0.001 and 1e+06, got {alpha:g}")
        return alpha

    @field_validator("auto_augment")
    @classmethod
    def _check_policy(cls, policy: str | None) -> str | None:
        if policy is not None and (problem := policy_problem(policy)):
            raise ValueError(f"{problem}\n{_POLICIES_HELP}")
        return policy

    @model_validator(mode="after")
    def _check_crop(self) -> "AugmentSection":
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise FieldError("crop_scale", f"expected 0 < smallest <= largest <= 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise FieldError("crop_ratio", f"expected 0 < smallest <= largest, got {self.crop_ratio}")
        return self
