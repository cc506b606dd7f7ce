"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index).

Two data sets: `digits` (scikit-learn's 1,797 handwritten digits, no download) and `folder` (ROOT/train/CLASS/*.jpg and
ROOT/val/CLASS/*.jpg). A training sample is addressed by (epoch, index) and a batch is (images, targets, indices).
Because the draws belong to the sample and not to the process that makes it, the number of workers changes nothing, a
run resumed in mid-epoch sees the images the uninterrupted one would have seen, and the training loop's own random
stream is left alone.

Libraries draw from global generators (timm's policies from Python's and NumPy's, torchvision's from torch's), so all
three are seeded before each sample and put back after each batch. Digits need none of them for crop, rotation, shift,
zoom and flip: those draws come from a counter-based hash and one affine map transforms the whole batch.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from files.errors import ConfigError, nearest
from training.data.dataset import DataBundle, TrainDataset, ValDataset
from training.data.digits import DIGIT_NAMES, _digits_bundle
from training.data.draws import _MIX, _ORDER, _global_generators_kept, _hash, _seed_global_generators
from training.data.identity import _relative, data_identity
from training.data.images import _Folder, image_extensions
from training.data.skipping import collate
from training.data.transforms import ImageSpec, _check_spec

if TYPE_CHECKING:
    from training.config import AugmentSection, DataSection


VAL_FOLDERS = ("val", "valid", "validation", "test")

# What file systems and tools leave beside data, in lower case; hidden folders are never read either.
JUNK_FOLDERS = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
                "system volume information"}  # fmt: skip

logger = logging.getLogger(__name__)


def build_datasets(data: DataSection, augment: AugmentSection, spec: ImageSpec, *, seed: int) -> DataBundle:
    """Builds the training and validation data sets.

    Digits come with the augmentation that `augment` says, flips included: a config for digits sets `hflip: 0`.

    Args:
        data: Which data, and where.
        augment: How training images are changed; validation images never are.
        spec: The model's input.
        seed: The run's seed. The digits' split does not depend on it.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder, an unknown policy, or a spec that cannot be met.
    """
    _check_spec(spec)
    if augment.crop_scale is None and not np.allclose(augment.crop_ratio, (3 / 4, 4 / 3)):
        warnings.warn("augment.crop_ratio has no effect without augment.crop_scale", stacklevel=2)
    if data.dataset == "digits":
        bundle = _digits_bundle(augment, spec, seed)
    elif data.dataset == "folder":
        bundle = _folder_bundle(data, augment, spec, seed)
    else:
        raise ConfigError(f"data.dataset: {data.dataset!r} is not one of 'digits', 'folder'")
    bundle.train.replace_unreadable = data.on_error == "skip"
    return bundle


def class_names_of_data(data: DataSection) -> list[str]:
    """Names of the classes in the order of their targets, without building the data sets.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    if data.dataset == "digits" or data.root is None:
        return list(DIGIT_NAMES)
    return sorted(_scan(_train_and_val_folders(Path(data.root).expanduser())[0], LeftOut()))


def _folder_bundle(data: DataSection, augment: AugmentSection, spec: ImageSpec, seed: int) -> DataBundle:
    if data.root is None:
        raise ConfigError("data.root: is needed by data.dataset 'folder'")
    root = Path(data.root).expanduser()
    train_root, val_root = _train_and_val_folders(root)
    left_out = LeftOut()
    train, val = _scan(train_root, left_out), _scan(val_root, left_out)
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

    def flat(classes: dict[str, list[str]]) -> tuple[list[str], list[int]]:
        return (
            [path for name in names for path in classes[name]],
            [target for target, name in enumerate(names) for _ in classes[name]],
        )

    train_paths, train_targets = flat(train)
    val_paths, val_targets = flat(val)
    return DataBundle(
        train=TrainDataset(_Folder(train_paths, augment, spec), train_targets, seed=seed),
        val=ValDataset(_Folder(val_paths, augment, spec), val_targets),
        num_classes=len(names),
        class_names=names,
        left_out=str(left_out),
        identity=data_identity(
            "folder",
            names,
            {
                "train": (_relative(train_paths, train_root), train_targets),
                "val": (_relative(val_paths, val_root), val_targets),
            },
        ),
    )


def _train_and_val_folders(root: Path) -> tuple[Path, Path]:
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


def _scan(folder: Path, left_out: LeftOut) -> dict[str, list[str]]:
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


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): a permutation that is a pure function of (seed, epoch), dealt out to the ranks.

    Every rank gets the same number of whole batches and what is left over is dropped, so that no rank waits for
    another. Give it to a DataLoader as `batch_sampler`. It lives in the main process: setting its position before
    `iter(loader)` works with persistent workers too. It does not go to the next epoch by itself, since workers run
    ahead of the loop, which alone knows where it is.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """What the next `iter()` starts with: `batch` is the number of batches of that epoch already done."""
        if epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise ValueError(f"position ({epoch}, {batch}) is outside an epoch of {self.batches_per_epoch} batches")
        self.epoch = epoch
        self.start_batch = batch

    def __len__(self) -> int:
        """Batches that `iter()` will give: fewer than `batches_per_epoch` when it starts in mid-epoch."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # No generator function: the position is read now and not when the first batch is asked for.
        generator = torch.Generator().manual_seed(int(_hash(self.seed, _ORDER, self.epoch)[0]))
        order = torch.randperm(self.length, generator=generator)
        whole = order[: self.batches_per_epoch * self.world_size * self.batch_size]
        mine = whole.reshape(self.batches_per_epoch, self.world_size, self.batch_size)[self.start_batch :, self.rank]
        epoch = self.epoch
        return ([(epoch, index) for index in batch.tolist()] for batch in mine)


def build_train_loader(
    bundle: DataBundle, data: DataSection, *, seed: int, rank: int = 0, world_size: int = 1, device: torch.device
) -> DataLoader:
    """A loader whose `batch_sampler` is an EpochSampler; batches are (images, targets, indices).

    Raises:
        ConfigError: If the training set does not fill one batch on every process.
    """
    sampler = EpochSampler(len(bundle.train), data.batch_size, seed=seed, rank=rank, world_size=world_size)
    if sampler.batches_per_epoch == 0:
        processes = f" x {world_size} processes = {data.batch_size * world_size}" if world_size > 1 else ""
        most = len(bundle.train) // world_size
        advice = f"at most {most} here" if most else f"use at most {len(bundle.train)} processes"
        raise ConfigError(
            f"data.batch_size: {data.batch_size}{processes} is more than the {len(bundle.train)} training images; "
            f"{advice}"
        )
    return DataLoader(bundle.train, batch_sampler=sampler, collate_fn=collate, **_loader_options(data.workers, device))


def build_val_loader(
    bundle: DataBundle, data: DataSection, *, rank: int = 0, world_size: int = 1, device: torch.device
) -> DataLoader:
    """A loader of samples rank, rank + world_size, ... in order; the last batch may be short, a rank may have none."""
    shard = range(rank, len(bundle.val), world_size)
    batch_size = data.eval_batch_size or data.batch_size
    workers = min(data.workers, math.ceil(len(shard) / batch_size))  # a worker without a batch is of no use
    options = _loader_options(workers, device)
    return DataLoader(bundle.val, sampler=shard, batch_size=batch_size, collate_fn=collate, **options)


def _loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        # Each iter() draws a base seed for the workers. From torch's global generator, that would move the training
        # loop's random stream, and once more after a resume in mid-epoch. Nothing depends on this seed.
        "generator": torch.Generator().manual_seed(0),
    }


class BatchMixer:
    """Mixup and cutmix by timm, seeded by (seed, rank, step): a pure function of its arguments.

    If both are on, each batch takes one of them at random. Without either (`enabled` is False) images and integer
    targets pass through unchanged, and label smoothing is the loss's business; otherwise targets are soft and smoothed
    here, also after `mixup_off_epoch` (0-based: epochs from that one on are not mixed; 0 means never off), so that the
    loss does not change in mid-run.

    timm mixes sample i with sample B - 1 - i and wants an even batch: of an odd one, the last sample stays as it is.
    """

    def __init__(self, augment: AugmentSection, num_classes: int, *, seed: int, rank: int = 0) -> None:
        self.enabled = augment.mixup > 0 or augment.cutmix > 0
        self.off_epoch = augment.mixup_off_epoch
        self.seed = seed
        self.rank = rank
        self.num_classes = num_classes
        self.smoothing = augment.label_smoothing
        if self.off_epoch and not self.enabled:
            warnings.warn("augment.mixup_off_epoch has no effect without augment.mixup or augment.cutmix", stacklevel=2)
        self._mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            label_smoothing=self.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, targets: Tensor, step: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Mixes a batch; `images` may be changed in place.

        Args:
            images: (B, C, H, W).
            targets: (B,), int64.
            step: Counts batches from the start of training, so that no two have the same draws.
            epoch: 0-based, compared with `mixup_off_epoch`.

        Returns:
            Images (B, C, H, W), and targets (B, num_classes) in float32, or as given if the mixer is disabled.
        """
        if not self.enabled:
            return images, targets
        even = len(images) // 2 * 2
        if even == 0 or (self.off_epoch and epoch >= self.off_epoch):
            return images, self._unmixed(targets)
        stream = int(_hash(self.seed, _MIX, self.rank, step)[0])
        with _global_generators_kept():
            _seed_global_generators(stream)
            mixed, soft = self._mixup(images[:even], targets[:even])
        if even < len(images):
            mixed, soft = torch.cat([mixed, images[even:]]), torch.cat([soft, self._unmixed(targets[even:])])
        return mixed, soft

    def _unmixed(self, targets: Tensor) -> Tensor:
        return mixup_target(targets, self.num_classes, smoothing=self.smoothing)
