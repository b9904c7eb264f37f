"""Read CIFAR-10 and CIFAR-100 in their binary or Python version, from a folder or a tar file.

A binary record is a label (1 byte; CIFAR-100: the coarse and the fine label) and an image (3,072 bytes): a red, a green
and a blue plane of 32 rows of 32 pixels. The Python version consists of pickled dicts with arrays of such images and
lists of labels. Source: Krizhevsky, "The CIFAR-10 dataset", cs.toronto.edu/~kriz/cifar.html.
"""

import contextlib
import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from cifar_flax.data.archives import pickles
from cifar_flax.data.archives.split import Split, numbered
from cifar_flax.errors import UserError

IMAGES = {"train": 50_000, "test": 10_000}


class Layout(NamedTuple):
    """The files of one version of a dataset."""

    format: str
    folder: str
    classes: int
    image_bytes: int  # at most: a pickle of Python 3 may take two bytes for one of an image
    meta: str  # file with the names of the classes, which may be missing
    md5: str  # of the official .tar.gz

    def files(self, split: str) -> list[str]:
        """Return the names of the files of a split."""
        ten = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        return [name + ".bin" * (self.format == "binary") for name in (ten if self.classes == 10 else [split])]

    def name(self, path: str) -> str:
        """Return the name of a file, or "" if `path` is in another folder, is absolute, or is not one of the files."""
        folder, slash, name = path.removeprefix("./").rpartition("/")
        known = name in (*self.files("train"), *self.files("test"), self.meta)
        return name if known and (folder == self.folder or not slash) else ""


LAYOUTS = (
    Layout("binary", "cifar-10-batches-bin", 10, 3073, "batches.meta.txt", "c32a1d4ab5d03f1284b67883e8d87530"),
    Layout("python", "cifar-10-batches-py", 10, 6500, "batches.meta", "c58f30108f718f92721af3b95e74349a"),
    Layout("binary", "cifar-100-binary", 100, 3074, "fine_label_names.txt", "03b5dce01913d631647c71ecec9e9cb8"),
    Layout("python", "cifar-100-python", 100, 6500, "meta", "eb9058c3a382ffc7106e4002c42a8d85"),
)


def find(path: Path) -> tuple[Layout, tuple[Path, ...]] | None:
    """Return the layout of the folder or tar file `path`, and the files to read; None if it has none of them."""
    for member, _ in members(path):
        for layout in LAYOUTS:
            if layout.name(member) not in ("", layout.meta):
                found = [path / each for each, _ in members(path) if layout.name(each)] if path.is_dir() else [path]
                return layout, tuple(found)
    return None


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the names and contents of the regular files, no links, in a tar file, or of the known ones in a folder.

    Read a tar file to its end, where the checksum of gzip is: tarfile alone would not verify it.
    """
    if path.is_dir():
        for layout in LAYOUTS:
            for name in (*layout.files("train"), *layout.files("test"), layout.meta):
                for file in filter(Path.is_file, (path / name, path / layout.folder / name)):
                    with file.open("rb") as content:
                        yield file.relative_to(path).as_posix(), content
        return
    with contextlib.ExitStack() as opened:
        stream: Any = opened.enter_context(path.open("rb"))
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = opened.enter_context(gzip.open(stream))
        archive = opened.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        for member in archive:
            if member.isfile() and (extracted := archive.extractfile(member)):
                yield member.name, extracted
        while stream.read(2**20):
            pass


def read(path: Path, split: str) -> Split:
    """Return a split, with a batch for each file.

    Nothing is written to disk, and other files are ignored. Raise `UserError` if a file is missing, occurs twice, or is
    damaged; at most one byte more than it may have is read.
    """
    layout, _ = find(path) or (LAYOUTS[0], ())
    wanted, binary, fine = layout.files(split), layout.format == "binary", "fine_" if layout.classes == 100 else ""
    size, found = IMAGES[split] // len(wanted) * layout.image_bytes, dict[str, bytes]()
    for member, stream in members(path):
        if (name := layout.name(member)) in (*wanted, layout.meta):
            content = stream.read(size + 1)
            if name in found or len(content) > size or (binary and name in wanted and len(content) < size):
                raise UserError(f"{name} is damaged: must occur once and have {'' if binary else '<= '}{size:,} bytes")
            found[name] = content
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{missing[0]} not found in {layout.folder}")
    meta = found.get(layout.meta, b"")
    if binary or not meta:
        class_names = tuple(meta.decode().split())
    else:
        class_names = tuple(map(_text, _record(meta, layout.meta)[f"{fine}label_names"]))

    def batch(name: str) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Integer[np.ndarray, " n"]]:
        if binary:
            records = np.frombuffer(found[name], np.uint8).reshape(-1, layout.image_bytes)
            rows, labels = records[:, -3072:], records[:, -3073]
        else:
            record = _record(found[name], name)
            rows, labels = record["data"], np.fromiter(record[f"{fine}labels"], np.int64)
            if rows.shape != (len(labels), 3072):
                raise UserError(f"{name} is damaged: {len(labels):,} labels for images of shape {rows.shape}")
        return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels

    return Split(map(batch, wanted), (32, 32, 3), class_names or numbered(layout.classes))


def _record(content: bytes, name: str) -> dict[str, Any]:
    """Return a pickled dict."""
    try:
        return {_text(key): value for key, value in pickles.loads(content).items()}
    except (AttributeError, UserError) as error:
        raise UserError(f"{name} is not of CIFAR's Python version, or damaged: {error}") from error


def _text(value: bytes | str) -> str:
    """Return a string; those of Python 2 are bytes."""
    return value.decode() if isinstance(value, bytes) else value
