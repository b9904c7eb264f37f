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


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` on each core, or each accelerator, of this process, until the end of the block.

    The kernel releases the locks of a process that dies. Raise `UserError` if another process holds one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w.-]", "-", socket.gethostname())
    with contextlib.ExitStack() as stack:
        for unit in _units():
            path = folder / f"{host}.{unit}"
            try:
                stack.enter_context(files.locked(path, wait=False))
            except BlockingIOError as error:
                holder = files.lock_holder(path) or "another process"
                how = "taskset -c CORES" if jax.default_backend() == "cpu" else "another CUDA_VISIBLE_DEVICES"
                raise UserError(
                    f"this study already runs on {unit} of this machine, in {holder}; to add a process, start it with "
                    f"{how}, or on another machine"
                ) from error
        yield


def _units() -> list[str]:
    """Return names of the cores or accelerators of this process that are unique on this machine."""
    if jax.default_backend() == "cpu":
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return [f"core{core}" for core in sorted(cores)]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    units = []
    for device in jax.local_devices():
        number = device.local_hardware_id if device.local_hardware_id is not None else device.id
        name = visible[number] if number < len(visible) else str(number)
        units.append(re.sub(r"[^\w.-]", "-", f"{device.platform}{name}"))
    return units
