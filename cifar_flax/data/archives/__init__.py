"""Read datasets from files: CIFAR's binary and Python versions, Parquet files of the Hugging Face hub, and `.npz`.

`find` recognizes the format from the content. To add a format, write a file with a reader, and add it to `find` and
`Archive.read`. Nothing in a file is executed or unpacked to disk.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cifar_flax import packages
from cifar_flax.data.archives import binary, cifar, members, npz, parquet, python
from cifar_flax.data.archives.split import Batches, Shape, Split, numbered
from cifar_flax.data.images import resize
from cifar_flax.errors import ConfigError, UserError, one_line
from cifar_flax.runtime.streams import printable

_ALLOWED = (
    "must be CIFAR's binary or Python version (.tar.gz, .tar or folder), a folder of Parquet files of the Hugging Face "
    "hub, or .npz"
)


@dataclass(frozen=True, slots=True)
class Archive:
    """Files that hold a dataset."""

    path: Path  # as the user named it
    format: str  # binary, python, parquet or npz
    files: tuple[Path, ...]  # all that are read

    def read(self, split: str, name: str, image_size: int = 0) -> Split:
        """Return the split "train" or "test", with images of `image_size` pixels per side, if it is not 0.

        `name` is `data.name`: if the files do not name the classes of cifar10 or cifar100, it does. Raise `UserError`
        if the contents are missing, duplicated or damaged, also while the batches are consumed.
        """
        with _refusing(self.path):
            found = self._read(split, image_size)
            named = cifar.CLASS_NAMES.get(name.partition(":")[0], ())
            if found.image_shape == (32, 32, 3) and found.class_names == numbered(len(named)):
                found = replace(found, class_names=named)
            if len({*found.class_names}) != len(found.class_names):
                raise UserError("its classes must have different names")
            class_names = tuple(map(printable, found.class_names))
            height, width, channels = found.image_shape
            shape = (image_size or height, image_size or width, channels)
            return Split(self._checked(found.batches, shape, len(class_names)), shape, class_names)

    def official(self) -> str:
        """Return a line that reports whether the file is the official one, or "" for formats without one."""
        if self.format not in ("binary", "python") or not self.path.is_file():
            return ""
        with _refusing(self.path), self.path.open("rb") as file:
            found, md5 = members.find(self.path), hashlib.file_digest(file, "md5").hexdigest()
        expected = found.layout.md5 if found else ""
        if md5 == expected:
            return f"{self.path.name} is the official file (md5 {md5})"
        return f"{self.path.name} is not the official file (md5 {md5}, official: {expected}); it is used"

    def _read(self, split: str, image_size: int) -> Split:
        match self.format:
            case "npz":
                return npz.read(self.path, split)
            case "parquet":
                return parquet.read(self.files, split, image_size)
        if not (found := members.find(self.path)):
            raise UserError(_ALLOWED)
        return (binary if self.format == "binary" else python).read(found, split)

    def _checked(self, batches: Batches, shape: Shape, classes: int) -> Batches:
        """Yield `batches` with images of `shape` and valid labels."""
        with _refusing(self.path):
            for images, labels in batches:
                for label in (labels.min(), labels.max()):
                    if not 0 <= label < classes:
                        raise UserError(f"contains label {label}; labels must be 0 to {classes - 1}")
                if images.shape[1:] != shape:
                    packages.load("pillow")
                    images = np.stack([resize(image, shape) for image in images])
                yield images, labels.astype(np.int32)


def find(path: Path) -> Archive:
    """Return the dataset in the file or folder `path`, without reading images.

    Raise `ConfigError` if `path` does not exist, and `UserError` if it holds no dataset.
    """
    if not path.exists():
        raise ConfigError(f"data.archive={str(path)!r}: {_ALLOWED}")
    with _refusing(path):
        head = b""
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(4)
        if head == b"PK\x03\x04":
            if npz.find(path):
                return Archive(path, "npz", (path,))
            raise UserError(f"{_ALLOWED}. {_contents(npz.names(path))}")
        if (path.is_dir() or head == b"PAR1") and (files := parquet.find(path)):
            return Archive(path, "parquet", files)
        if head != b"PAR1" and (found := members.find(path)):
            return Archive(path, found.layout.format, found.files)
        raise UserError(f"{_ALLOWED}. {_contents(members.names(path) if head != b'PAR1' else [path.name])}")
    raise AssertionError


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Convert any error to a `UserError` of one line: libraries may raise anything for a damaged file."""
    setting = f"data.archive={str(path)!r}"
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except Exception as error:
        raise UserError(f"{setting}: cannot be read ({one_line(error)}); {_ALLOWED}") from error


def _contents(names: list[str]) -> str:
    """Return a sentence about the contents that names the file that looks most like one of a dataset."""
    if not names:
        return "It contains nothing"
    closest = min(names, key=lambda name: ("batch" not in name and "train" not in name, name))
    return f"It contains {closest[:60]!r} and {len(names) - 1} more"
