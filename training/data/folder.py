"""Images in ROOT/train/CLASS and ROOT/val/CLASS, or in one of ROOT/train/CLASS and ROOT/CLASS, to be split."""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from files.errors import ConfigError, nearest, one_line
from files.words import counted
from training.data.images import image_extensions
from training.data.names import Names
from training.data.source import Sources
from training.data.split import splits

if TYPE_CHECKING:
    from training.config import DataSection

VAL_FOLDERS = ("val", "valid", "validation", "test")
TEST_FOLDER = "test"  # beside one of the others, or where the training images are split

# What file systems and tools leave beside data, in lower case; hidden folders are never read either.
JUNK_FOLDERS = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
                "system volume information"}  # fmt: skip


class FolderSource:
    """Image files below a folder.

    Args:
        folder: The folder.
        classes: Of each class, the paths of its images below the class's folder.
        class_names: The classes in the order of their targets.
    """

    def __init__(self, folder: Path, classes: Mapping[str, Sequence[str]], class_names: list[str]) -> None:
        self.location = str(folder)
        self.class_names = class_names
        self.paths = [classes[name] for name in class_names]
        self.starts = list(itertools.accumulate(map(len, self.paths), initial=0))
        self.targets = [target for target, name in enumerate(class_names) for _ in classes[name]]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        name, path = self._place(index)
        return f"{name}/{path.replace(os.sep, '/')}"

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.location, *self._place(index)), "rb")

    def _place(self, index: int) -> tuple[str, str]:
        """The class's name, and the path below its folder."""
        index = range(len(self.targets))[index]  # which may count from the end
        target = self.targets[index]
        return self.class_names[target], self.paths[target][index - self.starts[target]]


