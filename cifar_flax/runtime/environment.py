"""Hardware, package versions and command of a run."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from cifar_flax import packages
from cifar_flax.runtime import settings


def processor() -> str:
    """Return the processor's name or, if the operating system does not report it, its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(core_numbers())


def core_numbers() -> list[int]:
    """Return the numbers of the CPU cores that this process may use."""
    # os.cpu_count() also counts the cores that `taskset`, a scheduler or a container withholds.
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def machine() -> str:
    """Return the number of usable cores and the processor, such as "2 cores of AMD EPYC 9R14 Processor"."""
    cores = usable_cores()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {processor()}"


def provenance(devices: str) -> dict[str, Any]:
    """Return the command, hardware (`devices` included), versions and settings that a checkpoint records."""
    made_by = {"command": shlex.join(["python", *sys.argv]), "hardware": f"{machine()}; {devices}"}
    return made_by | {"versions": packages.versions(), "settings": settings.rounding()}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences of two results of `provenance` that change rounding, as "jax: 0.10.2, now 0.12.0"."""
    old, new = (
        {"hardware": record["hardware"], "jax": record["versions"].get("jax")} | record.get("settings", {})
        for record in (before, now)
    )
    return [
        f"{name}: {old.get(name, 'not set')}, now {new.get(name, 'not set')}"
        for name in old | new
        if old.get(name) != new.get(name)
    ]
