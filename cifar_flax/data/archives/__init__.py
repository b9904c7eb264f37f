"""Read datasets from files: CIFAR's binary and Python versions, Parquet files of the Hugging Face hub, and `.npz`.

To add a format, write a file with a reader, and add it to `find` and `Archive.read`. Nothing in the files of users is
executed, or unpacked to disk.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_flax import packages
from cifar_flax.data.archives import cifar, npz, parquet
from cifar_flax.data.archives.split import CLASS_NAMES, Batches, Split, numbered
from cifar_flax.data.images import resize
from cifar_flax.errors import ConfigError, UserError, one_line
from cifar_flax.runtime.streams import printable

_ALLOWED = (
    "must be CIFAR's binary or Python version (.tar.gz, .tar or folder), Parquet files of the Hugging Face hub, or .npz"
)


@dataclass(frozen=True, slots=True)
class Archive:
    """Files that hold a dataset."""

    path: Path  # as the user named it
    format: str  # binary, python, parquet or npz
    files: tuple[Path, ...]  # all that are read

    def read(self, split: str, name: str, image_size: int = 0) -> Split:
        """Return the split "train" or "test", with images of `image_size` pixels per side if that is not 0.

        If the files do not name the classes, those of cifar10 or cifar100 are used if `name`, which is `data.name`, and
        the images fit. Raise `UserError`, also while the batches are consumed, if contents are missing or damaged.
        """
        with _refusing(self.path):
            if self.format == "parquet":
                found = parquet.read(self.files, split, image_size)
            else:
                found = (npz if self.format == "npz" else cifar).read(self.path, split)
            height, width, channels = found.image_shape
            class_names = tuple(map(printable, found.class_names))
            known = CLASS_NAMES.get(name.partition(":")[0], ())
            if class_names == numbered(len(known)) and found.image_shape == (32, 32, 3):
                class_names = known
            if known and len(class_names) != len(known) and self.format in ("binary", "python"):
                raise UserError(f"has {len(class_names)} classes, but {name} has {len(known)}; set data.name")
            if len({*class_names}) < len(class_names):
                raise UserError("its classes must have different names")
        shape = image_size or height, image_size or width, channels
        return Split(self._checked(found.batches, shape, len(class_names)), shape, class_names)

    def _checked(self, batches: Batches, shape: tuple[int, int, int], classes: int) -> Batches:
        """Yield `batches`, with images of `shape`; check the labels."""
        with _refusing(self.path):
            labels = np.empty(0)
            for images, labels in batches:
                for label in (labels.min(), labels.max()):
                    if not 0 <= label < classes:
                        raise UserError(f"contains label {label}; labels must be 0 to {classes - 1}")
                if images.shape[1:] != shape:
                    packages.load("pillow")
                    images = np.stack([resize(image, shape) for image in images])
                yield images, labels.astype(np.int32)
            if not len(labels):
                raise UserError("a split contains no images")

    def official(self) -> str:
        """Return a line that reports whether the file is the official one; "" for folders and formats without one."""
        if self.format not in ("binary", "python") or self.path.is_dir():
            return ""
        with _refusing(self.path), self.path.open("rb") as file:
            layout, _ = cifar.find(self.path) or (cifar.LAYOUTS[0], ())
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == layout.md5:
            return f"{self.path.name} is the official file (md5 {found})"
        return f"{self.path.name} is not the official file (md5 {found}, official: {layout.md5})"


def find(path: Path) -> Archive:
    """Return the dataset in the file or folder `path`, whose format the content decides, without reading images.

    Raise `ConfigError` if `path` does not exist, and `UserError` if it holds no dataset.
    """
    if not os.path.isfile(path) and not os.path.isdir(path):  # os.path does not raise if a folder is not readable
        raise ConfigError(f"data.archive={str(path)!r}: no such file or folder")
    with _refusing(path):
        with contextlib.nullcontext() if path.is_dir() else path.open("rb") as file:
            head = file.read(4) if file else b""
        packed, table = head[:2] == b"PK", head == b"PAR1"
        if packed and {name for each in npz.NAMES for name in each} & {*npz.names(path)}:
            return Archive(path, "npz", (path,))
        if not packed and not table and (found := cifar.find(path)):
            return Archive(path, found[0].format, found[1])
        if (table or path.is_dir()) and (files := parquet.find(path)):
            return Archive(path, "parquet", files)
        if path.is_dir():
            there = [file.name for file in path.iterdir()]
        else:
            there = npz.names(path) if packed else [path.name] if table else [name for name, _ in cifar.members(path)]
        closest = min(there, key=lambda name: ("batch" not in name and "train" not in name, name), default="")
        holds = f"{closest[:60]!r} and {len(there) - 1} more" if there else "nothing"
        raise UserError(f"{_ALLOWED}. It contains {holds}")


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Convert errors to a `UserError` of one line; libraries may raise anything for a damaged file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.archive={str(path)!r}: {error}") from error
    except Exception as error:
        raise UserError(
            f"data.archive={str(path)!r}: cannot be read ({one_line(error)}); it is incomplete, or {_ALLOWED}"
        ) from error
