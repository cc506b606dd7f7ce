"""WebDataset shards: images and labels in plain tar files, read by their place in them.

A sample is addressed by its index, as in every kind of data, so that order, augmentation and resume are exact. Shards
that a URL names are fetched into a cache folder first; docs/data.md says why none is streamed.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
from tqdm import tqdm

from files.durable import nearest_beside
from files.errors import ConfigError, nearest
from files.words import counted
from training.data.cache import cache_folder, fetch, shown
from training.data.folder import VAL_FOLDERS
from training.data.source import Sources
from training.data.tar_index import PACKED_ENDS, Keys, TarIndex, index_of, packed

if TYPE_CHECKING:
    from training.config import DataSection

_LAYOUT = (
    "expected ROOT/train/*.tar and ROOT/val/*.tar, or ROOT/train-*.tar and ROOT/val-*.tar;\n"
    "other names: data.train_shards='train-{000..127}.tar' data.val_shards='val-*.tar'"
)
_MOST = 1_000_000  # shards that a pattern may name
_NAME_LISTS = ("classes.txt", "classnames.txt", "dataset_info.json", "_info.json", "info.json")


class Shard(NamedTuple):
    """A shard, and what it is known by.

    Attributes:
        path: Where it lies, or will lie.
        address: Where the user said that it lies: a path or a URL.
    """

    path: Path
    address: str


class ShardSource:
    """Samples in shards, in the order of the shards.

    Args:
        shards: The shards.
        indexes: The index of each.
        targets: Of all samples.
        class_names: The classes.
        location: What the shards' addresses have in common.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        indexes: Sequence[TarIndex],
        *,
        targets: np.ndarray,
        class_names: list[str],
        location: str,
    ) -> None:
        self.location = location
        self.class_names = class_names
        self.targets: list[int] = targets.tolist()
        self.paths = [os.fspath(shard.path) for shard in shards]
        self.shard_names = [shard_name(shard.address, location) for shard in shards]
        self.states = [(index.size, index.mtime_ns) for index in indexes]
        # One array of each kind for all samples and no object per sample: 50 to 100 bytes of memory for each.
        self.first = np.cumsum([0, *(len(index.offsets) for index in indexes)])
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.names = np.concatenate([index.names for index in indexes])
        lengths = np.concatenate([np.diff(index.ends, prepend=0) for index in indexes])
        self.name_ends = np.cumsum(np.concatenate([[0], lengths]))

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, index: int) -> str:
        start, end = self.name_ends[index], self.name_ends[index + 1]
        member = self.names[start:end].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.shard_names[self._shard(index)]}/{member}"

    def open(self, index: int) -> io.BytesIO:
        shard = self._shard(index)
        path, size = self.paths[shard], int(self.sizes[index])
        with open(
            path, "rb", buffering=0
        ) as file:  # by each reader for itself: processes and threads share no position
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self.states[shard]:
                raise OSError(f"shard '{path}' has changed since the run began")
            file.seek(int(self.offsets[index]))
            data = bytearray()
            while len(data) < size and (block := file.read(size - len(data))):
                data += block
        if len(data) < size:
            raise OSError(f"shard '{path}' ends {size - len(data):,} bytes too early")
        return io.BytesIO(data)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.first, index, side="right")) - 1


def class_names(data: DataSection) -> list[str]:
    """The classes that a list beside the shards names, or else those of the training labels.

    Raises:
        ConfigError: As of `sources`.
    """
    shards, _ = find_shards(data)
    train = shards["train"]
    return _class_names(data, train, _indexed({"train": train}, data)["train"])


def sources(data: DataSection) -> Sources:
    """The samples in the shards of each part.

    Raises:
        ConfigError: For shards that are missing or damaged, and labels that are missing or unknown.
    """
    shards, left_out = find_shards(data)
    indexes = _indexed(shards, data)
    names = _class_names(data, shards["train"], indexes["train"])
    found = {}
    for part, members in shards.items():
        unlabelled = next((index.unlabelled for index in indexes[part] if index.unlabelled), "")
        if part == "test" and unlabelled:
            left_out.append(f"the test shards ({unlabelled.splitlines()[0]})")
            continue
        found[part] = ShardSource(
            members,
            indexes[part],
            targets=_targets(members, indexes[part], names),
            class_names=names,
            location=_common([shard.address for shard in members]),
        )
    if len(names) < 2:
        raise ConfigError(f"the training shards have one class, '{names[0]}'; at least two are needed")
    kinds: Counter[str] = Counter()
    for index in itertools.chain.from_iterable(indexes.values()):
        kinds.update(index.left_out)
    left_out += [f"{count:,} {kind}" for kind, count in kinds.items()]
    return Sources(found["train"], found.get("val"), ", ".join(left_out), found.get("test"))


