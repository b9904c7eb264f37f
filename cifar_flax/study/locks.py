"""The cores or accelerators that a process of a study trains on: no other process of this study may use them."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from cifar_flax import files
from cifar_flax.errors import UserError
from cifar_flax.runtime import environment, processes


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` on each core, or each accelerator, of this process, until the end of the block.

    The kernel releases the locks of a process that dies. Raise `UserError` if another process holds one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        works = True
        for unit, path in _paths(folder).items():
            try:
                works = stack.enter_context(files.locked(path, wait=False)) and works
            except BlockingIOError as error:
                raise _in_use(unit, path) from error
        if not works:
            processes.log(f"{folder.parent}: its file system has no locks, so only one process may run this study")
        yield


def require_free(folder: Path) -> None:
    """Raise `UserError` as `claimed` does; write nothing."""
    for unit, path in _paths(folder).items():
        if files.lock_holder(path):
            raise _in_use(unit, path)


def _in_use(unit: str, path: Path) -> UserError:
    holder = files.lock_holder(path) or "another process"
    how = "taskset -c CORES" if jax.default_backend() == "cpu" else "another CUDA_VISIBLE_DEVICES"
    where = f"this study already runs on {unit} of this machine, in {holder}"
    return UserError(f"{where}; to add a process, start it with {how}, or on another machine")


def _paths(folder: Path) -> dict[str, Path]:
    """Return core or accelerator -> lock file."""
    host = re.sub(r"[^\w.-]", "-", socket.gethostname())
    return {unit: folder / f"{host}.{unit}" for unit in _units()}


def _units() -> list[str]:
    """Return names of the cores or accelerators of this process that are unique on this machine."""
    if jax.default_backend() == "cpu":
        return [f"core{core}" for core in environment.core_numbers()]
    # Slurm numbers the GPUs of a job from 0, so its own list of them comes first.
    lists = (os.environ.get(name, "") for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"))
    visible = next((text.split(",") for text in lists if text), [])
    units = []
    for device in jax.local_devices():
        number = device.local_hardware_id if device.local_hardware_id is not None else device.id
        name = visible[number] if number < len(visible) else str(number)
        units.append(re.sub(r"[^\w.-]", "-", f"{device.platform}{name}"))
    return units
