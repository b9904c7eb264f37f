"""Search folders for image files, for training and for prediction."""

import os
from collections.abc import Iterator
from pathlib import Path

from cifar_flax.errors import reason

_SYSTEM = ("thumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin")
# Names in a folder that this program has written: a run, an exported model, a decoded split.
_OWN = ({"config.json", "checkpoints"}, {"config.json", "model.stablehlo"}, {"manifest.json", "images.npy"})


def files_below(path: Path, above: tuple[str, ...] = (), seen: set[str] | None = None) -> Iterator[tuple[Path, str]]:
    """Yield (file, "") for the files below `path`, or for `path` if it is a file, in order.

    Yield (folder, reason) for each folder that cannot be searched. Follow links under their own names. Skip hidden
    files, files of operating systems, such as Thumbs.db, and folders below `path` that this program has written. With
    `seen`, the folders that were searched before, search no folder twice. `above` are the folders that lead to `path`.
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
    if (above and any(own <= {entry.name for entry in entries} for own in _OWN)) or (seen is not None and real in seen):
        return
    if seen is not None:
        seen.add(real)
    for entry in sorted(entries, key=lambda entry: (os.path.isdir(entry), entry.name)):
        yield from files_below(entry, (*above, real), seen)


def entries_of(folder: Path) -> list[Path]:
    """Return the entries of `folder`, without hidden ones and those of systems. Raise `OSError` if it is unreadable."""
    return [folder / name for name in os.listdir(folder) if not name.startswith(".") and name.lower() not in _SYSTEM]