def find_shards(data: DataSection) -> tuple[dict[str, list[Shard]], list[str]]:
    """The shards of each part, and in words what lies beside them unused.

    Returns:
        Parts `train`, and `val` and `test` where there are any.
    """
    shards: dict[str, list[Shard]] = {}
    left_out: list[str] = []
    if data.train_shards is None and data.val_shards is not None:
        raise ConfigError("data.val_shards: needs data.train_shards as well")
    if data.train_shards is None:
        if data.root is None:
            raise ConfigError("data.root: dataset 'webdataset' needs a root, or data.train_shards")
        if _scheme(data.root):
            raise ConfigError(
                f"data.root: '{shown(data.root)}' cannot be listed, so the shards must be named, for example\n"
                "data.train_shards='train-{0000..1023}.tar' data.val_shards='val-{00..63}.tar'"
            )
        shards, left_out = _by_name(Path(data.root).expanduser())
    else:
        shards["train"] = _named(data.train_shards, "data.train_shards", data)
        if data.val_shards is not None:
            shards["val"] = _named(data.val_shards, "data.val_shards", data)
    seen: dict[Path, str] = {}
    for part, members in shards.items():
        for shard in members:
            if shard.path in seen:
                where = f"in {seen[shard.path]} and in {part}" if seen[shard.path] != part else f"twice in {part}"
                raise ConfigError(f"shard '{shown(shard.address)}' is {where}; a sample belongs to one part")
            seen[shard.path] = part
    return shards, left_out


def _by_name(root: Path) -> tuple[dict[str, list[Shard]], list[str]]:
    """Shards that are known by the names of their folders, or by their own."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ConfigError(f"data.root: '{root}' {what}{nearest_beside(root)}\n{_LAYOUT}")
    here = _list(root)
    used: set[str] = set()

    def part(word: str) -> list[Shard]:
        names = [name for name in here if re.fullmatch(rf"(?:.*[-_.])?{word}(?:[-_.].*)?\.tar[.\w]*", name, re.I)]
        folders = [name for name in here if name.lower() == word and (root / name).is_dir()]
        if folders:
            names = [os.path.join(folder, name) for folder in folders for name in _list(root / folder)]
        used.update(names)
        for name in names:
            tool = PACKED_ENDS.get(os.path.splitext(name)[1].lower())
            if tool and re.search(r"\.(?:tar\.|t)\w+$", name, re.I):
                raise packed(root / name, tool)
        return [Shard(root / name, str(root / name)) for name in names if name.lower().endswith(".tar")]

    train = part("train")
    if not train:
        raise ConfigError(f"data.root: '{root}' has no training shards ({_there(here)})\n{_LAYOUT}")
    shards = {"train": train}
    for word in VAL_FOLDERS:
        if found := part(word):
            shards.setdefault("test" if word == "test" else "val", found)
    others = [name for name in here if name.lower().endswith(".tar") and name not in used]
    return shards, [f"{len(others):,} other shards"] if others else []


def _named(patterns: str, key: str, data: DataSection) -> list[Shard]:
    """The shards that patterns with braces or wildcards name, several separated by ::, in that order."""
    shards: list[Shard] = []
    for pattern in patterns.split("::"):
        for address in _expanded(pattern.strip(), key):
            shards += _at(_joined(data.root, address), key, data)
    missing = [shard for shard in shards if not _is_remote(shard.address) and not shard.path.is_file()]
    if missing:
        first = missing[0].path
        raise ConfigError(
            f"{key}: '{first}' does not exist{nearest_beside(first)} ({len(missing):,} of {len(shards):,} shards are "
            f"missing)\nin '{first.parent}': {_there(_list(first.parent)) if first.parent.is_dir() else 'no such folder'}"
        )
    for shard in shards:
        if tool := PACKED_ENDS.get(os.path.splitext(shard.path.name)[1].lower()):
            raise packed(shard.path, tool)
    return shards


def _expanded(pattern: str, key: str) -> list[str]:
    """A pattern without its braces, as WebDataset expands them."""
    if "{" not in pattern:
        return [pattern]
    ends = re.findall(r"\{([0-9]+)\.\.([0-9]+)\}", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ends) > _MOST:  # all would be made at once
        raise ConfigError(f"{key}: '{shown(pattern)}' names more than {_MOST:,} shards")
    try:
        import braceexpand
    except ImportError as error:
        raise ConfigError(f"{key}: braces need the package braceexpand: pip install 'drop-path-zoo[data]'") from error
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"{key}: the braces of '{shown(pattern)}' do not match: {error}") from error


def _joined(root: str | None, address: str) -> str:
    if _scheme(address) or os.path.isabs(address) or address.startswith("~"):
        return address
    if root is not None and _scheme(root):
        return f"{root.rstrip('/')}/{address}"
    return str(Path(root or ".").expanduser() / address)


def _scheme(address: str) -> str:
    """What stands before the colon of a URL; empty for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]+):", address)
    return match[1] if match else ""


