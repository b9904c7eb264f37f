"""How programs are compiled, and where compiled ones are kept."""

from typing import Any

import jax

from cifar_flax.data import cache

# Up to jax 0.10, XLA's CPU compiler drops optimization barriers before it fuses operations, and then computes a value
# anew for each element that needs it: a step of the reference network takes twice as long. This keeps them.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# On a GPU some sums are taken in the order in which threads come to them, and the fastest of several programs is chosen
# by timing them, at each compilation anew. This has neither. (On a CPU and a TPU programs repeat by themselves.)
_DETERMINISTIC_GPU_OPTIONS = {"xla_gpu_deterministic_ops": True}

_FOLDER = "jax_compilation_cache_dir"


def options(platform: str, *, deterministic: bool = False) -> dict[str, Any]:
    """`compiler_options` for `jax.jit` of a training or evaluation step."""
    if platform == "cpu":
        return _CPU_OPTIONS
    return _DETERMINISTIC_GPU_OPTIONS if platform in ("gpu", "cuda") and deterministic else {}


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, where the next start finds them.

    What lies there is run: the folder is open to its owner alone, and not used where that cannot be had. JAX's own
    variables count: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false is the switch.
    """
    if getattr(jax.config, _FOLDER) is None:
        folder = cache.default_dir() / "compiled"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # fails on a folder of another user
        except OSError:
            return
        jax.config.update(_FOLDER, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the many small ones add up to seconds
