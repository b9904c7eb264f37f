"""Read and write the metadata of a checkpoint: `checkpoints/<step>/record.json`.

It holds the values that a run needs to resume, the shapes of the arrays, and the SHA-256 checksums of the state's files
and of the metadata itself. This module needs neither Orbax, nor JAX's devices, nor the other processes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cifar_flax import files
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import processes

_NAME = "record.json"
_FORMAT = 1

CHECKPOINTS = "checkpoints"  # folder in the workdir

Metadata = dict[str, Any]
T = TypeVar("T")


class DamagedError(UserError):
    """Raised if files of a checkpoint are missing or differ from what was saved."""


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write `metadata` and its checksum to the checkpoint folder `folder`."""
    files.write_sealed(folder / _NAME, {"format": _FORMAT} | metadata)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in `folder`, in ascending order."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_metadata(folder: Path, step: int) -> Metadata:
    """Return the metadata of the checkpoint of `step` in `folder`.

    Raise `DamagedError` if it is missing or damaged, `UserError` if it cannot be read or has another format version.
    """
    path = folder / str(step)
    try:
        metadata = files.read_sealed(path / _NAME)
        if metadata.get("step") != step:
            raise ValueError(f"{_NAME} is of step {metadata.get('step')}")
    except (OSError, ValueError) as error:
        raise unreadable(folder, step, error) from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"the checkpoint {path} has the format {metadata.get('format')}; this version reads {_FORMAT}")
    return metadata


def while_training(folder: Path, read: Callable[[], T]) -> T:
    """Return `read()`; if it fails and a run has saved or removed checkpoints in `folder` meanwhile, repeat it."""
    while True:
        steps = saved_steps(folder)
        try:
            return read()
        except (UserError, FileNotFoundError):
            if saved_steps(folder) == steps:
                raise


def unreadable(folder: Path, step: int, error: Exception) -> UserError:
    """Return the error to raise if reading the checkpoint of `step` raised `error`."""
    if lost := processes.lost_peer(error):
        return lost
    what = f"the checkpoint {folder}/{step} cannot be read ({one_line(error)})"
    if not isinstance(error, (FileNotFoundError, ValueError)):
        return UserError(what)
    return DamagedError(f"{what}; --mode=train resumes from an earlier intact checkpoint, if there is one")
