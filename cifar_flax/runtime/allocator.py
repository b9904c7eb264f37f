"""Settings of glibc's malloc for training on a CPU: memory that one step frees is reused by the next.

glibc reads its settings when a process starts, so they take effect only after the process re-executes itself.
"""

import contextlib
import importlib.util
import os
import pkgutil
import sys


def _has_glibc() -> bool:
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def tunables(glibc: tuple[int, int]) -> dict[str, int]:
    """Return the settings for this version of `glibc`. Names from its manual, "Memory Allocation Tunables"."""
    common = {
        "arena_max": 1,  # use only the main arena, which can grow without limit
        "trim_threshold": 2**62,  # never return freed memory of the heap to the kernel
        "top_pad": 2**26,  # when growing the heap, request 64 MB more than needed
        # Aligned allocations leave small unused chunks beside the buffer. In a thread cache these chunks count as used
        # and do not merge with the freed buffer, which is then too small for the next aligned buffer of the same size:
        # the process grew by a whole buffer in many of its first steps.
        "tcache_count": 0,
    }
    # XLA keeps all temporary values of a step in one buffer. It often allocates the buffer of the next step just before
    # it frees that of the last step, so the heap grows to two buffers, and to three when small allocations split a
    # freed one. A mapped buffer takes no memory until the step writes to it, and none after it is freed; but the kernel
    # zeroes its pages in each step.
    if glibc < (2, 35):  # mmap_threshold is limited to 32 MB, less than the reference network's buffer
        return common | {"mmap_max": 0}  # allocate everything on the heap
    return common | {
        "mmap_threshold": 2**28,  # map buffers of 256 MB or more
        "hugetlb": 1,  # request transparent huge pages, which more than halve that time
    }


def _glibc_version() -> tuple[int, int]:
    name = None
    with contextlib.suppress(OSError, ValueError):  # of other C libraries
        name = os.confstr("CS_GNU_LIBC_VERSION")  # such as "glibc 2.36"
    name = name or "glibc 0.0"
    major, minor, *_ = name.split()[-1].split(".")
    return int(major), int(minor)


SETTINGS = {
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables(_glibc_version()).items())
}


def keep_freed_memory() -> None:
    """Re-execute the process with `SETTINGS` in its environment. Call this before anything else.

    By default glibc returns every freed buffer above 32 MB to the kernel. When the next training step allocates it
    again, the kernel must map and zero it page by page, which takes a third of the step's time on a CPU. With
    `SETTINGS` the process keeps freed memory, except buffers of 256 MB or more, which would multiply its peak memory.

    Do nothing if JAX could use an accelerator, the C library is not glibc, GLIBC_TUNABLES is set (even to the empty
    string), or the process was started for another program (a notebook, a debugger) or reads it from standard input.
    """
    if "GLIBC_TUNABLES" in os.environ or _may_use_accelerator() or not _has_glibc() or not _is_own_process():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)


def _may_use_accelerator() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    places = plugins.submodule_search_locations if plugins else None
    # The folder of a plugin that was uninstalled may remain, but it is empty.
    installed = any(pkgutil.iter_modules(places or ())) or importlib.util.find_spec("libtpu") is not None
    return installed and os.environ.get("JAX_PLATFORMS") != "cpu"


def _is_own_process() -> bool:
    """Return whether the process was started to run this program, from a file, and not a debugger or notebook."""
    frame = sys._getframe()
    while frame.f_globals["__name__"] in {__name__, "cifar_flax.cli", "cifar_flax.__main__", "__main__", "runpy"}:
        if frame.f_back is None:
            return sys.argv[0] not in ("", "-")  # a new process would find standard input consumed, and run nothing
        frame = frame.f_back
    return False
