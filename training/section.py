"""What every section of a training config is: strict, finite, without unknown keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of the config: an unknown key is refused, nothing is converted but an integer to a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
