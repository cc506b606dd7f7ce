"""What every section of a training config is: strict, finite, without unknown keys."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from files.errors import FieldError

_LARGEST = 2**32 - 1  # a seed's

Fraction = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of the config: an unknown key is refused, nothing is converted but an integer to a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_overflow(self) -> "Section":
        for key in type(self).model_fields:
            for number in _integers(getattr(self, key)):
                if abs(number) > _LARGEST:
                    bound = f"at most {_LARGEST}" if number > 0 else f"at least {-_LARGEST}"
                    raise FieldError(key, f"must be {bound}, got {number}")
        return self


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item)