def class_names(data: DataSection) -> list[str]:
    """The class folders of the training images, sorted.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    return sorted(scan(part_folders(_root(data), split=splits(data)).train, LeftOut()))


def sources(data: DataSection) -> Sources:
    """The images in the folders of the parts that there are; where a validation part is to be split off, `val` is None.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder.
    """
    folders = part_folders(_root(data), split=splits(data))
    left_out = LeftOut()
    train = scan(folders.train, left_out)
    val = None if folders.val is None else scan(folders.val, left_out)
    if val is not None and train.keys() != val.keys():
        assert folders.val is not None
        parts = [
            f"only in {folder.name}: {_some(names)}"
            for folder, names in ((folders.train, train.keys() - val.keys()), (folders.val, val.keys() - train.keys()))
            if names
        ]
        raise ConfigError(f"data.root: the classes in '{folders.train}' and '{folders.val}' differ\n{'; '.join(parts)}")
    names = sorted(train)
    if len(names) < 2:
        raise ConfigError(f"data.root: '{folders.train}' has one class folder, '{names[0]}'; at least two are needed")
    test, passed_over = (None, "") if folders.test is None else _test_part(folders.test, names, left_out)
    return Sources(
        FolderSource(folders.train, train, names),
        None if folders.val is None or val is None else FolderSource(folders.val, val, names),
        ", ".join(part for part in (str(left_out), passed_over) if part),
        test,
    )


def _test_part(folder: Path, class_names: list[str], left_out: LeftOut) -> tuple[FolderSource | None, str]:
    """The test images, or why there are none: such folders often hold images without classes, which stop no training."""
    mine = LeftOut()
    try:
        classes = scan(folder, mine)
    except ConfigError:
        return None, f"folder '{folder.name}' (no classes with images)"
    if others := classes.keys() - set(class_names):
        return None, f"folder '{folder.name}' (classes that training has not: {_some(others)})"
    left_out.add(mine)
    return FolderSource(folder, {name: classes.get(name, []) for name in class_names}, class_names), ""


def _root(data: DataSection) -> Path:
    if data.root is None:
        raise ConfigError("data.root: is needed by data.dataset 'folder'")
    return Path(data.root).expanduser()


class PartFolders(NamedTuple):
    """Where the class folders of each part are; None for a part that is not there."""

    train: Path
    val: Path | None
    test: Path | None


def part_folders(root: Path, *, split: bool) -> PartFolders:
    """The folders of the parts below a root.

    Args:
        root: Holds train and val, or train alone, or the classes themselves.
        split: A validation part will be split off: a folder 'test' is then no substitute for it, and the root may hold the
            classes.

    Raises:
        ConfigError: For a root that does not exist or holds none of these.
    """
    layout = "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg"
    if split:
        layout = "expected ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg"
    if not root.exists():
        parent = root.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        raise ConfigError(f"data.root: '{root}' does not exist{nearest(root.name, siblings)}\n{layout}")
    if not root.is_dir():
        raise ConfigError(f"data.root: '{root}' is a file, not a folder\n{layout}")
    found = [entry.name for entry in _subfolders(root)]

    def named(*allowed: str) -> Path | None:
        for name in allowed:
            same = [entry for entry in found if entry.lower() == name]
            if len(same) > 1:
                raise ConfigError(f"data.root: '{root}' has both {_some(same)}; keep one")
            if same:
                return root / same[0]
        return None

    train, val = named("train"), named(*(VAL_FOLDERS[:-1] if split else VAL_FOLDERS))
    test = None if val is not None and val.name.lower() == TEST_FOLDER else named(TEST_FOLDER)
    if train is None:
        if split and found and val is None and test is None:
            return PartFolders(root, None, None)
        what = f"folders there: {_some(found)}" if found else "it has no folders"
        if found and val is None and test is None:
            layout += "; are these the classes? data.val_fraction=0.1 splits them"
        raise ConfigError(f"data.root: '{root}' has no folder 'train' ({what})\n{layout}")
    if val is None and not split:
        raise ConfigError(
            f"data.root: '{root}' has no folder for validation (folders there: {_some(found)})\n"
            f"allowed names: {', '.join(VAL_FOLDERS)}, in small letters or capitals; or hold training images back for it: "
            "data.val_fraction=0.1"
        )
    return PartFolders(train, val, test)


class LeftOut:
    """What a walk over folders leaves out, counted by kind; `str()` says it in words.

    Attributes:
        files: Number by kind: the end of the name, or "hidden" and the like.
        folders: Number by name, of hidden folders and those in JUNK_FOLDERS; what is in them is not counted.
        links: Links to a folder that is read elsewhere, or that lead back up.
    """

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.folders: Counter[str] = Counter()
        self.links = 0

    def add(self, other: LeftOut) -> None:
        """Counts what another walk left out as well."""
        self.files += other.files
        self.folders += other.folders
        self.links += other.links

    def __str__(self) -> str:
        parts = []
        for counts, what in ((self.files, "file"), (self.folders, "folder")):
            if total := counts.total():
                kinds = [f"{count:,} {one_line(kind)}" for kind, count in counts.most_common(8)]
                kinds += [f"{len(counts) - 8} more kinds"] if len(counts) > 8 else []
                parts.append(f"{counted(total, what)} ({', '.join(kinds)})")
        if self.links:
            parts.append(
                "1 link to a folder read already"
                if self.links == 1
                else f"{self.links:,} links to folders read already"
            )
        return ", ".join(parts)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name.

    Raises:
        ConfigError: If it cannot be listed; what is in it must not vanish in silence.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"data.root: '{folder}' cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_junk(folder: os.DirEntry[str]) -> bool:
    return folder.name.startswith(".") or folder.name.lower() in JUNK_FOLDERS


def _subfolders(folder: Path, left_out: LeftOut | None = None) -> list[os.DirEntry[str]]:
    """The folders in a folder, sorted, without hidden ones such as .ipynb_checkpoints and junk such as __MACOSX."""
    left_out = LeftOut() if left_out is None else left_out
    found = []
    for entry in _entries(folder):
        if not _is_folder(entry):
            left_out.files[f"{_kind(entry)} beside the class folders"] += 1
        elif _is_junk(entry):
            left_out.folders[entry.name] += 1
        else:
            found.append(entry)
    return found


def _kind(file: os.DirEntry[str]) -> str:
    """What a file that is left out is counted as."""
    if file.name.startswith("."):
        return "hidden"
    try:
        if not file.is_file():
            return "broken link" if file.is_symlink() else "no regular file"
    except OSError:  # a link in a circle
        return "broken link"
    end = os.path.splitext(file.name)[1].lower()
    return os.fsencode(end).decode(errors="replace") or "without an extension"


FolderId = tuple[int, int] | str


def _folder_id(path: str | Path) -> FolderId:
    """The same for all paths to one folder."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _ids_above(folder: Path) -> set[FolderId]:
    """Of the folders that a folder really lies in, up to the root of the file system."""
    return {_folder_id(parent) for parent in Path(os.path.realpath(folder)).parents}


