import platform
import subprocess
import sys

import pytest
from conftest import REPOSITORY

# Allocates and frees 64 MB twenty times in a thread, as XLA does, and prints how many pages the kernel had to supply.
PROGRAM = """
import ctypes, resource, sys, threading
from cifar_flax.allocator import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: count small pages, whatever the kernel's default
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(20):
        b"x" * 2**26
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 2**26)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_used_again():
    faulted = {
        choice: float(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, choice], cwd=REPOSITORY, capture_output=True, text=True, check=True
            ).stdout
        )
        for choice in ("default", "keep")
    }
    assert faulted["default"] > 19  # in units of the buffer: each time anew
    assert faulted["keep"] < 3
