"""The two input pipelines, which yield the same batches: `streaming.py` and `resident.py`; and which one a run uses."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from cifar_flax.errors import require
from cifar_flax.runtime.devices import Layout

PIPELINES = ("auto", "streaming", "resident")
_FRACTION = 0.25  # of the memory of a device; the rest is for the state and the activations
_UNKNOWN_MEMORY = 4 * 2**30  # bytes, if a device does not report its memory: less than accelerators have
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, in bytes


def resolve(pipeline: str, layout: Layout, num_bytes: int) -> str:
    """Return the pipeline that `data.pipeline` stands for: "streaming" or "resident"; `num_bytes` is the data's size.

    "auto" is "resident" on accelerators if the data fits into a quarter of the memory of a device, since one host may
    not keep up with them. Otherwise it is "streaming". Raise `ConfigError` if "resident" does not fit at all.
    """
    if pipeline == "streaming":
        return pipeline
    memory = _memory(layout.platform, layout.mesh.local_devices[0])
    if pipeline == "auto":
        fits = layout.platform != "cpu" and num_bytes <= _FRACTION * (memory or _UNKNOWN_MEMORY)
        return "resident" if fits else "streaming"
    sizes = f"the decoded images need {num_bytes / 1e9:,.1f} GB, the device has {(memory or 0) / 1e9:,.1f} GB"
    require(num_bytes <= (memory or num_bytes), "data.pipeline", pipeline, f"{sizes}; use streaming")
    return pipeline


def _memory(platform: str, device: Any) -> int | None:
    """Return the bytes of memory of a device, or None if unknown. A CPU has those of the machine or its container."""
    if platform != "cpu":
        with suppress(jax.errors.JaxRuntimeError):  # such as of a device that a program is only compiled for
            return (device.memory_stats() or {}).get("bytes_limit")
        return None
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # not on all systems
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(Path(path).read_text("utf-8")))
    return min(sizes, default=None)
