"""A kind of data that only tests have: ROOT/train.zip and ROOT/val.zip, which hold CLASS/NAME. See docs/data.md."""

import io
from pathlib import Path
from zipfile import ZipFile

from training.config import DataSection
from training.data.images import image_extensions
from training.data.source import Sources


class ZipSource:
    """Images in a zip file."""

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        with ZipFile(path) as file:
            self.names = sorted(name for name in file.namelist() if Path(name).suffix.lower() in image_extensions())
        self.class_names = sorted({name.split("/")[0] for name in self.names})
        self.targets = [self.class_names.index(name.split("/")[0]) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def open(self, index: int) -> io.BytesIO:
        with ZipFile(self.location) as file:
            return io.BytesIO(file.read(self.names[index]))


def class_names(data: DataSection) -> list[str]:
    return sources(data).train.class_names


def sources(data: DataSection) -> Sources:
    assert data.root is not None
    return Sources(ZipSource(Path(data.root, "train.zip")), ZipSource(Path(data.root, "val.zip")))
