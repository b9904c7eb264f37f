"""Read the binary version of CIFAR-10 and CIFAR-100.

Each record is a label (1 byte; CIFAR-100: the coarse and the fine label) and an image (3,072 bytes): a red, a green and
a blue plane of 32 rows of 32 pixels. Source: Krizhevsky, cs.toronto.edu/~kriz/cifar.html, section "Binary version".
"""

import numpy as np
from jaxtyping import UInt8

from cifar_flax.data.archives.members import Members
from cifar_flax.data.archives.split import Batches, Split, numbered
from cifar_flax.errors import UserError


def read(members: Members, split: str) -> Split:
    """Return a split, with one batch for each file. Raise `UserError` if a file is missing or has another size."""
    layout = members.layout
    record = layout.classes // 100 + 1 + 3072  # bytes
    size = layout.images[split] * record
    contents = members.read(split, size)
    for name in layout.files[split]:
        if len(contents[name]) != size:
            raise UserError(f"{name} is damaged: must have {size:,} bytes, not {len(contents[name]):,}")

    def batches() -> Batches:
        for name in layout.files[split]:
            records = np.frombuffer(contents.pop(name), np.uint8).reshape(-1, record)
            yield images(records[:, -3072:]), records[:, -3073].astype(np.int32)

    named = tuple(contents.pop(layout.meta, b"").decode().split())
    return Split(batches(), (32, 32, 3), named or numbered(layout.classes))


def images(rows: UInt8[np.ndarray, "n 3072"]) -> UInt8[np.ndarray, "n 32 32 3"]:
    """Return the images of rows that hold a red, a green and a blue plane each."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
