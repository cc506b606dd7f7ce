"""What a user's mistake raises, and the nearest known word to a mistyped one."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in what the user gave: one to three lines saying what, where, what is allowed. Scripts exit with 2."""


class FieldError(ValueError):
    """For a validator of a whole model: names the key at fault (dotted, relative to it), so that its line is found."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key_path = tuple(key.split("."))


def nearest(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the closest known word, or an empty string."""
    match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
