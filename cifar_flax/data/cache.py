"""Decoded arrays on disk: memory-mapped `.npy` files beside a manifest of their SHA-256 sums, and of its own.

Layout: `<cache_dir>/<data set>/<version>/<split>/{images.npy, labels.npy, manifest.json}`. A folder appears under its
name only when it is complete, by one rename, so readers never see half of one.
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
    """One split, decoded: stored bytes and class indices, with what the data set says of itself."""

    images: UInt8[Any, "n height width channels"]  # NumPy's or, where `resident` has put them on a device, JAX's
    labels: Int32[Any, " n"]
    class_names: tuple[str, ...]
    dataset: str  # name and version, such as "cifar10/3.0.2"

    def digest(self) -> str:
        """Tells splits apart: of their labels, in order."""
        return hashlib.sha256(np.asarray(self.labels).tobytes()).hexdigest()


def newest_version(cache_dir: Path, name: str) -> str | None:
    """The highest cached version of the data set `name`, such as "3.0.2"; None if there is none."""
    versions = {path.parent.parent.name for path in (cache_dir / name).glob(f"*/*/{_MANIFEST}")}
    numbered = [version for version in versions if version.replace(".", "").isdigit()]
    return max(numbered, key=lambda version: [int(part) for part in version.split(".")], default=None)


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, of one data set: of the processes that start together, one decodes for all.

    Raises `UserError` if the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(folder / ".lock", wait=True))
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
        yield


def load(folder: Path) -> Arrays | None:
    """The arrays in `folder`, memory-mapped; None if there are none, or, with a warning, if they are damaged."""
    if not folder.exists():
        return None
    try:
        class_names, dataset = verify(folder)
    except ValueError as error:
        reason = f"is damaged or of another version ({error})"
        warnings.warn(f"the data cache {folder} {reason}; rebuilding it", stacklevel=2)
        _remove(folder)
        return None
    # Copy on write: TensorFlow shares memory only where it may be written to, and the file stays as it is.
    images, labels = (np.load(folder / file, mmap_mode="c", allow_pickle=False) for file in _FILES)
    return Arrays(images, labels, class_names, dataset)


def verify(folder: Path) -> tuple[tuple[str, ...], str]:
    """Class names and data set of the arrays in `folder`; raises `ValueError` unless they are what was stored."""
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
    """Writes `num_examples` images and labels, given in batches, to `folder` and returns them memory-mapped.

    Raises `UserError` where the folder cannot be written or the batches hold another number of examples.
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
                        raise UserError(f"{dataset}: has labels outside 0 to {len(class_names) - 1}; is it unlabelled?")
                    images[filled:end], labels[filled:end] = some_images, some_labels
                filled = end
            if filled != num_examples:
                raise UserError(f"{dataset}: {filled} examples decoded where {num_examples} are expected")
            images.flush()
            labels.flush()
            checksums = files.checksums(partial)
            manifest = {"format": _FORMAT, "dataset": dataset, "class_names": class_names, "sha256": checksums}
            files.write_sealed(partial / _MANIFEST, manifest)
    except OSError as error:
        if not (folder / _MANIFEST).exists():  # another process may have been first, with the same bytes
            raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
    arrays = load(folder)
    if arrays is None or arrays.dataset != dataset:
        raise UserError(f"data.cache_dir: {folder} cannot be read back as {dataset}")
    return arrays


def _remove(folder: Path) -> None:
    """Removes it at once as far as others can see: they never find a part of it.

    Raises `UserError` where it holds anything that no cache wrote.
    """
    try:
        strange = {path.name for path in folder.iterdir()} - {_MANIFEST, *_FILES}
        if strange:
            raise UserError(f"data.cache_dir: {folder} is not removed: it holds {min(strange)}, which no cache wrote")
        files.remove_folder(folder, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}"))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot remove {folder}: {error.strerror}") from error
