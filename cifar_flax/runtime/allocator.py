"""The C library's allocator for training on a CPU: what a step frees is kept for the next, which needs it again.

glibc reads its settings when a process starts, so a process that needs others starts once more.
"""

import importlib.util
import os
import sys

# Names from glibc's manual, "Memory Allocation Tunables".
_TUNABLES = {
    "mmap_max": 0,  # all from the heap,
    "arena_max": 1,  # from the one that can grow without limit,
    "trim_threshold": 2**62,  # which gives nothing back
    "top_pad": 2**26,  # and grows by 64 MB
    # An aligned buffer leaves scraps beside it. In a thread's cache they count as used, and the buffer, once freed, is
    # too small by them for the next one of its own size: the process grew by a buffer at many of its first steps.
    "tcache_count": 0,
}
SETTINGS = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}


def keep_freed_memory() -> None:
    """Starts the process again with `SETTINGS` in its environment; to be called before anything else is done.

    By default glibc gives every freed buffer above 32 MB back to the kernel, and it is mapped, zeroed and faulted in
    page by page when the next training step allocates it again: on a CPU, a third of the step's time. The price is a
    process that stays as large as it ever was.

    Does nothing where JAX could use an accelerator, without glibc, in a process that was started for something else (a
    notebook, a debugger), and where GLIBC_TUNABLES is set already, to nothing even: that is the switch.
    """
    if "GLIBC_TUNABLES" in os.environ or _may_use_accelerator() or not _has_glibc() or not _is_own_process():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)


def _may_use_accelerator() -> bool:
    installed = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return installed and os.environ.get("JAX_PLATFORMS") != "cpu"


def _is_own_process() -> bool:
    """Whether Python was started with the file or module that is running, and nothing runs it for someone else."""
    frame = sys._getframe()
    while frame.f_globals["__name__"] in {__name__, "cifar_flax.cli", "cifar_flax.__main__", "__main__", "runpy"}:
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return False


def _has_glibc() -> bool:
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
