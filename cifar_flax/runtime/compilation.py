"""Compiler options, and the persistent compilation cache."""

import contextlib
import glob
import re
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cifar_flax import files
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import streams

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
_NEVER = 1e9  # seconds
_WARNING = "Error (reading|writing) persistent compilation cache entry for"  # by JAX
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
    _remove_damaged(warnings.showwarning)


def _remove_damaged(show: Callable[..., None]) -> None:
    """Handle JAX's warnings about the cache: remove the damaged programs, and print one line; `show` other warnings.

    JAX neither removes nor overwrites an incomplete file, such as one that a full disk has cut off.
    """
    printed = False

    def handle(message: Warning | str, *where: Any, **options: Any) -> None:
        nonlocal printed
        found, folder = re.match(f"{_WARNING} '(.*?)': (.*)", str(message)), program_cache()
        if not found or folder is None:
            return show(message, *where, **options)
        action, name, reason = found.groups()
        effect = "read; they are removed and compiled again"
        if action == "writing":
            jax.config.update(_MIN_SECONDS, _NEVER)
            effect = "written; they will be compiled again at the next start"
        with contextlib.suppress(OSError):
            for path in Path(folder).glob(f"{glob.escape(name)}-*"):
                path.unlink()
        if not printed:
            printed = True
            streams.show(f"compiled programs in {folder} cannot be {effect} ({reason})", error=True)

    warnings.showwarning = handle


def _remove_oldest(folder: Path) -> None:
    """Remove the oldest files in `folder` until the rest takes at most `_MAX_BYTES`.

    JAX's own limit (jax_compilation_cache_max_size) is not used: in jax 0.10, a process killed during a write can leave
    an entry without an access time, and after that no program is cached.
    """
    total = 0
    with contextlib.suppress(OSError):  # another process may be removing the same files
        found = [(path.stat(), path) for path in folder.iterdir() if path.is_file()]
        for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
            total += status.st_size
            if total > _MAX_BYTES:
                path.unlink()


def program_cache() -> str | None:
    """Return the folder of the persistent compilation cache, or None if it is disabled."""
    return getattr(jax.config, _FOLDER) if getattr(jax.config, _IS_USED) else None


def cache_problem() -> str | None:
    """Return why the persistent compilation cache does not work, or None if a probe was read back.

    Afterwards, this process writes no programs.
    """
    if not getattr(jax.config, _IS_USED):
        return "JAX_ENABLE_COMPILATION_CACHE is false"
    folder = program_cache()
    if folder is None:
        try:
            return f"{files.user_cache() / _NAME} cannot be created or belongs to another user"
        except UserError as error:
            return str(error)
    jax.config.update(_MIN_SECONDS, 0)

    def program(x: jax.Array) -> jax.Array:
        return x + 1

    program.__name__ = f"probe_{secrets.token_hex(8)}"
    written: list[Path] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _WARNING)
            for _ in range(2):  # write the program, then read it
                jax.clear_caches()
                jax.jit(program)(0)
    except Exception as error:  # any error of the disk or of JAX
        return f"{folder} cannot be used ({one_line(error)})"
    finally:
        written += Path(folder).glob(f"*{program.__name__}*")
        for path in written:
            path.unlink(missing_ok=True)
        jax.config.update(_MIN_SECONDS, _NEVER)
    return None if written else f"{folder} does not keep a program that was written to it"
