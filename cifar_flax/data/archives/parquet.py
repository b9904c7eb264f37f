"""Read datasets as the Hugging Face hub stores them: Parquet files `train-00000-of-00002.parquet`, `test-...`.

The column `image` or `img` has image files (a struct with the field `bytes`), `label` or `fine_label` integers.
Source: the documentation of the library `datasets`, features `Image` and `ClassLabel`.
"""

import functools
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cifar_flax import packages
from cifar_flax.data.archives.split import Batches, Shape, Split, numbered
from cifar_flax.data.images import is_grey, read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime.environment import usable_cores

_NAME = re.compile(r"(train|test)(?:-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?)?\.parquet")
_BATCH = 256  # images


def find(path: Path) -> tuple[Path, ...]:
    """Return the files of both splits in the folder `path` or its only subfolder that has some, or beside a file."""
    if not path.is_dir():
        return _files(path.parent)
    if here := _files(path):
        return here
    found = [files for folder in sorted(path.iterdir()) if folder.is_dir() and (files := _files(folder))]
    if len(found) > 1:
        raise UserError(f"must be one of its folders {', '.join(files[0].parent.name for files in found)}")
    return found[0] if found else ()


def read(files: Sequence[Path], split: str, size: int) -> Split:
    """Return a split. Images are resized to `size` pixels per side; 0 keeps their size, which must be the same for all.

    They have one channel if the first ones of the train split are grey, otherwise three. Raise `UserError` if a file or
    a column is missing, or an image cannot be read.
    """
    train, parquet = _shards(files, "train"), packages.load("pyarrow", "pyarrow.parquet")
    with parquet.ParquetFile(train[0]) as file:
        image, label = _columns(file.schema_arrow)
        named = _class_names(file.schema_arrow.metadata, label)
    first = next((contents for contents, _ in _rows(train[:1], image, label)), [b""])
    channels = 1 if all(map(is_grey, first)) else 3
    shape = _decode(train[0], 0, first[0], (size, size, channels)).shape
    if not named:
        both = _rows(train, "", label), _rows(_shards(files, "test"), "", label)
        named = numbered(1 + max(int(labels.max()) for rows in both for _, labels in rows))
    return Split(_batches(_shards(files, split), image, label, shape, size), shape, named)


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.iterdir() if _NAME.fullmatch(file.name)))


def _shards(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split in order. Raise `UserError` if one is missing or occurs twice."""
    matches = [match for file in files if (match := _NAME.fullmatch(file.name)) and match[1] == split]
    found = sorted((int(match[2] or 0), match[0]) for match in matches)
    counts = {int(match[3] or 1) for match in matches}
    if [index for index, _ in found] != list(range(max(counts, default=1))) or len(counts) != 1:
        names = f"{found[0][1]} and {len(found) - 1} more" if found else "none"
        raise UserError(f"all of {split}-00000-of-....parquet must be there once, not {names}")
    return [files[0].parent / name for _, name in found]


def _columns(schema: Any) -> tuple[str, str]:
    """Return the names of the columns of images and labels."""
    types = packages.load("pyarrow", "pyarrow").types
    image = next((name for name in ("image", "img") if name in schema.names), "")
    label = next((name for name in ("label", "fine_label") if name in schema.names), "")
    fits = image and label and types.is_integer(schema.field(label).type) and types.is_struct(schema.field(image).type)
    if not fits or schema.field(image).type.get_field_index("bytes") < 0:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)[:100]
        raise UserError(f"must have the columns image or img (with bytes) and label or fine_label, not {columns}")
    return image, label


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        named = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, named)) if isinstance(named, list) else ()


def _rows(files: Sequence[Path], image: str, label: str) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Yield image files, unless `image` is "", and labels."""
    parquet = packages.load("pyarrow", "pyarrow.parquet")
    for path in files:
        # With a buffer, a part of a column is read at a time, not all of it, which can be hundreds of megabytes.
        with parquet.ParquetFile(path, buffer_size=2**20) as file:
            for batch in file.iter_batches(_BATCH, columns=[*([f"{image}.bytes"] if image else []), label]):
                if batch.column(label).null_count:
                    raise UserError(f"{path.name}: labels are missing")
                contents = [row["bytes"] for row in batch.column(image).to_pylist()] if image else []
                yield contents, batch.column(label).to_numpy()


def _batches(files: Sequence[Path], image: str, label: str, shape: Shape, size: int) -> Batches:
    with ThreadPoolExecutor(usable_cores()) as pool:
        for path in files:
            start = 0
            for contents, labels in _rows([path], image, label):
                decode = functools.partial(_decode, path, shape=(size, size, shape[2]))
                with warnings.catch_warnings(action="ignore"):  # of Pillow
                    images = list(pool.map(decode, itertools.count(start), contents))
                for decoded in images:
                    if decoded.shape != shape:
                        sizes = " and ".join(f"{width}x{height}" for height, width, _ in (shape, decoded.shape))
                        raise UserError(f"its images differ in size ({sizes}); set data.image_size")
                start += len(contents)
                yield np.stack(images), labels


def _decode(path: Path, row: int, content: bytes | None, shape: Shape) -> UInt8[np.ndarray, "h w c"]:
    try:
        return read_image(content or b"", shape)
    except UserError as error:
        raise UserError(f"image {row} of {path.name}: {error}") from error
