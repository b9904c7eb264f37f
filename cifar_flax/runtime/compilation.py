"""Compiler options, and the persistent compilation cache."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cifar_flax import files
from cifar_flax.errors import one_line

# Up to jax 0.10, XLA's CPU compiler drops optimization barriers before it fuses operations, and then computes a value
# anew for each element that needs it: a step of the reference network takes twice as long. This keeps them.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# On a GPU some sums are taken in the order in which threads come to them, and the fastest of several programs is chosen
# by timing them, at each compilation anew. This has neither. (On a CPU and a TPU programs repeat by themselves.)
_DETERMINISTIC_GPU_OPTIONS = {"xla_gpu_deterministic_ops": True}

_NAME = "compiled"  # the folder in the user's cache folder
_FOLDER = "jax_compilation_cache_dir"
_IS_USED = "jax_enable_compilation_cache"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_MAX_BYTES = 2 * 2**30  # of the folder; the programs of the quickstart take 350 kB


def options(platform: str, *, deterministic: bool = False) -> dict[str, Any]:
    """`compiler_options` for `jax.jit` of a training or evaluation step."""
    if platform == "cpu":
        return _CPU_OPTIONS
    return _DETERMINISTIC_GPU_OPTIONS if platform in ("gpu", "cuda") and deterministic else {}


def keep_programs() -> None:
    """Enable JAX's persistent compilation cache, in the user's cache folder.

    JAX runs what it loads from there, so the folder is accessible to its owner only; if that is impossible, it is not
    used. JAX's variables take precedence: JAX_COMPILATION_CACHE_DIR names another folder, whose size is not limited,
    and JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if programs_folder() is None:
        folder = files.user_cache() / _NAME
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # fails on a folder of another user
        except OSError:
            return
        jax.config.update(_FOLDER, str(folder))
        _remove_oldest(folder)
    jax.config.update(_MIN_SECONDS, 0)  # the many small ones add up to seconds


def _remove_oldest(folder: Path) -> None:
    """Remove the oldest files of `folder` until the others take at most `_MAX_BYTES`.

    JAX's own limit (jax_compilation_cache_max_size) fails in jax 0.10 on an entry that a killed process has left
    without its time of access: from then on, no program is cached.
    """
    total = 0
    with contextlib.suppress(OSError):  # another process may be removing the same files
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            total += path.stat().st_size
            if total > _MAX_BYTES:
                path.unlink()


def programs_folder() -> str | None:
    """Return the folder of the persistent compilation cache, or None if it is disabled."""
    return getattr(jax.config, _FOLDER) if getattr(jax.config, _IS_USED) else None


def why_not_kept() -> str | None:
    """Return why the persistent compilation cache does not work, or None if a probe was read back."""
    if not getattr(jax.config, _IS_USED):
        return "JAX_ENABLE_COMPILATION_CACHE is false"
    folder = programs_folder()
    if folder is None:
        return f"{files.user_cache() / _NAME} cannot be made, or is not this user's"
    try:
        with _changed({_MIN_SECONDS: 0, "jax_raise_persistent_cache_errors": True}):
            return None if _finds_again(Path(folder)) else f"{folder} does not give back what is kept there"
    except Exception as error:  # whatever the disk or JAX says to it
        return f"{folder} does not work ({one_line(error)})"


def _finds_again(folder: Path) -> bool:
    """Return whether a new program is read from the cache when it is compiled again; remove it from `folder`."""
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


def nothing_kept() -> contextlib.AbstractContextManager[None]:
    """Disable writes to the persistent compilation cache inside the block."""
    return _changed({_MIN_SECONDS: 1e9})


@contextlib.contextmanager
def _changed(settings: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
