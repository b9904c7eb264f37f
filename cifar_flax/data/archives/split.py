"""What the reader of a format returns."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from cifar_flax.errors import UserError

Shape = tuple[int, int, int]  # height, width, channels
Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]]
_MOST_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class Split:
    """The images, in the archive's order, and labels of a split, which are read while `batches` is consumed."""

    batches: Batches
    image_shape: Shape
    class_names: tuple[str, ...]


def numbered(classes: int) -> tuple[str, ...]:
    """Return names for classes that have none. Raise `UserError` if there are too many."""
    if classes > _MOST_CLASSES:
        raise UserError(f"labels must be 0 to at most {_MOST_CLASSES - 1:,}, not {classes - 1:,}")
    return tuple(map(str, range(classes)))
