"""Hardware, package versions and command of a run."""

import contextlib
import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from cifar_flax import packages

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" for two cores, "max 100000" for all


def processor() -> str:
    """Return the processor's name or, if the operating system does not report it, its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    # os.cpu_count() also counts the cores that `taskset`, a scheduler or a container withholds.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no limit, or no Linux control group (version 2)
        microseconds, period = _CPU_LIMIT.read_text().split()
        cores = min(cores, math.ceil(int(microseconds) / int(period)))
    return cores


def machine() -> str:
    """Return the number of usable cores and the processor, such as "2 cores of AMD EPYC 9R14 Processor"."""
    cores = usable_cores()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {processor()}"


def provenance(devices: str) -> dict[str, Any]:
    """Return the command, hardware (`devices` included) and versions that a checkpoint records as `made_by`."""
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "hardware": f"{machine()}; {devices}", "versions": packages.versions()}
