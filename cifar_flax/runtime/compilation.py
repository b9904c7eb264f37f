"""Compiler options, and the persistent compilation cache."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cifar_flax import files
from cifar_flax.errors import UserError, one_line

# Up to jax 0.10, XLA's CPU compiler removes optimization barriers before fusion and then recomputes a value for each
# element that needs it, so that a step of the reference network takes twice as long. This option keeps the barriers.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# On a GPU, atomic additions happen in varying order, and autotuning chooses kernels by timing at each compilation. This
# option avoids both. (On CPUs and TPUs, programs are deterministic without it.)
_DETERMINISTIC_GPU_OPTIONS = {"xla_gpu_deterministic_ops": True}

# By default, XLA for GPUs launches convolutions and the iterations of a loop one by one, between CUDA graphs of the
# other kernels. With this list of commands, a whole call is one graph, including its loop.
_ONE_CUDA_GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION,WHILE"
}

_NAME = "compiled"  # folder in the user's cache folder
_FOLDER = "jax_compilation_cache_dir"
_IS_USED = "jax_enable_compilation_cache"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_MAX_BYTES = 2 * 2**30  # size limit of the folder; the programs of the quickstart take 350 kB


def options(platform: str, *, deterministic: bool = False, one_cuda_graph: bool = False) -> dict[str, Any]:
    """Return the `compiler_options` to compile a training or evaluation step with."""
    if platform == "cpu":
        return _CPU_OPTIONS
    if platform not in ("gpu", "cuda"):
        return {}
    return (_DETERMINISTIC_GPU_OPTIONS if deterministic else {}) | (_ONE_CUDA_GRAPH_OPTIONS if one_cuda_graph else {})


def enable_cache() -> None:
    """Enable JAX's persistent compilation cache, in the user's cache folder.

    JAX executes the programs that it loads from this folder, so only the owner may access it. If its permissions cannot
    be restricted, the cache is not used. JAX's environment variables take precedence: JAX_COMPILATION_CACHE_DIR sets
    another folder, whose size is not limited, and JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if program_cache() is None:
        try:
            folder = files.user_cache() / _NAME
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # fails if another user owns the folder
        except (OSError, UserError):
            return
        jax.config.update(_FOLDER, str(folder))
        _remove_oldest(folder)
    jax.config.update(_MIN_SECONDS, 0)  # compiling the many small programs takes seconds in total


def _remove_oldest(folder: Path) -> None:
    """Remove the oldest files in `folder` until the rest takes at most `_MAX_BYTES`.

    JAX's own limit (jax_compilation_cache_max_size) is not used: in jax 0.10, a process killed during a write can leave
    an entry without an access time, and after that no program is cached.
    """
    total = 0
    with contextlib.suppress(OSError):  # another process may be removing the same files
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            total += path.stat().st_size
            if total > _MAX_BYTES:
                path.unlink()


def program_cache() -> str | None:
    """Return the folder of the persistent compilation cache, or None if it is disabled."""
    return getattr(jax.config, _FOLDER) if getattr(jax.config, _IS_USED) else None


def cache_problem() -> str | None:
    """Return why the persistent compilation cache does not work, or None if a probe was read back."""
    if not getattr(jax.config, _IS_USED):
        return "JAX_ENABLE_COMPILATION_CACHE is false"
    folder = program_cache()
    if folder is None:
        try:
            return f"{files.user_cache() / _NAME} cannot be created or belongs to another user"
        except UserError as error:
            return str(error)
    try:
        with _changed({_MIN_SECONDS: 0, "jax_raise_persistent_cache_errors": True}):
            return None if _finds_again(Path(folder)) else f"{folder} does not return a program that was written to it"
    except Exception as error:  # any error of the disk or of JAX
        return f"{folder} cannot be used ({one_line(error)})"


def _finds_again(folder: Path) -> bool:
    """Compile a new program twice; return whether the second time reads it from the cache. Remove it from `folder`."""
    number, found = secrets.randbelow(2**31), []

    def program(x: jax.Array) -> jax.Array:
        return x + number

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    program.__name__ = f"probe_{secrets.token_hex(8)}"
    jax.monitoring.register_event_listener(listen)
    try:
        for _ in range(2):
            jax.clear_caches()
            jax.jit(program)(0)
    finally:
        jax.monitoring.unregister_event_listener(listen)
        for file in folder.glob(f"*{program.__name__}*"):
            file.unlink(missing_ok=True)
    return bool(found)


def cache_writes_disabled() -> contextlib.AbstractContextManager[None]:
    """Disable writes to the persistent compilation cache inside the block."""
    return _changed({_MIN_SECONDS: 1e9})


@contextlib.contextmanager
def _changed(settings: dict[str, Any]) -> Iterator[None]:
    """Change `settings` of jax.config inside the block."""
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
