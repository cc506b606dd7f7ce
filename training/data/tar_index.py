"""Where the samples of a shard lie: an index of a plain tar file, made once and kept beside it.

A shard is a tar file as WebDataset has them: members `KEY.jpg` and `KEY.cls` (or `KEY.json`) that follow each other are
one sample; KEY is what stands before the first dot of the file's name. The index has place and size of the image of each
sample, its name and its label, in arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from files.errors import ConfigError, nearest
from training.data.cache import cache_folder, locked, save
from training.data.images import image_extensions

logger = logging.getLogger(__name__)

_VERSION = 1
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes
_BLOCK = 512  # of a tar file
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
PACKED_ENDS = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
_LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json


class Keys(NamedTuple):
    """Which members of a sample count; an index is of one choice.

    Attributes:
        label: The key in `.json` that has the label; None: `.cls`, or else `label` in `.json`.
        image: The end of the image's name; None: the only one that Pillow reads.
    """

    label: str | None = None
    image: str | None = None


class TarIndex(NamedTuple):
    """The samples of a shard, in its order.

    Attributes:
        size: Bytes of the shard.
        mtime_ns: When it was last changed.
        offsets: Of each sample, where its image begins, int64.
        sizes: Bytes of its image, int64.
        names: The names of the images, one after another, uint8.
        ends: Of each sample, where its name ends in `names`, int64.
        labels: Of each sample, its label's place in `texts`; -1 for none; int32.
        texts: The labels that there are.
        unlabelled: Why the first sample without a label has none, in words; empty where all have one.
        left_out: Members that belong to no sample, by kind.
    """

    size: int
    mtime_ns: int
    offsets: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    texts: list[str]
    unlabelled: str
    left_out: dict[str, int]


def index_of(shard: Path, keys: Keys) -> TarIndex:
    """The index of a shard: the one that is kept where the shard is still the same, or a new one, which is kept.

    It is kept beside the shard, as SHARD.index.npz; where that folder cannot be written, in the cache folder.

    Raises:
        ConfigError: For a shard that cannot be read, is damaged, compressed or without samples.
    """
    try:
        if (found := _kept(shard, keys)) is not None:
            return found
        with locked(shard):
            if (found := _kept(shard, keys)) is not None:  # another process has made it
                return found
            index = build_index(shard, keys)
    except OSError as error:
        raise ConfigError(f"shard '{shard}' cannot be read: {error.strerror or error}") from error
    for place in _places(shard):
        with contextlib.suppress(OSError):
            if place.parent != shard.parent:
                place.parent.mkdir(parents=True, exist_ok=True)
            save(place, lambda file: _write(file, index, keys))
            return index
    logger.warning("warning: the index of '%s' cannot be kept, neither beside it nor in '%s'", shard, cache_folder())
    return index


def _places(shard: Path) -> tuple[Path, Path]:
    """Where the index is kept: beside the shard; where that cannot be written, in the cache folder."""
    known_by = hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:16]
    name = f"{shard.name}.index.npz"
    return shard.with_name(name), cache_folder() / "indexes" / f"{known_by}-{name}"


def _kept(shard: Path, keys: Keys) -> TarIndex | None:
    status = os.stat(shard)
    for place in _places(shard):
        try:
            index = _read(place, keys)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("warning: '%s' is damaged (%s); the index is made again", place, error or type(error))
            continue
        if index is not None and (index.size, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return index
    return None


def _write(file: IO[bytes], index: TarIndex, keys: Keys) -> None:
    about = {name: value for name, value in index._asdict().items() if not isinstance(value, np.ndarray)}
    text = json.dumps({"version": _VERSION, "keys": keys, **about})
    arrays: dict[str, Any] = {k: value for k, value in index._asdict().items() if isinstance(value, np.ndarray)}
    np.savez(file, about=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)


def _read(place: Path, keys: Keys) -> TarIndex | None:
    """An index; None for one of another version or other keys.

    Raises:
        ValueError and others: It is damaged.
    """
    with open(place, "rb") as file, np.load(file, allow_pickle=False) as held:
        about = json.loads(held["about"].tobytes())
        if about.pop("version") != _VERSION or about.pop("keys") != list(keys):
            return None
        index = TarIndex(**about, **{name: held[name] for name in held.files if name != "about"})
    samples = len(index.offsets)
    if any(len(values) != samples for values in (index.sizes, index.ends, index.labels)) or not samples:
        raise ValueError("its arrays have different lengths")
    return index


def build_index(shard: Path, keys: Keys) -> TarIndex:
    """Walks over a shard and reads its labels.

    Raises:
        ConfigError: For a shard that is damaged, compressed, without samples or ambiguous.
        OSError: It cannot be read.
    """
    with open(shard, "rb") as file:
        before = os.fstat(file.fileno())
        builder = _Builder(shard, file, keys)
        for member in _members(shard, file, before.st_size):
            builder.add(member)
        builder.finish()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"shard '{shard}' is being written; wait until it is whole")
    return builder.index(before)


def _members(shard: Path, file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a plain tar file, to its end mark: Python's tarfile takes a damaged header for the end in silence."""
    start = file.read(8)
    file.seek(0)
    for magic, tool in _PACKED.items():
        if start.startswith(magic):
            raise packed(shard, tool)
    cut = "copy it again, or write it again"
    at, last = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and member.offset_data + member.size > size:
                    raise ConfigError(f"shard '{shard}' is cut short, in its member '{member.name}'\n{cut}")
                at, last = archive.offset, member.name
                yield member
            at = archive.offset
    except ConfigError:
        raise
    except (tarfile.TarError, ValueError) as error:
        if at > size:
            raise ConfigError(f"shard '{shard}' is cut short, at the end of its member '{last}'\n{cut}") from error
        what = "is no tar file" if at == 0 else f"is damaged at byte {at:,}"
        raise ConfigError(f"shard '{shard}' {what}: {error}\n{cut}") from error
    file.seek(at)
    block = file.read(_BLOCK)
    if block != bytes(_BLOCK):
        if len(block) < _BLOCK:
            raise ConfigError(
                f"shard '{shard}' is cut short: it has no end mark at byte {at:,}\n"
                f"{cut}; if nothing is missing, add the mark: truncate -s +1024 SHARD"
            )
        raise ConfigError(f"shard '{shard}' is damaged: at byte {at:,} is no header of a member\n{cut}")


