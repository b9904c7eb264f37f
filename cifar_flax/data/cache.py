"""Cache of decoded arrays: memory-mapped `.npy` files, and a manifest with their SHA-256 checksums and its own.

Layout: `<cache_dir>/<dataset>/<version>/<split>.<key>/{images.npy, labels.npy, manifest.json}`. The version is TFDS's,
or the kind of another source (see `sources.py`). The key identifies the data that was decoded (see `key`); a split
that another program stored may have none. Complete folders are renamed to their final names, so readers never see a
partial one.

The manifest also has `Arrays.checksum`, the histogram of the pixels, and checksums of blocks of `images.npy`, so that
the start of a run reads only a part of large splits. Manifests of earlier releases lack them.
"""

import errno
import hashlib
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Int32, UInt8

from cifar_flax import files
from cifar_flax.errors import UserError

_FORMAT = 2
_MANIFEST = "manifest.json"
_FILES = ("images.npy", "labels.npy")
_BLOCK = 2**24  # bytes of images.npy that have a checksum of their own
_WHOLE = 2**30  # bytes of images.npy that are verified at each start; of more, only a sample
_SAMPLE = 32  # blocks
_CHUNK = 1000  # images that are read at a time


@dataclass(frozen=True, slots=True)
class Arrays:
    """A decoded split: images, labels and a description of its dataset."""

    images: UInt8[Any, "n *image"]  # [n, height, width, channels] on the host; rows of bytes after `resident.put`
    labels: Int32[Any, " n"]
    class_names: tuple[str, ...]
    dataset: str  # name and version, such as "cifar10/3.0.2"
    files: Sequence[str] = ()  # of a folder: the path of each image, relative to the folder
    skipped: Sequence[tuple[str, str]] = ()  # of a folder: paths that cannot be read, with the reasons
    digests: Sequence[int] = ()  # of a folder: a 64-bit hash of the pixels of each image
    known_checksum: str = ""  # of images and labels, if the cache has recorded it
    histogram: Int[np.ndarray, "channels 256"] | None = None  # of the pixels, if the cache has recorded it

    @property
    def nbytes(self) -> int:
        """Return the size of the images and labels in bytes."""
        return self.images.nbytes + self.labels.nbytes

    def digest(self) -> str:
        """Return the SHA-256 checksum of the labels, in order; it does not cover the images."""
        return hashlib.sha256(np.asarray(self.labels).tobytes()).hexdigest()

    def checksum(self) -> str:
        """Return the SHA-256 checksum of images and labels on the host."""
        if self.known_checksum:
            return self.known_checksum
        whole, count = hashlib.sha256(), len(self.labels)
        for start in range(0, count, _CHUNK):
            whole.update(self.images[np.arange(start, min(start + _CHUNK, count))].data)
        whole.update(np.asarray(self.labels, "<i4").tobytes())
        return whole.hexdigest()


def pixel_histogram(
    images: UInt8[Any, "n height width channels"], examples: Int[np.ndarray, " m"]
) -> Int[np.ndarray, "channels 256"]:
    """Return how often each value occurs in each channel of the images with the indices `examples`."""
    histogram = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(examples), _CHUNK):
        chunk = images[examples[start : start + _CHUNK]]
        for channel, counts in enumerate(histogram):
            counts += np.bincount(chunk[..., channel].ravel(), minlength=256)
    return histogram


def newest(folder: Path, key: str = "") -> Path | None:
    """Return the cached split `folder` with this key, or any if it is ""; None if there is none.

    The version in `folder` may be "*", for any number. Of several, choose the highest version, and of this, the last
    one decoded.
    """
    found = []
    for manifest in folder.parent.parent.glob(f"{folder.parent.name}/{folder.name}*/{_MANIFEST}"):
        (name, _, its_key), version = manifest.parent.name.partition("."), manifest.parent.parent.name.split(".")
        numbers = list(map(int, version)) if all(map(str.isdigit, version)) else []
        if name == folder.name and key in ("", its_key) and (numbers or folder.parent.name != "*"):
            found.append((numbers, manifest.stat().st_mtime_ns, manifest.parent))
    return max(found)[-1] if found else None


