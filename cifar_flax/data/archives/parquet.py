"""Read datasets as the Hugging Face hub stores them: Parquet files `train-00000-of-00002.parquet`, `test-...`.

The column `image` or `img` has image files (a struct with the field `bytes`), `label` or `fine_label` integers.
Source: the documentation of the library `datasets`, features `Image` and `ClassLabel`.
"""

import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cifar_flax import packages
from cifar_flax.data.archives.split import Batches, Split, numbered
from cifar_flax.data.images import Shape, is_grey, read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime.environment import usable_cores

_NAME = re.compile(r"(train|test)(?:-(\d+)-of-(\d+)(?:-[0-9a-f]+)?)?\.parquet")
_BATCH = 256  # images


def find(path: Path) -> tuple[Path, ...]:
    """Return the files of both splits beside a file, in a folder, or else in its only subfolder that has some."""
    files = _files(path if path.is_dir() else path.parent)
    if files or not path.is_dir():
        return files
    found = [files for folder in sorted(filter(Path.is_dir, path.iterdir())) if (files := _files(folder))]
    if len(found) > 1:
        raise UserError(f"must be one of its folders {', '.join(files[0].parent.name for files in found)}")
    return found[0] if found else ()


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(each for each in folder.iterdir() if _NAME.fullmatch(each.name)))


def read(files: Sequence[Path], split: str, size: int) -> Split:
    """Return a split. Images are resized to `size` pixels per side; 0 keeps their size, which must be the same for all.

    They have one channel if the first ones of the train split are grey, otherwise three. Raise `UserError` if a file or
    a column is missing, or an image cannot be read.
    """
    train, test, parquet = _shards(files, "train"), _shards(files, "test"), packages.load("pyarrow")
    schema = parquet.read_schema(train[0])
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    image = next((name for name in ("image", "img") if re.match("struct<.*bytes: .*binary", kinds.get(name, ""))), "")
    label = next((name for name in ("label", "fine_label") if re.match("u?int", kinds.get(name, ""))), "")
    if not image or not label:
        raise UserError(f"must have columns image or img (with bytes) and label or fine_label, not {kinds!s:.100}")
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        class_names = tuple(map(str, metadata["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        labels = (parquet.read_table(path, columns=[label])[label].to_numpy() for path in (*train, *test))
        class_names = numbered(1 + max(int(some.max()) for some in labels))
    first, _ = next(_rows(train[0], image, label), ([], None))
    target = size, size, 1 if all(is_grey(content or b"") for content in first) else 3
    shape = _decode(next(iter(first), b""), target, f"image 0 of {train[0].name}").shape
    return Split(_batches(train if split == "train" else test, (image, label), target, shape), shape, class_names)


def _shards(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split in order. Raise `UserError` if one is missing or occurs twice."""
    matches = {file: match for file in files if (match := _NAME.fullmatch(file.name)) and match[1] == split}
    places = {file: (int(match[2] or 0), int(match[3] or 1)) for file, match in matches.items()}
    if not places or sorted(places.values()) != [(i, len(places)) for i in range(len(places))]:
        there = ", ".join(file.name for file in places)[:80] or "none"
        raise UserError(f"all of {split}-00000-of-....parquet must be there once, not {there}")
    return sorted(places, key=lambda file: places[file])


def _rows(path: Path, image: str, label: str) -> Iterator[tuple[list[bytes | None], np.ndarray]]:
    """Yield image files and labels. With a buffer, a column is read in parts: it can have hundreds of megabytes."""
    with packages.load("pyarrow").ParquetFile(path, buffer_size=2**20) as file:
        for batch in file.iter_batches(_BATCH, columns=[f"{image}.bytes", label]):
            if batch.column(label).null_count:
                raise UserError(f"{path.name}: labels are missing")
            yield [row and row["bytes"] for row in batch.column(image).to_pylist()], batch.column(label).to_numpy()


def _batches(files: Sequence[Path], columns: tuple[str, str], target: Shape, shape: Shape) -> Batches:
    with ThreadPoolExecutor(usable_cores()) as pool:
        for path in files:
            start = 0
            for contents, labels in _rows(path, *columns):
                places = [f"image {row} of {path.name}" for row in range(start, start + len(contents))]
                with warnings.catch_warnings(action="ignore"):  # of Pillow
                    images = list(pool.map(_decode, contents, itertools.repeat(target), places))
                if odd := {image.shape for image in images} - {shape}:
                    sizes = " and ".join(f"{width}x{height}" for height, width, _ in (shape, min(odd)))
                    raise UserError(f"its images differ in size, such as {sizes}; set data.image_size")
                start += len(contents)
                yield np.stack(images), labels


def _decode(content: bytes | None, target: Shape, place: str) -> UInt8[np.ndarray, "h w c"]:
    try:
        return read_image(content or b"", target)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
