"""Name, published peak and measured speed of the machine."""

import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cifar_flax.runtime.environment import processor, usable_cores

# JAX's `device_kind` -> dense bfloat16 operations per second, from the vendors' data sheets.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # per device, which is half a chip
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured speed of the machine."""

    flops: float  # floating-point operations per second of a product of two square matrices
    bytes: float  # bytes per second read and written by x += 1


def measure_speed(dtype: str = "float32", size: int = 2048) -> Speed:
    """Measure products of random `size` x `size` matrices, and x += 1 over 16 of them in float32.

    The default size suits a CPU: 256 MB of x, in float32. A larger chip needs larger matrices to be busy.
    """
    matrix, vector = jax.random.normal(jax.random.key(0), (size, size), dtype), jnp.ones(16 * size**2)
    product = jax.jit(jnp.matmul)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, so that no page fault is timed
    # Per measurement. On accelerators, waiting for the device would otherwise take a large part of it.
    calls = 1 if jax.default_backend() == "cpu" else 10

    def multiply() -> list[jax.Array]:
        return [product(matrix, matrix) for _ in range(calls)]

    def copy() -> jax.Array:
        nonlocal vector
        for _ in range(calls):
            vector = add_one(vector)
        return vector

    return Speed(
        flops=calls * 2 * size**3 / median_seconds(multiply),
        bytes=calls * 2 * vector.nbytes / median_seconds(copy),
    )


def median_seconds(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """Return the median seconds of a call: two warm-up calls, then calls for `seconds`, but at least five."""
    for _ in range(2):
        jax.block_until_ready(run())
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    return {"cpu": processor(), "cores": usable_cores(), "date": datetime.date.today().isoformat()}
