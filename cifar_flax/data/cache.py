"""Cache of decoded arrays: memory-mapped `.npy` files, and a manifest with their SHA-256 checksums and its own.

Layout: `<cache_dir>/<dataset>/<version>/<split>/{images.npy, labels.npy, manifest.json}`. Complete folders are renamed
to their final names, so readers never see a partial one.
"""

import hashlib
import secrets
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from cifar_flax import files
from cifar_flax.errors import UserError

_FORMAT = 2
_MANIFEST = "manifest.json"
_FILES = ("images.npy", "labels.npy")


@dataclass(frozen=True, slots=True)
class Arrays:
    """A decoded split: images, labels and a description of its dataset."""

    images: UInt8[Any, "n *image"]  # [n, height, width, channels] on the host; rows of bytes after `resident.put`
    labels: Int32[Any, " n"]
    class_names: tuple[str, ...]
    dataset: str  # name and version, such as "cifar10/3.0.2"

    @property
    def nbytes(self) -> int:
        """Return the size of the images and labels in bytes."""
        return self.images.nbytes + self.labels.nbytes

    def digest(self) -> str:
        """Return the SHA-256 checksum of the labels, in order; it does not cover the images."""
        return hashlib.sha256(np.asarray(self.labels).tobytes()).hexdigest()


def newest_version(cache_dir: Path, name: str) -> str | None:
    """Return the highest cached version of the dataset `name`, such as "3.0.2", or None if there is none."""
    versions = {path.parent.parent.name for path in (cache_dir / name).glob(f"*/*/{_MANIFEST}")}
    numbered = [version for version in versions if version.replace(".", "").isdigit()]
    return max(numbered, key=lambda version: [int(part) for part in version.split(".")], default=None)


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder` of a dataset, so that only one process decodes the dataset.

    Raise `UserError` if the folder is not writable.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(folder / ".lock", wait=True))
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
        yield


def load(folder: Path) -> Arrays | None:
    """Return the arrays in `folder`, memory-mapped, or None if it does not exist.

    If the arrays are damaged, warn, remove `folder` and return None.
    """
    if not folder.exists():
        return None
    try:
        class_names, dataset = verify(folder)
    except ValueError as error:
        reason = f"is damaged or has another format ({error})"
        warnings.warn(f"the data cache {folder} {reason}; rebuilding it", stacklevel=2)
        _remove(folder)
        return None
    # Copy-on-write: TensorFlow shares only writable memory, and the file must not change.
    images, labels = (np.load(folder / file, mmap_mode="c", allow_pickle=False) for file in _FILES)
    return Arrays(images, labels, class_names, dataset)


def verify(folder: Path) -> tuple[tuple[str, ...], str]:
    """Return class names and dataset of the arrays in `folder`; raise `ValueError` if they are missing or damaged."""
    try:
        manifest = files.read_sealed(folder / _MANIFEST)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}")
        files.require_checksums(folder, {file: manifest["sha256"][file] for file in _FILES})
        return tuple(manifest["class_names"]), manifest["dataset"]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def store(
    folder: Path,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    num_examples: int,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    dataset: str,
) -> Arrays:
    """Write `batches` of (images, labels) to `folder` and return them as memory-mapped arrays.

    Raise `UserError` if the folder is not writable, if a label is invalid, or if `batches` do not contain exactly
    `num_examples` examples.
    """
    try:
        with files.new_folder(folder) as partial:
            open_array = np.lib.format.open_memmap
            images = open_array(partial / _FILES[0], mode="w+", dtype=np.uint8, shape=(num_examples, *image_shape))
            labels = open_array(partial / _FILES[1], mode="w+", dtype=np.int32, shape=(num_examples,))
            filled = 0
            for some_images, some_labels in batches:
                end = filled + len(some_images)
                if end <= num_examples:
                    if some_labels.min() < 0 or some_labels.max() >= len(class_names):
                        raise UserError(
                            f"{dataset}: labels must be 0 to {len(class_names) - 1}; choose a split with labels"
                        )
                    images[filled:end], labels[filled:end] = some_images, some_labels
                filled = end
            if filled != num_examples:
                raise UserError(f"{dataset}: decoded {filled} examples, expected {num_examples}")
            images.flush()
            labels.flush()
            checksums = files.checksums(partial)
            manifest = {"format": _FORMAT, "dataset": dataset, "class_names": class_names, "sha256": checksums}
            files.write_sealed(partial / _MANIFEST, manifest)
    except OSError as error:
        if not (folder / _MANIFEST).exists():  # another process may have stored the same bytes first
            raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
    arrays = load(folder)
    if arrays is None or arrays.dataset != dataset:
        raise UserError(f"data.cache_dir: {folder} cannot be read back as {dataset}")
    return arrays


def _remove(folder: Path) -> None:
    """Remove `folder` atomically: other processes never see a part of it.

    Raise `UserError` if it contains files that are not part of the cache.
    """
    try:
        strange = {path.name for path in folder.iterdir()} - {_MANIFEST, *_FILES}
        if strange:
            raise UserError(f"data.cache_dir: {folder} is not removed: it contains an unknown file, {min(strange)}")
        files.remove_folder(folder, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}"))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot remove {folder}: {error.strerror}") from error
