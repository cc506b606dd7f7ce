"""Images in ROOT/train/CLASS and ROOT/val/CLASS."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from files.errors import ConfigError, nearest
from training.data.images import image_extensions
from training.data.source import Sources, name_below

if TYPE_CHECKING:
    from training.config import DataSection

VAL_FOLDERS = ("val", "valid", "validation", "test")

# What file systems and tools leave beside data, in lower case; hidden folders are never read either.
JUNK_FOLDERS = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
                "system volume information"}  # fmt: skip


class FolderSource:
    """Image files below a folder.

    Args:
        folder: The folder.
        classes: Paths of the images of each class.
        class_names: The classes in the order of their targets.
    """

    def __init__(self, folder: Path, classes: Mapping[str, Sequence[str]], class_names: list[str]) -> None:
        self.location = str(folder)
        self.class_names = class_names
        self.paths = [path for name in class_names for path in classes[name]]
        self.targets = [target for target, name in enumerate(class_names) for _ in classes[name]]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return name_below(self.paths[index], self.location)

    def open(self, index: int) -> IO[bytes]:
        return open(self.paths[index], "rb")


def class_names(data: DataSection) -> list[str]:
    """The class folders of the training images, sorted.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    return sorted(scan(train_and_val_folders(_root(data))[0], LeftOut()))


def sources(data: DataSection) -> Sources:
    """The images in the two folders.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder.
    """
    train_root, val_root = train_and_val_folders(_root(data))
    left_out = LeftOut()
    train, val = scan(train_root, left_out), scan(val_root, left_out)
    if train.keys() != val.keys():
        parts = [
            f"only in {folder.name}: {_some(names)}"
            for folder, names in ((train_root, train.keys() - val.keys()), (val_root, val.keys() - train.keys()))
            if names
        ]
        raise ConfigError(f"data.root: the classes in '{train_root}' and '{val_root}' differ\n{'; '.join(parts)}")
    names = sorted(train)
    if len(names) < 2:
        raise ConfigError(f"data.root: '{train_root}' has one class folder, '{names[0]}'; at least two are needed")
    return Sources(FolderSource(train_root, train, names), FolderSource(val_root, val, names), str(left_out))


def _root(data: DataSection) -> Path:
    if data.root is None:
        raise ConfigError("data.root: is needed by data.dataset 'folder'")
    return Path(data.root).expanduser()


def train_and_val_folders(root: Path) -> tuple[Path, Path]:
    layout = "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg"
    if not root.exists():
        parent = root.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        raise ConfigError(f"data.root: '{root}' does not exist{nearest(root.name, siblings)}\n{layout}")
    if not root.is_dir():
        raise ConfigError(f"data.root: '{root}' is a file, not a folder\n{layout}")
    found = [entry.name for entry in _subfolders(root)]

    def named(*allowed: str) -> str | None:
        for name in allowed:
            same = [entry for entry in found if entry.lower() == name]
            if len(same) > 1:
                raise ConfigError(f"data.root: '{root}' has both {_some(same)}; keep one")
            if same:
                return same[0]
        return None

    train = named("train")
    if train is None:
        what = f"folders there: {_some(found)}" if found else "it has no folders"
        raise ConfigError(f"data.root: '{root}' has no folder 'train' ({what})\n{layout}")
    val = named(*VAL_FOLDERS)
    if val is None:
        raise ConfigError(
            f"data.root: '{root}' has no folder for validation (folders there: {_some(found)})\n"
            f"allowed names: {', '.join(VAL_FOLDERS)}, in small letters or capitals"
        )
    return root / train, root / val


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
                kinds = [f"{count:,} {kind}" for kind, count in counts.most_common(8)]
                kinds += [f"{len(counts) - 8} more kinds"] if len(counts) > 8 else []
                parts.append(f"{total:,} {what}{'s' * (total > 1)} ({', '.join(kinds)})")
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


def scan(folder: Path, left_out: LeftOut) -> dict[str, list[str]]:
    """Paths of each class's images, sorted, from all levels below the class folder (as torchvision's ImageFolder).

    Links are followed, and no folder is read twice: it belongs to the class in which it really lies, and a link to a
    folder that is read already, or that lead back up, is passed over and counted.

    Raises:
        ConfigError: Where images would belong to two classes, or a class has none.
    """
    readers: dict[FolderId, tuple[str, bool]] = {}  # by which class a folder is read, and whether by way of a link
    above = _ids_above(folder) | {_folder_id(folder)}
    classes: dict[str, list[str]] = {}
    left: dict[str, LeftOut] = {}
    for entry in _subfolders(folder, left_out):
        identity = _folder_id(entry.path)
        if identity in readers or identity in above:
            other = f"class '{readers[identity][0]}'" if identity in readers else "one above it"
            raise ConfigError(f"data.root: class folder '{entry.path}' is the same folder as {other}; remove one name")
        readers[identity] = (entry.name, False)
        classes[entry.name] = []
        left[entry.name] = LeftOut()
    if not classes:
        raise ConfigError(f"data.root: '{folder}' has no class folders; expected {folder.name}/CLASS/*.jpg")
    for name in classes:
        above |= _ids_above(folder / name)  # a class folder may itself be a link to elsewhere

    links: list[tuple[str, str]] = []  # class and path, followed after all folders, so that real ones come first

    def read(name: str, path: str, by_link: bool) -> None:
        pending = [path]
        while pending:
            for entry in _entries(pending.pop()):
                if not _is_folder(entry):
                    _take(entry, classes[name], left[name])
                elif _is_junk(entry):
                    left[name].folders[entry.name] += 1
                elif entry.is_symlink():
                    links.append((name, entry.path))
                elif claim(name, entry.path, by_link):
                    pending.append(entry.path)

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
        read(name, os.path.join(folder, name), by_link=False)
    for name, path in links:  # grows while it is read
        if claim(name, path, by_link=True):
            read(name, path, by_link=True)

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
    return {name: sorted(paths) for name, paths in classes.items()}


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
