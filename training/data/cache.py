"""What is kept beside data or in a cache folder: indexes that can be made again, and shards fetched from a URL.

A shard is fetched once: into a temporary file, which a later try goes on with where the server says that the shard is
still the same, and which takes its place when its size is right. Several processes may do so at once: the others wait.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from files.durable import sync_folder, write_durably
from files.errors import ConfigError

AT_ONCE = 4  # shards that are fetched at the same time
ATTEMPTS = 6
_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_OLD = 3600  # seconds after which a temporary file is nobody's
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # what may be otherwise in a moment


def cache_folder() -> Path:
    """Where this project keeps what it can make again: $XDG_CACHE_HOME/drop-path-zoo, or ~/.cache/drop-path-zoo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drop-path-zoo"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; where the system or the disk has no such locks, several may do the same work."""
    with open(path, "rb") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def save(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that any process at any time finds the old one, the new one or none.

    Raises:
        OSError: It could not be written.
    """
    for stray in path.parent.glob(f".tmp-*-{path.name}"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - stray.stat().st_mtime > _OLD:
                stray.unlink()
    temp = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        write_durably(temp, write)
        os.replace(temp, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def fetch(wanted: Mapping[str, Path], *, key: str, pause: float = 1.0) -> None:
    """Fetches files that are not there yet.

    Args:
        wanted: Of each URL, the file that it becomes.
        key: The config's key that named the URLs, for messages.
        pause: Seconds before the second try; doubled before each further one.

    Raises:
        ConfigError: Naming the URL and what is wrong. What was received of it stays, for the next run to go on with.
    """
    missing = {url: path for url, path in wanted.items() if not path.exists()}
    if not missing:
        return
    bar = tqdm(desc=f"fetching {len(missing):,} shards", unit="B", unit_scale=True, leave=False)
    stop = threading.Event()
    with bar, ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        tasks = [pool.submit(_fetch, url, path, bar, stop, key, pause) for url, path in missing.items()]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _CutShort(OSError):
    """The connection ended early."""


def _fetch(url: str, final: Path, bar: tqdm, stop: threading.Event, key: str, pause: float) -> None:
    wrong = f"{key}: '{shown(url)}' cannot be fetched"
    lock = final.with_name(f".{final.name}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ConfigError(f"data.cache: '{final.parent}' cannot be written: {error.strerror}") from error
    with locked(lock):
        if final.exists():  # another process was quicker
            return
        part = final.with_name(f".part-{final.name}")
        for attempt in range(ATTEMPTS):
            try:
                _receive(url, part, bar, stop)
                break
            except ConfigError:  # of this disk
                raise
            except HTTPError as error:
                reason, again = f"{error.code} {error.reason}", error.code in _AGAIN
                if error.code == 416:  # there is no more of it: what is here may be whole, or of another file
                    part.unlink(missing_ok=True)
                    again = True
            except (URLError, http.client.HTTPException, OSError) as error:
                cause = error.reason if isinstance(error, URLError) else error
                reason, again = str(cause) or type(cause).__name__, True
            except ValueError as error:
                reason, again = str(error), False
            if not again or attempt == ATTEMPTS - 1:
                tried = f" (tried {attempt + 1} times)" if attempt else ""
                kept = "\nwhat was received is kept: the same command goes on there" if part.exists() else ""
                raise ConfigError(f"{wrong}: {reason}{tried}{kept}")
            if stop.wait(pause * 2**attempt):
                return
        if stop.is_set():
            return
        try:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, final)
            _validator_of(part).unlink(missing_ok=True)
            sync_folder(final.parent)
        except OSError as error:
            raise ConfigError(f"data.cache: '{final}' cannot be written: {error.strerror}") from error


def _receive(url: str, part: Path, bar: tqdm, stop: threading.Event) -> None:
    """Receives a file, or what is missing of it."""
    request = Request(url, headers={"User-Agent": "drop-path-zoo", "Accept-Encoding": "identity"})
    have = 0
    with contextlib.suppress(FileNotFoundError):
        validator = _validator_of(part).read_text()
        if validator and (have := part.stat().st_size):
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", validator)  # another file under this name is sent whole
    with urlopen(request, timeout=_TIMEOUT) as response:
        if not (have and response.status == 206 and _starts_at(response.headers, have)):
            have = 0
        length = response.headers.get("Content-Length")
        expected = have + int(length) if length else None
        with _writable(part, "ab" if have else "wb") as file:
            if not have:
                _note(_validator_of(part), _validator(response.headers))
            size = have
            while not stop.is_set() and (block := response.read(_BLOCK)):
                _write(file, block, part)
                size += len(block)
                bar.update(len(block))
    if expected is not None and size != expected and not stop.is_set():
        raise _CutShort(f"{size:,} of {expected:,} bytes came")


def _starts_at(headers: Message, start: int) -> bool:
    return str(headers.get("Content-Range", "")).startswith(f"bytes {start}-")


def _validator(headers: Message) -> str:
    """By what the server knows this very content; empty where it does not say."""
    tag = headers.get("ETag") or ""
    return headers.get("Last-Modified") or "" if not tag or tag.startswith("W/") else tag


def _validator_of(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _note(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a later try begins again then; of a full disk the file itself will tell
        path.unlink(missing_ok=True)
        path.write_text(text)


def _writable(part: Path, mode: str) -> BinaryIO:
    try:
        return open(part, mode)  # type: ignore[return-value]
    except OSError as error:
        raise ConfigError(f"data.cache: '{part}' cannot be written: {error.strerror}") from error


def _write(file: BinaryIO, block: bytes, part: Path) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise ConfigError(
            f"data.cache: '{part}' cannot be written: {error.strerror}\nchoose another folder, or make room: the next "
            "run goes on there"
        ) from error
