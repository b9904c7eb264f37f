"""Search folders for image files, for training and for prediction."""

import os
from collections.abc import Iterator
from pathlib import Path

from cifar_flax.errors import reason

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
# Names in a folder that this program has written: a run, an exported model, a decoded split.
_OWN = ({"config.json", "checkpoints"}, {"config.json", "model.stablehlo"}, {"manifest.json", "images.npy"})


def files_below(path: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Yield the files below `path`, or `path` if it is a file, each with ""; and folders that cannot be searched.

    Those come with the reason. `above` are the folders through which the search has come. Skip hidden files, files of
    operating systems, such as Thumbs.db, and folders that this program has written. Follow links under their own names.
    """
    if not os.path.isdir(path):
        yield path, ""
        return
    real = os.path.realpath(path)
    try:
        if any(Path(one).is_relative_to(real) for one in above):
            raise OSError("is a link to a folder that contains it")
        entries = entries_of(path)
    except OSError as error:
        yield path, reason(error)
        return
    for entry in sorted(entries, key=lambda entry: (os.path.isdir(entry), entry.name)):
        yield from files_below(entry, (*above, real))


def entries_of(folder: Path) -> list[Path]:
    """Return the entries of `folder` that a search does not skip. Raise `OSError` if it cannot be read."""
    names = set(os.listdir(folder))
    if any(own <= names for own in _OWN):
        return []
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in _SYSTEM_FILES]
