"""The kernels for this CPU, compiled on the spot.

They are written in C (`cpu_kernels.c` and what it includes) and compiled, in some two seconds, when a process first wants
one: by the C compiler at hand (`CC`, cc, gcc or clang), for this processor, to a temporary file. Where there is none, or the
processor has no AVX2, everything has torch's forms. Threads are torch's own.
"""

import contextlib
import ctypes
import functools
import os
import platform
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu_kernels.c")
WITHOUT = ("-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-sanitize=all", "-fvisibility=default")
"""Against arguments of `CC`. Libraries linked by the first two's opposites turn the process's smallest numbers to zeros, a
sanitizer ends it, and of hidden functions none is found."""

FLAGS = (
    *("-O2", *WITHOUT, "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-std=gnu11", "-fPIC"),
)


MOST_SAID = 2**24
"""Bytes that are read of what a program writes: one that writes without end would fill the memory."""

_lock = threading.RLock()  # again by the same thread: what a signal calls in the middle may want the kernels too


def _unlock() -> None:
    """In a new process, which has none of the threads that could give a lock back."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock)


class CompilerWarning(UserWarning):
    """This machine's compiler did not compile the kernels."""

    concerns = "machine"  # so that a command says it once on each


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; `None` where they cannot be had. Compiled once in a process, whichever threads want them."""
    with _lock:  # a cache computes for each thread that asks before it knows
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not is_supported():
        return None
    try:
        kernels = _compile()
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = output.decode(errors="replace") if output else f"{type(error).__name__}: {error}"
        reason = next((line for line in reason.splitlines() if "error" in line.lower()), reason)[:200]
        warnings.warn(
            f"training is slower without the kernels for this CPU, which did not compile ({reason})",
            CompilerWarning,
            stacklevel=3,
        )
        return None
    return kernels


def is_supported() -> bool:
    """Whether the kernels are made for this machine: Linux, and a processor with AVX2 that torch uses."""
    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return sys.platform == "linux" and platform.machine() == "x86_64" and has_vectors


def find_compiler() -> list[str] | None:
    """The C compiler's command: that of the environment's `CC`, such as "ccache gcc", else cc, gcc or clang."""
    commands = [["cc"], ["gcc"], ["clang"]]
    with contextlib.suppress(ValueError):  # a quotation mark without another
        commands.insert(0, shlex.split(os.environ.get("CC", "")))
    for name, *settings in filter(None, commands):
        if path := shutil.which(name):
            return [path, *settings]
    return None


def describe_compiler() -> str | None:
    """The first line that the C compiler says of itself, on which rounding depends; `None` where none is used."""
    compiler = find_compiler() if is_supported() else None
    if compiler is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = output_of([*compiler, "--version"], seconds=10)
        return said.decode(errors="replace").partition("\n")[0].strip() or None
    return None


def _compile() -> ctypes.CDLL:
    """Compiles the kernels and loads them.

    Raises:
        OSError: There is no compiler, no room for a file, or a result that cannot be loaded.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler, threads = find_compiler(), _threads_of_torch()
    if compiler is None:
        raise FileNotFoundError("no C compiler: cc, gcc or clang, or what the environment calls CC")
    if threads is None:
        raise FileNotFoundError("torch's OpenMP library is not found")
    with tempfile.TemporaryDirectory(prefix="drop-path-zoo-") as folder:
        code, result = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        for step in (["-c", SOURCE, "-o", code], ["-shared", code, threads, "-lm", "-o", result]):
            output_of([*compiler, *FLAGS, *step], seconds=120)
        kernels = _load(result)
        if not hasattr(kernels, "start"):
            raise FileNotFoundError("the compiler left the kernels out")
        return kernels


def _load(file: Path) -> ctypes.CDLL:
    """A library, of which nothing is read from its file later on."""
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        with contextlib.suppress(OSError), open(os.memfd_create("kernels"), "wb", buffering=0) as memory:
            # folders for temporary files are often such that nothing may be run from them, but memory is not
            memory.write(file.read_bytes())
            return ctypes.CDLL(f"/proc/self/fd/{memory.fileno()}")
        raise


def output_of(command: Sequence[str | os.PathLike[str]], *, seconds: float) -> bytes:
    """What a program writes to its standard output.

    It runs in a session of its own: a compiler may be a script, whose children would outlive it.

    Args:
        command: The program and its arguments.
        seconds: After which it is killed, with all that it started.

    Raises:
        OSError: It cannot be started.
        subprocess.SubprocessError: It failed, with what it wrote to standard error as `stderr`, took longer, or wrote
            more than `MOST_SAID`.
    """
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=null, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            said, complaints = _read(process, time.monotonic() + seconds, seconds)
        except BaseException:  # Ctrl-C too, which does not reach it there
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said, complaints)
    return said


def _read(process: subprocess.Popen[bytes], end: float, seconds: float) -> tuple[bytes, bytes]:
    """What a process writes to standard output and error until it has ended, by a time of the clock."""
    said = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as open_ones:
        for pipe in said:
            open_ones.register(pipe, selectors.EVENT_READ)  # type: ignore[arg-type]
        while open_ones.get_map():
            for key, _ in open_ones.select(max(0.0, end - time.monotonic())):
                some = os.read(key.fd, 2**16)
                said[key.fileobj] += some  # type: ignore[index]
                if not some:
                    open_ones.unregister(key.fileobj)
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(process.args, seconds)
            if sum(map(len, said.values())) > MOST_SAID:
                raise subprocess.SubprocessError(f"{process.args[0]} writes without end")  # type: ignore[index]
    process.wait(timeout=max(0.0, end - time.monotonic()))
    output, complaints = map(bytes, said.values())
    return output, complaints


def _threads_of_torch() -> str | None:
    """The file of the OpenMP library that torch runs on; other libraries may have loaded others."""
    try:
        lines = Path("/proc/self/maps").read_bytes().split(b"\n")  # names of files may be in any encoding
    except OSError:
        return None
    files = {os.fsdecode(line.split(maxsplit=5)[-1].strip()) for line in lines if line}
    loaded = [file for file in files if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))]
    home = Path(torch.__file__).resolve().parent  # as the system writes it
    own = [file for file in loaded if home in Path(file).parents or home.with_name("torch.libs") in Path(file).parents]
    found = own or loaded
    return found[0] if len(found) == 1 else None