def _is_remote(address: str) -> bool:
    return _scheme(address) in ("http", "https")


def _at(address: str, key: str, data: DataSection) -> list[Shard]:
    """The shards at one address, which may have wildcards where it is a path."""
    scheme = _scheme(address)
    if _is_remote(address):
        where, _, name = urlsplit(address).path.rpartition("/")
        if not name:
            raise ConfigError(f"{key}: '{shown(address)}' names no file")
        place = hashlib.sha256(f"{urlsplit(address).netloc}{where}".encode()).hexdigest()[:16]
        return [Shard(_cache(data) / place / Path(unquote(name)).name, address)]
    if scheme and scheme != "file":
        raise ConfigError(
            f"{key}: '{shown(address)}' is read neither from here nor as a stream: expected a path, https:, http: or "
            "file:\nfetch the shards with that service's own tool, and give their folder as data.root"
        )
    path = url2pathname(urlsplit(address).path) if scheme else os.path.expanduser(address)
    if not glob.has_magic(path) or os.path.exists(path):
        return [Shard(Path(path), path)]
    found = sorted(glob.glob(path))
    if not found:
        folder = Path(path).parent
        there = _there(_list(folder)) if folder.is_dir() else f"no folder '{folder}'"
        raise ConfigError(f"{key}: '{path}' matches nothing ({there})\n{_LAYOUT.splitlines()[1]}")
    return [Shard(Path(name), name) for name in found]


def _cache(data: DataSection) -> Path:
    return Path(data.cache).expanduser() if data.cache else cache_folder() / "shards"


def _list(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and not name.endswith(".npz"))
    except OSError as error:
        raise ConfigError(f"data.root: '{folder}' cannot be listed: {error.strerror}") from error


def _there(names: Sequence[str]) -> str:
    if not names:
        return "it is empty"
    return f"there: {', '.join(names[:5])}" + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _plain(address: str) -> str:
    """An address as messages and names show it, with / between its parts on every system."""
    return shown(address) if _is_remote(address) else Path(address).as_posix()


def _common(addresses: Sequence[str]) -> str:
    """The folder or URL in which all shards of a part lie: what their names are relative to, so that data may move."""
    folders = [_plain(address).split("/")[:-1] for address in addresses]
    low, high = min(folders), max(folders)  # what these share, all share
    shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))]
    return "/".join(shared) or ("/" if shared else ".")


def shard_name(address: str, location: str) -> str:
    """What a shard is known by wherever the shards lie."""
    return _plain(address).removeprefix(location.rstrip("/") + "/")


