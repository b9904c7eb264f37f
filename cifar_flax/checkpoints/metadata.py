"""The metadata of a checkpoint, beside its state: `checkpoints/<step>/record.json`.

It holds what the run must know to go on, the shapes of the arrays, the SHA-256 sums of the state's files and one of
itself. Nothing here needs Orbax, JAX's devices or the other processes.
"""

from pathlib import Path
from typing import Any

from cifar_flax import files
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import processes

_NAME = "record.json"
_FORMAT = 1

CHECKPOINTS = "checkpoints"  # the folder in a workdir

Metadata = dict[str, Any]


class DamagedError(UserError):
    """What lies on the disk is not what was saved."""


def write_metadata(folder: Path, metadata: Metadata) -> None:
    files.write_sealed(folder / _NAME, {"format": _FORMAT} | metadata)


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_metadata(folder: Path, step: int) -> Metadata:
    """What `Checkpoints.save` was told.

    Raises `DamagedError` if it is not what was written, `UserError` if it cannot be read or is of another version.
    """
    path = folder / str(step)
    try:
        metadata = files.read_sealed(path / _NAME)
        if metadata.get("step") != step:
            raise ValueError(f"{_NAME} is of step {metadata.get('step')}")
    except (OSError, ValueError) as error:
        if (path / "_CHECKPOINT_METADATA").exists():  # Orbax had its files there before there was a format
            raise UserError(
                f"the checkpoint {path} was made by an earlier version, and this one cannot read it"
            ) from error
        raise unreadable(folder, step, error) from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"the checkpoint {path} has the format {metadata.get('format')}; this version reads {_FORMAT}")
    return metadata


def unreadable(folder: Path, step: int, error: Exception) -> UserError:
    """What to raise where reading that checkpoint has raised `error`."""
    if lost := processes.lost_peer(error):
        return lost
    what = f"the checkpoint {folder}/{step} cannot be read ({one_line(error)})"
    if not isinstance(error, (FileNotFoundError, ValueError)):
        return UserError(what)
    return DamagedError(f"{what}; the training command goes on from an intact one before it, if there is one")