def key(paths: Iterable[str | Path], *format: str) -> str:
    """Return the key of data in the files `paths`, which are read as `format`, or "" if there are none.

    It stands for the format, and for the names, sizes and times of the files.
    """
    found = []
    for path in paths:
        with suppress(OSError):  # TFDS removes temporary files while it prepares a dataset
            found.append((os.fspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns))
    return files.json_checksum([*format, *sorted(found)])[:16] if found else ""


class CacheError(UserError):
    """Raised if the cache cannot be written."""


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder` of a dataset, so that only one process decodes the dataset.

    Raise `UserError` if the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder / ".lock", wait=True):
            yield
    except OSError as error:
        advice = "set data.cache_dir or XDG_CACHE_HOME to another folder"
        raise CacheError(f"data.cache_dir: cannot write {folder}: {error.strerror}; {advice}") from error


def load(folder: Path) -> Arrays | None:
    """Return the arrays in `folder`, memory-mapped, or None if it does not exist.

    If the arrays are damaged, as far as a sample shows it (see `verify`), warn, remove `folder` and return None.
    """
    if not folder.exists():
        return None
    try:
        manifest = verify(folder, sample=True)
    except ValueError as error:
        reason = f"is damaged or has another format ({error})"
        warnings.warn(f"the data cache {folder} {reason}; rebuilding it", stacklevel=2)
        remove(folder)
        return None
    try:
        # Copy-on-write: TensorFlow shares only writable memory, and the file must not change.
        found = {file: np.load(folder / file, mmap_mode="c", allow_pickle=False) for file in manifest["sha256"]}
    except FileNotFoundError:  # another process has just removed the arrays of an earlier state of a folder
        return None
    labels = found["labels.npy"]
    images = found.get("images.npy", np.empty((len(labels), 0, 0, 0), np.uint8))
    skipped = [(path, reason) for path, reason in manifest.get("skipped", ())]
    histogram = np.array(manifest["histogram"]) if "histogram" in manifest else None
    return Arrays(
        images, labels, tuple(manifest["class_names"]), manifest["dataset"],
        manifest.get("files", ()), skipped, manifest.get("digests", ()), manifest.get("checksum", ""), histogram,
    )  # fmt: skip


def verify(folder: Path, sample: bool = False) -> dict[str, Any]:
    """Return the manifest of the arrays in `folder`; raise `ValueError` if they are missing or damaged.

    With `sample`, read of images of more than 1 GiB only 32 blocks of 16 MiB, so that a start takes the same time for
    any size: the first, the last, and others chosen at random each time. Of n blocks, it finds a damaged one with a
    probability of 30 / (n - 2).
    """
    try:
        manifest = files.read_sealed(folder / _MANIFEST)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}")
        images, checksums = folder / _FILES[0], dict(manifest["sha256"])
        if sample and manifest.get("blocks") and images.stat().st_size > _WHOLE:
            _require_blocks(images, manifest["blocks"])
            del checksums[images.name]
        files.require_checksums(folder, checksums)
        return manifest
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _require_blocks(path: Path, blocks: Sequence[str]) -> None:
    """Raise `ValueError` unless the first, the last and random other blocks of the file match their checksums."""
    inner = range(1, len(blocks) - 1)
    chosen = random.SystemRandom().sample(inner, min(_SAMPLE - 2, len(inner)))
    with path.open("rb") as file:
        for number in sorted({0, *chosen, len(blocks) - 1}):
            file.seek(number * _BLOCK)
            if hashlib.sha256(file.read(_BLOCK)).hexdigest() != blocks[number]:
                raise ValueError(f"{path.name} does not match its checksum")


def store(
    folder: Path,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    dataset: str,
    num_examples: int | None = None,
    about: Mapping[str, list[Any]] = MappingProxyType({}),
    keep_images: bool = True,
) -> Arrays:
    """Write `batches` of (images, labels) to `folder` and return them as memory-mapped arrays.

    `about` has the fields `files`, `skipped` and `digests` of the arrays, which `batches` may fill. Without
    `keep_images`, store all but the images; the returned ones then have no pixels. Raise `UserError` if the
    folder is not writable, if a label is invalid, or if `batches` do not contain exactly `num_examples` examples, if
    that is not None.
    """
    try:
        with files.new_folder(folder) as partial:
            filled, written, histogram = 0, hashlib.sha256(), np.zeros((image_shape[-1], 256), np.int64)
            # Not through a memory map: if the disk is full, a write through one ends the process with SIGBUS.
            with (partial / _FILES[0]).open("xb") as images, (partial / _FILES[1]).open("xb") as labels:
                _write_headers(images, labels, 0, image_shape)
                header = images.tell()
                for some_images, some_labels in batches:
                    if some_labels.min() < 0 or some_labels.max() >= len(class_names):
                        raise UserError(
                            f"{dataset}: labels must be 0 to {len(class_names) - 1}; choose a split with labels"
                        )
                    content = np.ascontiguousarray(some_images, np.uint8)
                    if keep_images:
                        images.write(content.data)
                    written.update(content.data)
                    histogram += pixel_histogram(content, np.arange(len(content)))
                    labels.write(np.asarray(some_labels, "<i4").tobytes())
                    filled += len(some_images)
                _write_headers(images, labels, filled, image_shape)
            if num_examples not in (None, filled):
                raise UserError(f"{dataset}: decoded {filled} examples, expected {num_examples}")
            sums: dict[str, str] = {_FILES[1]: files.checksum(partial / _FILES[1])}
            blocks: list[str] = []
            if keep_images:
                sums[_FILES[0]], blocks = _read_back(partial / _FILES[0], header, written.hexdigest())
            else:
                (partial / _FILES[0]).unlink()
            written.update(np.load(partial / _FILES[1], allow_pickle=False).tobytes())
            manifest = {"format": _FORMAT, "dataset": dataset, "class_names": class_names, "sha256": sums}
            manifest |= {"blocks": blocks, "checksum": written.hexdigest(), "histogram": histogram.tolist()}
            files.write_sealed(partial / _MANIFEST, {**manifest, **about})
    except OSError as error:
        if not (folder / _MANIFEST).exists():  # another process may have stored the same bytes first
            raise CacheError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
    arrays = load(folder)
    if arrays is None or arrays.dataset != dataset:
        raise CacheError(f"data.cache_dir: {folder} cannot be read back as {dataset}")
    return arrays


def _read_back(path: Path, header: int, written: str) -> tuple[str, list[str]]:
    """Return the SHA-256 checksums of the images' file and of its blocks.

    Raise `OSError` unless `written` is that of the bytes after the first `header` bytes.
    """
    whole, content = hashlib.sha256(), hashlib.sha256()
    blocks: list[str] = []
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
            content.update(memoryview(block)[0 if blocks else header :])
            blocks.append(hashlib.sha256(block).hexdigest())
    if content.hexdigest() != written:
        raise OSError(errno.EIO, "what was read back is not what was written")
    return whole.hexdigest(), blocks


def _write_headers(images: BinaryIO, labels: BinaryIO, count: int, image_shape: tuple[int, int, int]) -> None:
    """Write the headers of the two `.npy` files, whose length does not depend on `count`, at their start."""
    for file, dtype, shape in ((images, "|u1", image_shape), (labels, "<i4", ())):
        file.seek(0)
        header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)


def remove(folder: Path) -> None:
    """Remove the cached split in `folder`. Raise `UserError` if it contains other files, or cannot be removed."""
    try:
        for file in (_MANIFEST, *_FILES):
            (folder / file).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot remove {folder}: {error.strerror}") from error
