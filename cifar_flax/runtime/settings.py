"""Settings of JAX and XLA that change the numbers of a run: they are pinned, or recorded with the checkpoints."""

import contextlib
import os
from collections.abc import Iterator

import jax

# Setting of jax.config -> the only value that runs use. Users set others for their own programs: JAX_ENABLE_X64=1.
PINNED = {
    "jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard",
    "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
    "jax_transfer_guard": "allow", "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow", "jax_transfer_guard_device_to_device": "allow",
    "jax_disable_jit": False, "jax_debug_key_reuse": False, "jax_scan3": False,
    "jax_error_checking_behavior_nan": "ignore", "jax_error_checking_behavior_divide": "ignore",
}  # fmt: skip

# Environment variables that change the rounding. They are not pinned: users choose a precision with them.
_ROUNDING = (
    "JAX_ALLOW_F16_REDUCTIONS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_MEMORY_FITTING_LEVEL", "JAX_OPTIMIZATION_LEVEL", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS",
)  # fmt: skip


def pin() -> list[str]:
    """Pin the settings of this process. Return a line for each environment variable that has no effect."""
    found = {name: getattr(jax.config, name, None) for name in PINNED}  # None: not in this version, or not set
    changed = [name for name, value in found.items() if value not in (None, PINNED[name])]
    for name in changed:
        jax.config.update(name, PINNED[name])
    set_to = {name.upper(): os.environ.get(name.upper()) for name in changed}
    return [f"{name}={value}: ignored, so that results do not depend on it" for name, value in set_to.items() if value]


@contextlib.contextmanager
def pinned_in_this_thread() -> Iterator[None]:
    """Pin the settings that evaluation needs inside the block. Other threads keep those of the user's program."""
    guard, promotion = jax.transfer_guard("allow"), jax.numpy_dtype_promotion("standard")
    with guard, promotion, jax.enable_x64(False), jax.disable_jit(False), jax.debug_key_reuse(False):
        yield


def rounding() -> dict[str, str]:
    """Return the environment variables of this process that change the rounding."""
    return {name: value for name in _ROUNDING if (value := os.environ.get(name))}