def scan(folder: Path, left_out: LeftOut) -> dict[str, Names]:
    """Of each class, the paths of its images below its folder, sorted, of all levels (as torchvision's ImageFolder).

    Links are followed, and no folder is read twice: it belongs to the class in which it really lies, and a link to a
    folder that is read already, or that lead back up, is passed over and counted.

    Raises:
        ConfigError: Where images would belong to two classes, or a class has none.
    """
    readers: dict[FolderId, tuple[str, bool]] = {}  # by which class a folder is read, and whether by way of a link
    above = _ids_above(folder) | {_folder_id(folder)}
    classes: dict[str, Names] = {}
    left: dict[str, LeftOut] = {}
    for entry in _subfolders(folder, left_out):
        identity = _folder_id(entry.path)
        if identity in readers or identity in above:
            other = f"class '{readers[identity][0]}'" if identity in readers else "one above it"
            raise ConfigError(f"data.root: class folder '{entry.path}' is the same folder as {other}; remove one name")
        readers[identity] = (entry.name, False)
        classes[entry.name] = Names()
        left[entry.name] = LeftOut()
    if not classes:
        raise ConfigError(f"data.root: '{folder}' has no class folders; expected {folder.name}/CLASS/*.jpg")
    for name in classes:
        above |= _ids_above(folder / name)  # a class folder may itself be a link to elsewhere

    links: list[tuple[str, str]] = []  # class and path, followed after all folders, so that real ones come first

    def read(name: str, path: str, by_link: bool) -> list[str]:
        images: list[str] = []
        pending = [path]
        while pending:
            for entry in _entries(pending.pop()):
                if not _is_folder(entry):
                    _take(entry, images, left[name])
                elif _is_junk(entry):
                    left[name].folders[entry.name] += 1
                elif entry.is_symlink():
                    links.append((name, entry.path))
                elif claim(name, entry.path, by_link):
                    pending.append(entry.path)
        start = len(os.path.join(folder, name, ""))
        return [image[start:] for image in images]

    def claim(name: str, path: str, by_link: bool) -> bool:
        identity = _folder_id(path)
        reader, reader_by_link = readers.get(identity, (name, False))
        if by_link and reader_by_link and reader != name:
            raise ConfigError(
                f"data.root: '{path}' belongs to two classes: links lead there from '{reader}' and from '{name}'"
            )
        if identity in readers or (by_link and identity in above):
            left[name].links += 1
            return False
        readers[identity] = (name, by_link)
        return True

    for name in classes:
        classes[name] = Names(sorted(read(name, os.path.join(folder, name), by_link=False)))
    linked: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in links:  # grows while it is read
        if claim(name, path, by_link=True):
            linked[name] += read(name, path, by_link=True)
    for name, paths in linked.items():
        classes[name] = Names(sorted([*classes[name], *paths]))

    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        more = f" (and {len(empty) - 1} more such folders)" if len(empty) > 1 else ""
        said = f"; left out: {left[empty[0]]}" if str(left[empty[0]]) else ""
        raise ConfigError(
            f"data.root: class folder '{folder / empty[0]}' has no images{more}{said}\n"
            "images end in .jpg, .jpeg, .png, .webp, .tif, .gif, .bmp, .avif and others that Pillow reads"
        )
    for name in classes:
        left_out.add(left[name])
    return classes


def _take(file: os.DirEntry[str], paths: list[str], left_out: LeftOut) -> None:
    """Adds an image to `paths` and counts any other file. An image's link that leads nowhere is for the check of images
    to name: a missing image is no file of another kind.
    """
    kind = _kind(file)
    end = os.path.splitext(file.name)[1].lower() if kind == "broken link" else kind
    if end in image_extensions():
        paths.append(file.path)
    else:
        left_out.files[kind] += 1


def _some(names: Sequence[str] | set[str]) -> str:
    """Up to five names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(f"'{name}'" for name in ordered[:5]) + (
        f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    )