def packed(shard: Path, tool: str) -> ConfigError:
    """The refusal of a compressed shard."""
    return ConfigError(
        f"shard '{shard}' is compressed: its members cannot be read by their place\n"
        f"unpack it to a plain .tar, which is hardly larger (images are compressed already): {tool} {shard.name}"
    )


class _Builder:
    """Collects the samples of a shard."""

    def __init__(self, shard: Path, file: IO[bytes], keys: Keys) -> None:
        self.shard, self.file, self.keys = shard, file, keys
        self.key: str | None = None
        self.parts: dict[str, tarfile.TarInfo] = {}  # of the sample at hand, by the end of the name
        self.seen: set[str] = set()
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.names: list[bytes] = []
        self.labels: list[int] = []
        self.texts: dict[str, int] = {}
        self.unlabelled = ""
        self.left_out: Counter[str] = Counter()

    def add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        match = _KEY.fullmatch(member.name)
        if not member.isreg() or member.issparse() or match is None or _META.match(member.name):
            kind = "links and special members" if not member.isreg() or member.issparse() else "members without a key"
            self.left_out[kind] += 1
            return
        key, end = match[1], match[2].lower()
        if key != self.key:
            self.finish()
            if key in self.seen:
                raise self.error(key, "is there twice, with others in between", "keys must differ within a shard")
            self.seen.add(key)
            self.key = key
        if end in self.parts:
            raise self.error(key, f"has two members .{end}", "keys must differ within a shard")
        self.parts[end] = member

    def finish(self) -> None:
        """Ends the sample at hand."""
        if self.key is None:
            return
        image = self.parts[self.image()]
        label = self.label()
        self.offsets.append(image.offset_data)
        self.sizes.append(image.size)
        self.names.append(image.name.encode("utf-8", "surrogateescape"))
        self.labels.append(-1 if label is None else self.texts.setdefault(label, len(self.texts)))
        self.key, self.parts = None, {}

    def image(self) -> str:
        """The end of the name of the sample's image."""
        assert self.key is not None
        there = f"its members: {', '.join('.' + end for end in self.parts)}"
        if self.keys.image is not None:
            end = self.keys.image.lower().removeprefix(".")
            if end not in self.parts:
                raise self.error(self.key, f"has no .{end} (data.image_key)", there + nearest(end, self.parts))
            return end
        images = [end for end in self.parts if os.path.splitext("x." + end)[1] in image_extensions()]
        if not images:
            raise self.error(self.key, "has no image", there)
        if len(images) > 1:
            raise self.error(self.key, "has several images", f"{there}\nsay which: data.image_key={images[0]}")
        return images[0]

    def label(self) -> str | None:
        """The sample's label as text; None for none."""
        assert self.key is not None
        if self.keys.label is None and "cls" in self.parts:
            text = self.content("cls").decode("utf-8", "replace").strip()
            if not text:
                raise self.error(self.key, "has an empty .cls", "expected a number or the name of a class")
            return text
        if "json" not in self.parts:
            wanted = ".json" if self.keys.label is not None else ".cls and no .json"
            there = ", ".join("." + end for end in self.parts)
            self.unlabelled = self.unlabelled or f"sample '{self.key}' has no {wanted} (its members: {there})"
            return None
        name = self.keys.label or "label"
        content = self.content("json")
        try:
            found = json.loads(content)
        except ValueError as error:
            raise self.error(self.key, f"has a .json that cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise self.error(self.key, f"has a .json that is {type(found).__name__}, not an object")
        if found.get(name) is None:
            there = ", ".join(map(repr, list(found)[:10])) or "none"
            self.unlabelled = self.unlabelled or (
                f"the .json of sample '{self.key}' has no {name!r} (its keys: {there}{nearest(name, found)})\n"
                "data.label_key says which has the label"
            )
            return None
        value: Any = found[name]
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.error(
                self.key, f"has {name}: {value!r} in its .json", "expected a number or the name of a class"
            )
        return str(value).strip()

    def content(self, end: str) -> bytes:
        member = self.parts[end]
        assert self.key is not None
        if member.size > _LARGEST_LABEL:
            raise self.error(self.key, f"has a .{end} of {member.size:,} bytes, which cannot be a label")
        self.file.seek(member.offset_data)  # tarfile looks where it is before it goes on
        return self.file.read(member.size)

    def error(self, key: str, what: str, more: str = "") -> ConfigError:
        return ConfigError(f"shard '{self.shard}': sample '{key}' {what}" + (f"\n{more}" if more else ""))

    def index(self, status: os.stat_result) -> TarIndex:
        if not self.offsets:
            said = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.items()) or "it is empty"
            raise ConfigError(
                f"shard '{self.shard}' has no samples ({said})\nexpected members KEY.jpg and KEY.cls (or KEY.json)"
            )
        return TarIndex(
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            offsets=np.array(self.offsets, dtype=np.int64),
            sizes=np.array(self.sizes, dtype=np.int64),
            names=np.frombuffer(b"".join(self.names), dtype=np.uint8),
            ends=np.cumsum([len(name) for name in self.names], dtype=np.int64),
            labels=np.array(self.labels, dtype=np.int32),
            texts=list(self.texts),
            unlabelled=self.unlabelled,
            left_out=dict(self.left_out),
        )
