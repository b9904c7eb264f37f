"""Find out why JAX does not use an NVIDIA GPU of this machine."""

import os
import re
from pathlib import Path

from cifar_flax import packages

# The driver's version file, and files that exist if programs can use the GPU (the last one in WSL on Windows).
DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
PCI = Path("/sys/bus/pci/devices")

# CUDA version -> oldest driver that supports it. Source: JAX's installation guide.
OLDEST_DRIVER = {13: 580, 12: 525}


def why_unused(warned: str) -> str | None:
    """Return why JAX does not use an NVIDIA GPU and how to fix it, or None if there is no GPU.

    `warned` is what JAX logged while it searched for devices.
    """
    match = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)\s", DRIVER.read_text("utf-8")) if DRIVER.exists() else None
    driver = match[1] if match else None  # such as "580.65.06"
    if driver is None and not any(path.exists() for path in DEVICES):
        return "found, but its driver is not installed" if _is_plugged_in() else None
    return f"driver {driver or 'of unknown version'}, not used: {_reason(driver, warned)}"


def _reason(driver: str | None, warned: str) -> str:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"JAX_PLATFORMS={platforms} excludes it"
    if not any(path.exists() for path in DEVICES):
        return f"{DEVICES[0]} does not exist; in Docker, use docker run --gpus all"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides it"
    usable = [cuda for cuda, oldest in OLDEST_DRIVER.items() if driver is None or packages.numbers(driver)[0] >= oldest]
    if not usable:
        return f"the driver is too old; update it to {OLDEST_DRIVER[13]} or newer"
    install = f'pip install -U "jax[cuda{usable[0]}]"'
    plugins = {cuda: version for cuda in OLDEST_DRIVER if (version := packages.version(f"jax-cuda{cuda}-plugin"))}
    if not plugins:
        return f"JAX's CUDA plugin is not installed; {install}"
    cuda, version = next(iter(plugins.items()))  # the newer one, which JAX prefers
    if cuda not in usable:
        return f"jax-cuda{cuda}-plugin needs driver {OLDEST_DRIVER[cuda]} or newer; update the driver, or {install}"
    jaxlib = packages.version("jaxlib") or ""
    if packages.numbers(version)[:3] != packages.numbers(jaxlib)[:3]:
        return f"jax-cuda{cuda}-plugin is {version}, jaxlib {jaxlib}: their versions must be equal; {install}"
    return warned or "JAX reports no reason; JAX_PLATFORMS=cuda makes it raise the error"


def _is_plugged_in() -> bool:
    """Return whether the machine has an NVIDIA display controller."""
    return any(
        (device / "vendor").read_text("utf-8").strip() == "0x10de"
        and (device / "class").read_text("utf-8").startswith("0x03")
        for device in PCI.glob("*")
    )
