"""Where a run takes place: the machine, the versions of what computes, the command."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import cifar_flax

# The distributions whose versions matter to what a run computes and writes.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml-collections",
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-datasets",
)


def versions() -> dict[str, str]:
    """Name -> version of this package, of Python and of those of `PACKAGES` that are installed."""
    found = {"cifar_flax": cifar_flax.__version__, "python": platform.python_version()}
    return found | {name: version for name in PACKAGES if (version := installed_version(name))}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Such as "2 cores of AMD EPYC 9R14 Processor"."""
    return f"{os.cpu_count()} cores of {processor()}"


def command() -> str:
    """What has been typed to start this process, to be typed again."""
    return shlex.join(["python", *sys.argv])


def made_by(devices: str) -> dict[str, Any]:
    """What a run notes of its start, on devices that are called so."""
    return {"command": command(), "hardware": f"{machine()}; {devices}", "versions": versions()}
