import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cifar_flax.runtime.allocator import SETTINGS, _has_glibc

pytestmark = pytest.mark.skipif(not _has_glibc(), reason="sets glibc's allocator")

KEEP = "from cifar_flax.runtime.allocator import keep_freed_memory; keep_freed_memory()\n"
# Both print how many buffers the kernel had to supply. PR_SET_THP_DISABLE: count small pages, whatever its default is.
START = """
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)
"""
END = "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 2**26)"
# Allocates and frees 64 MB twenty times in a thread, as XLA does.
REPEAT = f"""{START}
def work():
    for _ in range(20):
        b"x" * 2**26
thread = threading.Thread(target=work)
thread.start()
thread.join()
{END}"""
# As in a training step, small allocations that stay follow an aligned buffer.
ALIGNED = f"""{START}
for small in 4 * (24, 40, 56, 72, 88):
    buffer = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(buffer), ctypes.c_size_t(64), ctypes.c_size_t(2**26))
    ctypes.memset(buffer, 1, 2**26)
    libc.malloc(ctypes.c_size_t(small))
    libc.free(buffer)
{END}"""


def run(program, **environment):
    """What it prints, in an environment without our settings."""
    clean = {name: value for name, value in os.environ.items() if name not in {*SETTINGS, "JAX_PLATFORMS"}}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_freed_memory_is_used_again():
    assert float(run(REPEAT)) > 19  # each time anew
    assert float(run(KEEP + REPEAT)) < 3


def test_freed_buffers_fit_the_next_ones():
    others = SETTINGS["GLIBC_TUNABLES"].replace("tcache_count=0", "tcache_count=7")
    assert float(run(ALIGNED, GLIBC_TUNABLES=others)) > 5
    assert float(run(KEEP + ALIGNED)) < 2


def test_no_other_program_is_started_again():
    """As in a notebook, where the process is not the one of the file that runs."""
    code = KEEP + "print('went on')"
    program = f"import code; print('started'); code.InteractiveInterpreter().runcode(compile({code!r}, 'file', 'exec'))"
    assert run(program).split("\n") == ["started", "went on", ""]


@pytest.mark.parametrize(
    ("environment", "restarts"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": ""}, False),
        ({"PYTHONPATH": "plugins"}, False),
        ({"PYTHONPATH": "plugins", "JAX_PLATFORMS": "cpu"}, True),
    ],
)
def test_when_the_process_starts_again(tmp_path, environment, restarts):
    (tmp_path / "jax_plugins").mkdir()  # as the packages for GPUs have it
    given = {name: value.replace("plugins", str(tmp_path)) for name, value in environment.items()}
    printed = run(
        "import os; print('started', flush=True)\n" + KEEP + "print(os.environ.get('GLIBC_TUNABLES'))", **given
    )
    assert printed.count("started") == 1 + restarts
    expected = SETTINGS | environment if restarts else environment
    assert printed.splitlines()[-1] == str(expected.get("GLIBC_TUNABLES"))
