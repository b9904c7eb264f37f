"""Settings of glibc's malloc for training on a CPU: memory that one step frees is reused by the next.

glibc reads its settings when a process starts, so they take effect only after the process re-executes itself.
"""

import importlib.util
import os
import sys

# Names from glibc's manual, "Memory Allocation Tunables".
_TUNABLES = {
    "mmap_max": 0,  # allocate everything on the heap
    "arena_max": 1,  # use only the main arena, which can grow without limit
    "trim_threshold": 2**62,  # never return freed memory to the kernel
    "top_pad": 2**26,  # when growing the heap, request 64 MB more than needed
    # Aligned allocations leave small unused chunks beside the buffer. In a thread cache these chunks count as used and
    # do not merge with the freed buffer, which is then too small for the next aligned buffer of the same size: the
    # process grew by a whole buffer in many of its first steps.
    "tcache_count": 0,
}
SETTINGS = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}


def keep_freed_memory() -> None:
    """Re-execute the process with `SETTINGS` in its environment. Call this before anything else.

    By default glibc returns every freed buffer above 32 MB to the kernel. When the next training step allocates it
    again, the kernel must map and zero it page by page, which takes a third of the step's time on a CPU. With
    `SETTINGS` steps are faster, but the process keeps its peak memory.

    Do nothing if JAX could use an accelerator, the C library is not glibc, GLIBC_TUNABLES is set (even to the empty
    string), or the process was started for another program (a notebook, a debugger) or reads it from standard input.
    """
    if "GLIBC_TUNABLES" in os.environ or _may_use_accelerator() or not _has_glibc() or not _is_own_process():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)


def _may_use_accelerator() -> bool:
    installed = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return installed and os.environ.get("JAX_PLATFORMS") != "cpu"


def _is_own_process() -> bool:
    """Return whether the process was started to run this program, from a file, and not a debugger or notebook."""
    frame = sys._getframe()
    while frame.f_globals["__name__"] in {__name__, "cifar_flax.cli", "cifar_flax.__main__", "__main__", "runpy"}:
        if frame.f_back is None:
            return sys.argv[0] not in ("", "-")  # a new process would find standard input consumed, and run nothing
        frame = frame.f_back
    return False


def _has_glibc() -> bool:
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
