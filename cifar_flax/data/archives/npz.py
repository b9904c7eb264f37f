"""Read `.npz` files: `x_train, y_train, x_test, y_test`, or `train_images, train_labels, test_images, test_labels`.

Images have the shape (n, height, width[, 1 or 3]) and labels (n,) or (n, 1). `class_names`, an array of
strings, is optional. Sources: `numpy.savez`, the docstring of `numpy.lib.format`.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cifar_flax.data.archives.split import Batches, Shape, Split, numbered
from cifar_flax.errors import UserError

_NAMES = (
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
    {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")},
)
_CHUNK = 2**24  # bytes of images that are read at a time
_MOST_NAMES = 2**20  # bytes of class_names


def names(path: Path) -> list[str]:
    """Return the names of the arrays in a zip file."""
    with zipfile.ZipFile(path) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def find(path: Path) -> bool:
    """Return whether the zip file has images that `read` knows."""
    return any(images in names(path) for splits in _NAMES for images, _ in splits.values())


def read(path: Path, split: str) -> Split:
    """Return a split. Raise `UserError` if an array is missing or has another shape or type."""
    there = names(path)
    splits = next(each for each in _NAMES if {name for pair in each.values() for name in pair} & {*there})
    for name in (*splits["train"], *splits["test"]):
        if there.count(name) != 1:
            raise UserError(f"{name} must occur once, not {there.count(name)} times")
    shapes = {each: _require_fitting(path, *splits[each]) for each in splits}
    if shapes["train"] != shapes["test"]:
        raise UserError(f"its images must have one shape, not {shapes['train']} and {shapes['test']}")
    named: tuple[str, ...] = ()
    if "class_names" in there:
        with _opened(path, "class_names") as array:
            if array.dtype.kind != "U" or len(array.shape) != 1 or array.nbytes > _MOST_NAMES:
                raise UserError("class_names must be a list of strings")
            named = tuple(map(str, array.read(array.shape[0])))
    largest = -1
    for _, labels in () if named else splits.values():
        with _opened(path, labels) as array:
            largest = max(largest, *(int(some.max()) for some in array.chunks(_CHUNK // 8)))
    return Split(_batches(path, *splits[split], shapes[split]), shapes[split], named or numbered(largest + 1))


@dataclass(frozen=True, slots=True)
class _Array:
    """An array whose content is still to be read from `stream`."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, count: int) -> np.ndarray:
        """Return the next `count` rows."""
        row = self.nbytes // self.shape[0]
        return np.frombuffer(self.stream.read(count * row), self.dtype).reshape(count, *self.shape[1:])

    def chunks(self, count: int) -> Iterator[np.ndarray]:
        """Yield all rows, `count` at a time."""
        for start in range(0, self.shape[0], count):
            yield self.read(min(count, self.shape[0] - start))


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[_Array]:
    """Open an array; arrays of Python objects, which only pickle can read, are refused."""
    with zipfile.ZipFile(path) as file, file.open(f"{name}.npy") as stream:
        if np.lib.format.read_magic(stream) != (1, 0):  # later versions are for structured arrays
            raise UserError(f"{name} must be an array of numbers")
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise UserError(f"{name} holds Python objects, which are not read")
        if transposed:
            raise UserError(f"{name} is in Fortran order; save numpy.ascontiguousarray({name})")
        array, size = _Array(stream, shape, dtype), file.getinfo(f"{name}.npy").file_size - stream.tell()
        if array.nbytes != size or not size:
            raise UserError(f"{name} is damaged: {dtype} of shape {shape} in {size} bytes")
        yield array


def _require_fitting(path: Path, images: str, labels: str) -> Shape:
    """Return the shape of an image; raise `UserError` if images or labels have another shape or type."""
    with _opened(path, images) as array:
        shape = array.shape[1:] if len(array.shape) == 4 else (*array.shape[1:], 1)
        if array.dtype != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3):
            described = f"{array.dtype} of shape {array.shape}"
            raise UserError(f"{images} must be uint8 of shape (n, height, width[, 1 or 3]), not {described}")
        count = array.shape[0]
    with _opened(path, labels) as array:
        if array.dtype.kind not in "iu" or array.shape not in ((count,), (count, 1)):
            raise UserError(f"{labels} must be {count:,} integers, not {array.dtype} of shape {array.shape}")
    return shape[0], shape[1], shape[2]


def _batches(path: Path, images: str, labels: str, shape: Shape) -> Batches:
    with _opened(path, images) as pixels, _opened(path, labels) as classes:
        for some in pixels.chunks(max(1, _CHUNK // math.prod(shape))):
            yield some.reshape(-1, *shape), classes.read(len(some)).reshape(-1)
