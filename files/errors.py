"""What a user's mistake and a failed run raise, what scripts make of it, and the nearest known word to a mistyped one."""

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from files.notices import own_notices

# What a machine runs out of, or a disk that fails: never a mistake of the code.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
            errno.ENOMEM, errno.EAGAIN}  # fmt: skip


class ConfigError(ValueError):
    """A mistake in what the user gave: one to three lines saying what, where, what is allowed. Scripts exit with 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class Failure(RuntimeError):
    """What went wrong while running, in one to three lines that name it. Scripts exit with 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class FieldError(ValueError):
    """For a validator of a whole model: names the key at fault, so that its line is found.

    Args:
        key: Dotted, relative to the model; as a path where a key of it has dots of its own.
        message: What is wrong with it.
        beside: The key, dotted, that it does not go with: where that stands is said too, since whoever gave the one may
            not know of the other, as one from a default file.
    """

    def __init__(self, key: str | tuple[str, ...], message: str, *, beside: str | None = None) -> None:
        super().__init__(message)
        self.key_path = tuple(key.split(".")) if isinstance(key, str) else key
        self.beside = None if beside is None else tuple(beside.split("."))


def printable(text: str) -> str:
    """The text with what no terminal shows, or what would change how it shows the rest, as Python writes it: `\\x00`.

    Names of files and keys may hold anything. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The text on one line, with what no terminal shows as Python writes it: for the names of files in messages."""
    return printable(text).replace("\n", "\\n")


def nearest(word: str, known: Iterable[str], *, before: str = "") -> str:
    """`'; did you mean X?'` for the closest known word, or an empty string.

    Args:
        word: What was given.
        known: What it may be.
        before: What stands before all of them, and is said but not compared: it would make any two short words alike.
    """
    match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {before + match[0]!r}?" if match else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, had no more memory to give."""
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's words on a CPU
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, on a GPU


def wanted_memory(error: BaseException) -> str:
    """What an error of `is_out_of_memory` says was asked for, in a line."""
    if size := re.search(r"tried to allocate (\d+) bytes", str(error)):
        return f"{int(size[1]) / 1e9:,.1f} GB were asked for at once"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_of_machine(error: BaseException) -> bool:
    """Whether the system refused something that a machine runs out of (room, open files, processes), or its disk fails."""
    return isinstance(error, OSError) and error.errno in _MACHINE


def run_command(command: Callable[[], int], *, printed: bool = True) -> int:
    """Runs the work of a script and returns its exit code: its own, 2 after a ConfigError, 1 after a Failure.

    Both are printed as `error: ...` to standard error, and so is a machine that is out of memory, room or open files, which
    is a failure. Any other error is a mistake of ours and passes, traceback and all. What the project's code warns of is
    printed as `warning: ...`, without the path and the line of code that Python adds.
    Ctrl-C ends it with code 130. Nobody has to listen: where standard output or error is closed, or the pipe's reader
    leaves, as `head` does, what is printed is dropped and the work goes on. Where the system refuses what is printed, as a
    full disk does, the work goes on too; in the end that is said.

    Args:
        command: The work.
        printed: What it prints is its result, so that it has failed where that could not be written. False: the result is
            in a folder, and what is printed tells of it.
    """
    with lasting_output() as out, own_notices(lambda told: print(f"warning: {printable(told)}", file=sys.stderr)):
        code = _run(command)
        out.flush()
        if out.refused is None:
            return code
        told = f"standard output cannot be written: {out.refused}; what stands there is not all"
        print(f"{'error' if printed else 'warning'}: {told}", file=sys.stderr)
        return (code or 1) if printed else code


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except (ConfigError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if not is_of_machine(error):
            raise
        where = f": {one_line(os.fsdecode(error.filename))}" if isinstance(error.filename, (str, bytes)) else ""
        print(f"error: {error.strerror}{where}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {wanted_memory(error)}", file=sys.stderr)
        print("use a smaller model, image size or batch, or a machine with more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


class LastingStream:
    """A text stream that drops what is written to it from the moment on that it cannot be written to.

    Attributes:
        deserted: Its reader has left, as `head` does.
        refused: Why the system did not take what was written, in its words; None where it did.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.deserted = False
        self.refused: str | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a name in another encoding than the terminal's
            encoding = self.stream.encoding or "ascii"
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Puts the null device in the place of the file, for all who write to it, and for what is written at exit."""
        if isinstance(error, BrokenPipeError):
            self.deserted = True
        else:
            self.refused = self.refused or error.strerror or str(error)
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Lets standard output and error outlast their readers; gives standard output."""
    # of one that is closed the next file to be opened would get the number, and what is printed
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null_stream:
        out, err = (LastingStream(null_stream if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            if sys.stdout is out:
                sys.stdout = before[0]
            if sys.stderr is err:
                sys.stderr = before[1]