def _indexed(shards: dict[str, list[Shard]], data: DataSection) -> dict[str, list[TarIndex]]:
    """The indexes of all shards, fetched before where they have to be."""
    for part, members in shards.items():
        remote = {shard.address: shard.path for shard in members if _is_remote(shard.address)}
        fetch(remote, key=f"data.{part}_shards")
    every = [shard.path for members in shards.values() for shard in members]
    make = partial(index_of, keys=Keys(data.label_key, data.image_key))
    with ThreadPoolExecutor(max_workers=4) as pool:  # a slow disk is asked for several at once
        bar = tqdm(pool.map(make, every), total=len(every), desc="indexing shards", unit="", leave=False,
                   disable=len(every) < 16)  # fmt: skip
        made = iter(list(bar))
    return {part: [next(made) for _ in members] for part, members in shards.items()}


def _class_names(data: DataSection, train: Sequence[Shard], indexes: Sequence[TarIndex]) -> list[str]:
    """The classes in the order of their targets: as a list beside the shards has them, or else of the labels."""
    for shard, index in zip(train, indexes, strict=True):
        if index.unlabelled:
            raise ConfigError(f"shard '{shard.path}': {index.unlabelled}")
    for folder in _folders(data, train):
        for name in _NAME_LISTS:
            if (folder / name).is_file() and (names := _listed(folder / name, data.label_key or "label")):
                return names
    texts = sorted(set().union(*(index.texts for index in indexes)))
    if all(re.fullmatch(r"[+-]?[0-9]+", text) for text in texts):
        return [str(number) for number in sorted({int(text) for text in texts if int(text) >= 0})]
    return texts


def _folders(data: DataSection, train: Sequence[Shard]) -> list[Path]:
    """Where a list of the classes may lie."""
    root = [] if data.root is None or _scheme(data.root) else [Path(data.root).expanduser()]
    return [*root, train[0].path.parent]


def _listed(file: Path, label: str) -> list[str] | None:
    """The classes in a file; None where it does not say them."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors put a mark in front
        if file.suffix == ".txt":
            names = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            names = _names_in(json.loads(text), label)
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}', the list of classes, cannot be read: {error}") from error
    if names is not None and (twice := [name for name, count in Counter(names).items() if count > 1]):
        raise ConfigError(f"'{file}' lists the class '{twice[0]}' twice")
    return names


def _names_in(info: Any, label: str) -> list[str] | None:
    """The names in a `dataset_info.json` as Hugging Face writes it, or in a list `class_names` or `classes`."""
    if not isinstance(info, dict):
        return None
    features = info.get("features")
    features = features if isinstance(features, dict) else {}
    columns = [label, "cls", "label", *features]
    found = [features[column].get("names") for column in columns if isinstance(features.get(column), dict)]
    for names in (info.get("class_names"), info.get("classes"), *found):
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return names
    return None


def _targets(shards: Sequence[Shard], indexes: Sequence[TarIndex], names: list[str]) -> np.ndarray:
    """Of each sample, its class's place in the list of names.

    Raises:
        ConfigError: For a sample without a label, or with one that the list does not have.
    """
    places = {name: place for place, name in enumerate(names)}
    numbers = all(re.fullmatch(r"[0-9]+", name) for name in names)
    found = []
    for shard, index in zip(shards, indexes, strict=True):
        if index.unlabelled:
            raise ConfigError(f"shard '{shard.path}': {index.unlabelled}")
        targets = [_target(text, places, numbers=numbers) for text in index.texts]
        for code, target in enumerate(targets):
            if target is None:
                row = int(np.flatnonzero(index.labels == code)[0])
                start, end = (0, *index.ends)[row], index.ends[row]
                member = index.names[start:end].tobytes().decode("utf-8", "replace")
                text = index.texts[code]
                known = f"{counted(len(names), 'class')}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
                raise ConfigError(
                    f"shard '{shard.path}': the label of '{member}' is {text!r}, which is no class"
                    f"{nearest(text, names)}\n{known}"
                )
        found.append(np.array(targets, dtype=np.int64)[index.labels])
    return np.concatenate(found)


def _target(text: str, places: dict[str, int], *, numbers: bool) -> int | None:
    """The target of a label: a class's name, or a number, which is its place in a list of other names."""
    if text in places:
        return places[text]
    if re.fullmatch(r"[0-9]+", text):
        if numbers:
            return places.get(str(int(text)))
        return int(text) if int(text) < len(places) else None
    return None
