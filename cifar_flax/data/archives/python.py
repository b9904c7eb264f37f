"""Read the Python version of CIFAR-10 and CIFAR-100: pickled dicts with the rows of images, labels and class names.

Source: Krizhevsky, cs.toronto.edu/~kriz/cifar.html, section "Python / Matlab versions".
"""

from typing import Any

import numpy as np

from cifar_flax.data.archives import pickles
from cifar_flax.data.archives.binary import images
from cifar_flax.data.archives.members import Members
from cifar_flax.data.archives.split import Batches, Split, numbered
from cifar_flax.errors import UserError

_BYTES = 6500  # at most, per image: pickles of Python 3 may take two bytes for one of an image


def read(members: Members, split: str) -> Split:
    """Return a split, with one batch for each file. Raise `UserError` if a file is missing or damaged."""
    layout = members.layout
    contents = members.read(split, layout.images[split] * _BYTES)
    fine = "fine_label_names" if layout.classes == 100 else "label_names"
    meta = contents.pop(layout.meta, b"")
    named = _record(layout.meta, meta).get(fine) if meta else []
    if not isinstance(named, list) or not all(isinstance(name, bytes | str) for name in named):
        raise UserError(f"{layout.meta} is damaged: {fine} must be a list of strings")

    def batches() -> Batches:
        for name in layout.files[split]:
            record = _record(name, contents.pop(name))
            rows, labels = record.get("data"), record.get("fine_labels" if layout.classes == 100 else "labels")
            if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
                raise UserError(f"{name} is damaged: data must be an array of uint8 of shape (n, 3072)")
            if not isinstance(labels, list) or len(labels) != len(rows) or {*map(type, labels)} != {int}:
                raise UserError(f"{name} is damaged: labels must be a list of {len(rows)} integers")
            yield images(rows), np.array(labels, np.int64)

    decoded = tuple(name.decode() if isinstance(name, bytes) else name for name in named)
    return Split(batches(), (32, 32, 3), decoded or numbered(layout.classes))


def _record(name: str, content: bytes) -> dict[str, Any]:
    """Return a pickled dict; Python 2 wrote its keys as bytes."""
    try:
        record = pickles.loads(content)
    except UserError as error:
        raise UserError(f"{name} is damaged or not of CIFAR's Python version: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{name} is damaged: must hold a dict")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in record.items()}
