"""Find and read the files of CIFAR-10's and CIFAR-100's binary and Python versions, in a folder or a tar file.

Source: Krizhevsky, "The CIFAR-10 dataset", cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cifar_flax.errors import UserError

_META_SIZE = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one version of a dataset."""

    format: str
    folder: str
    files: dict[str, tuple[str, ...]]  # by split
    images: dict[str, int]  # in each file of a split
    meta: str  # file with the names of the classes, which may be missing
    classes: int
    md5: str  # of the official .tar.gz


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARIES = tuple(f"{name}.bin" for name in _BATCHES)
_TEN, _HUNDRED = {"train": 10_000, "test": 10_000}, {"train": 50_000, "test": 10_000}
_MD5 = {
    "cifar-10-batches-bin": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-batches-py": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python": "eb9058c3a382ffc7106e4002c42a8d85",
}
LAYOUTS = tuple(
    Layout(format, folder, {"train": train, "test": (test,)}, images, meta, classes, _MD5[folder])
    for format, folder, train, test, images, meta, classes in (
        ("binary", "cifar-10-batches-bin", _BINARIES, "test_batch.bin", _TEN, "batches.meta.txt", 10),
        ("python", "cifar-10-batches-py", _BATCHES, "test_batch", _TEN, "batches.meta", 10),
        ("binary", "cifar-100-binary", ("train.bin",), "test.bin", _HUNDRED, "fine_label_names.txt", 100),
        ("python", "cifar-100-python", ("train",), "test", _HUNDRED, "meta", 100),
    )
)


@dataclass(frozen=True, slots=True)
class Members:
    """The files of a dataset, in a folder or a tar file."""

    layout: Layout
    files: tuple[Path, ...]
    packed: bool  # files[0] is a tar file

    def read(self, split: str, limit: int) -> dict[str, bytes]:
        """Return the contents of the files of a split and, if it is there, of the file of class names, by name.

        Nothing is written to disk, links in a tar file are not followed, and other members are ignored. Raise
        `UserError` if a file is missing, occurs twice, or has more than `limit` bytes; one byte more is read.
        """
        found: dict[str, bytes] = {}
        limits = {**dict.fromkeys(self.layout.files[split], limit), self.layout.meta: _META_SIZE}
        opened = _tar(self.files[0]) if self.packed else ((file.name, file.open("rb")) for file in self.files)
        for path, stream in opened:
            with stream:
                if (name := _member(path, self.layout)) not in limits:
                    continue
                if name in found or len(content := stream.read(limits[name] + 1)) > limits[name]:
                    raise UserError(f"{name} is damaged: must occur once and have at most {limits[name]:,} bytes")
                found[name] = content
        if missing := [name for name in self.layout.files[split] if name not in found]:
            raise UserError(f"{missing[0]} not found in {self.layout.folder}")
        return found


def find(path: Path) -> Members | None:
    """Return the files of the first known layout in the folder or tar file `path`, or None if there is none."""
    if not path.is_dir():
        names = (name for name, _ in _tar(path))
        found = (layout for name in names for layout in LAYOUTS if _member(name, layout) in _images(layout))
        return next((Members(layout, (path,), True) for layout in found), None)
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            there = [folder / name for name in (*_images(layout), layout.meta) if (folder / name).is_file()]
            if any(file.name != layout.meta for file in there):
                return Members(layout, tuple(there), False)
    return None


def names(path: Path) -> list[str]:
    """Return the names of the files in the folder or tar file `path`."""
    return [file.name for file in path.iterdir()] if path.is_dir() else [name for name, _ in _tar(path)]


def _images(layout: Layout) -> tuple[str, ...]:
    return layout.files["train"] + layout.files["test"]


def _member(path: str, layout: Layout) -> str:
    """Return the name of a file of `layout`, or "" if `path` is in another folder, absolute, or leads elsewhere."""
    folder, _, name = path.removeprefix("./").rpartition("/")
    return name if folder == layout.folder or path in (name, f"./{name}") else ""


def _tar(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the names and streams of the regular files in a tar file, in one pass.

    Read it to its end, where gzip's checksum is: tarfile alone would not verify it.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with (
            gzip.open(file) if packed else nullcontext(file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in filter(tarfile.TarInfo.isfile, archive):
                if content := archive.extractfile(member):
                    yield member.name, content
            while stream.read(2**20):
                pass
