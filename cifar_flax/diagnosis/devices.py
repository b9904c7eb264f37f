"""Check the devices, the persistent compilation cache and the memory allocator."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax

from cifar_flax.config import Config
from cifar_flax.diagnosis import nvidia
from cifar_flax.diagnosis.installation import FAIL, NOTE, OK, Finding
from cifar_flax.errors import UserError, one_line
from cifar_flax.packages import has_module
from cifar_flax.runtime import allocator, compilation
from cifar_flax.runtime.devices import all_devices
from cifar_flax.runtime.environment import machine


@dataclass(slots=True)
class Examination:
    """The run to examine, and results of checks that later checks use."""

    config: Config
    workdir: Path
    online: bool = False  # whether the network may be used
    platform: str = ""  # platform that JAX uses, such as "gpu"; "": no device found
    has_data: bool = False  # whether the data is decoded and ready
    state_bytes: int = 50_000_000  # size of the train state; if not known, that of the reference network with AdamW
    needs: list[tuple[str, Path, int]] = field(default_factory=list)  # (content, folder, minimum size in bytes)


def devices(examination: Examination) -> Iterator[Finding]:
    """Check that JAX finds devices, and report why a GPU or TPU is not used."""
    warned: list[str] = []
    try:
        found = all_devices(warned.append)
        examination.platform = found[0].platform
        kinds = Counter(device.device_kind for device in found)
        names = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        yield Finding(OK, f"{names}; {machine()}")
    except UserError as error:
        yield Finding(FAIL, str(error))
    if examination.platform in ("", "cpu"):
        if reason := nvidia.why_unused("".join(warned)):
            yield Finding(NOTE, f"NVIDIA GPU: {reason}")
        elif examination.platform and has_module("libtpu") and not os.environ.get("JAX_PLATFORMS"):
            try:
                jax.devices("tpu")
            except RuntimeError as error:
                yield Finding(NOTE, f"TPU: libtpu is installed, but JAX finds no TPU ({one_line(error)})")
        elif warned:  # such as a TPU without libtpu
            yield Finding(NOTE, warned[0])


def programs(examination: Examination) -> Iterator[Finding]:
    """Check the persistent compilation cache. The later checks do not write to it."""
    if not examination.platform:
        return
    reason = compilation.cache_problem()
    cached = f"compiled once and cached in {compilation.program_cache()}"
    yield Finding(NOTE, f"compiled at each start: {reason}") if reason else Finding(OK, cached)


def memory(examination: Examination) -> Iterator[Finding]:
    """Check that glibc malloc is tuned for training on a CPU."""
    if examination.platform != "cpu":
        return
    tunables = os.environ.get("GLIBC_TUNABLES")
    if tunables == allocator.SETTINGS["GLIBC_TUNABLES"]:
        yield Finding(OK, "glibc malloc keeps freed memory for the next step")
        return
    reason = "an accelerator plugin is installed, or the C library is not glibc"
    if tunables is not None:
        reason = "GLIBC_TUNABLES is set"
    yield Finding(NOTE, f"glibc malloc is not tuned; CPU steps are about 1.5 times slower: {reason}")
