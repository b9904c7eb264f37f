"""The C library's memory allocator, set for programs that free and allocate the same large buffers at every step."""

import ctypes
import platform

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation; call it before the first thread starts.

    By default every buffer above 32 MB goes back to the kernel when it is freed, and is mapped, zeroed and faulted in
    page by page when the next training step allocates it again: on a CPU, a third of the step's time. The price is a
    process that stays as large as it ever was. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)  # all from the heap,
    mallopt(_M_ARENA_MAX, 1)  # from the one that can grow without limit,
    mallopt(_M_TRIM_THRESHOLD, -1)  # which gives nothing back
    mallopt(_M_TOP_PAD, 2**26)  # and grows by 64 MB
