"""The two input pipelines, which yield the same batches: `streaming.py` and `resident.py`; and which one a run uses."""

import jax

from cifar_flax import packages
from cifar_flax.runtime.devices import Layout

PIPELINES = ("auto", "streaming", "resident")
_FRACTION = 0.25  # of the memory of a device; the rest is for the state and the activations
_UNKNOWN_MEMORY = 4 * 2**30  # bytes, if a device does not report its memory: less than accelerators have


def resolve(pipeline: str, layout: Layout, num_bytes: int) -> str:
    """Return the pipeline that `data.pipeline` stands for: "streaming" or "resident"; `num_bytes` is the data's size.

    "auto" is "resident" on accelerators if the data fits into a quarter of the memory of a device, since one host may
    not keep up with them. Otherwise it is "streaming" or, if TensorFlow cannot be used, "resident".
    """
    if pipeline != "auto":
        return pipeline
    try:
        stats: dict[str, int] = layout.mesh.local_devices[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # such as for a device that a program is only compiled for
        stats = {}
    memory = stats.get("bytes_limit", _UNKNOWN_MEMORY)
    fits = layout.platform != "cpu" and num_bytes <= _FRACTION * memory
    return "resident" if fits or packages.fault("tensorflow") else "streaming"
