"""Hardware, package versions and command of a run."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from cifar_flax import packages


def processor() -> str:
    """Return the processor's name or, if the operating system does not report it, its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Return the number of cores and the processor, such as "2 cores of AMD EPYC 9R14 Processor"."""
    return f"{os.cpu_count()} cores of {processor()}"


def provenance(devices: str) -> dict[str, Any]:
    """Return the command, hardware (`devices` included) and versions that a checkpoint records as `made_by`."""
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "hardware": f"{machine()}; {devices}", "versions": packages.versions()}
