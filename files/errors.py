"""What a user's mistake and a failed run raise, what scripts make of it, and the nearest known word to a mistyped one."""

import difflib
import sys
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A mistake in what the user gave: one to three lines saying what, where, what is allowed. Scripts exit with 2."""


class Failure(RuntimeError):
    """What went wrong while running, in one to three lines that name it. Scripts exit with 1."""


class FieldError(ValueError):
    """For a validator of a whole model: names the key at fault (dotted, relative to it), so that its line is found."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key_path = tuple(key.split("."))


def nearest(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the closest known word, or an empty string."""
    match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def run_command(command: Callable[[], int]) -> int:
    """Runs the work of a script and returns its exit code: its own, 2 after a ConfigError, 1 after a Failure.

    Both are printed as `error: ...` to standard error. Any other error is a mistake of ours and passes, traceback and all.
    """
    try:
        return command()
    except (ConfigError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
