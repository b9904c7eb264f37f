"""The cores, accelerators and memory of the processes that share a study on one machine."""

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

_MEMORY = Path("/proc/meminfo")


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
    """Raise `UserError` as `claimed` does, or if the memory does not suffice for another process; write nothing.

    A process is expected to need as much memory as each of the others has needed so far.
    """
    for unit, path in _paths(folder).items():
        if files.lock_holder(path):
            raise _in_use(unit, path)
    holders = {files.lock_holder(path) for path in folder.glob(f"{_host()}.*")} - {None}
    needed = max((_peak_memory(str(holder)) for holder in holders), default=0)
    available = _kilobytes(_MEMORY, "MemAvailable")
    if needed and available is not None and available < needed:
        sizes = f"{needed / 1e6:,.1f} GB, but {available / 1e6:,.1f} GB are available on this machine"
        raise UserError(f"another process of this study needs {sizes}; start it on another machine")


def _peak_memory(holder: str) -> int:
    """Return the peak memory in kB of a process such as "process 12 on host", and 0 if it is unknown."""
    match = re.match(r"process (\d+) ", holder)
    return (match and _kilobytes(Path(f"/proc/{match[1]}/status"), "VmHWM")) or 0


def _kilobytes(path: Path, name: str) -> int | None:
    """Return a number from a file of Linux such as /proc/meminfo, or None if it is not there."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{name}:\s*(\d+) kB", path.read_text("utf-8"), re.MULTILINE)
        return int(match[1]) if match else None
    return None


def _in_use(unit: str, path: Path) -> UserError:
    holder = files.lock_holder(path) or "another process"
    how = "taskset -c CORES" if jax.default_backend() == "cpu" else "another CUDA_VISIBLE_DEVICES"
    where = f"this study already runs on {unit} of this machine, in {holder}"
    return UserError(f"{where}; to add a process, start it with {how}, or on another machine")


def _paths(folder: Path) -> dict[str, Path]:
    """Return core or accelerator -> lock file."""
    return {unit: folder / f"{_host()}.{unit}" for unit in _units()}


def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname())


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
