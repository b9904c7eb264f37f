import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cifar_flax.runtime.allocator import SETTINGS, _glibc_version, _has_glibc, tunables

pytestmark = pytest.mark.skipif(not _has_glibc(), reason="sets glibc's allocator")

KEEP = "from cifar_flax.runtime.allocator import keep_freed_memory; keep_freed_memory()\n"
# Programs print page faults in units of one 64 MB buffer. PR_SET_THP_DISABLE (41) makes all pages small.
START = """
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)
"""
END = "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 2**26)"
# Allocate and free 64 MB twenty times, in a thread as XLA does.
REPEAT = f"""{START}
def work():
    for _ in range(20):
        b"x" * 2**26
thread = threading.Thread(target=work)
thread.start()
thread.join()
{END}"""
# As in a training step, each aligned buffer is followed by a small allocation that is never freed.
ALIGNED = f"""{START}
for small in 4 * (24, 40, 56, 72, 88):
    buffer = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(buffer), ctypes.c_size_t(64), ctypes.c_size_t(2**26))
    ctypes.memset(buffer, 1, 2**26)
    libc.malloc(ctypes.c_size_t(small))
    libc.free(buffer)
{END}"""
# Like XLA, allocate the buffer of the next step before that of the last step is freed. Each step first makes a small
# allocation that is never freed. Print the growth of the resident memory in buffers of 300 MB.
LARGE = f"""{START}
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 300e6
before, last = resident(), None
for _ in range(2):
    buffer = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(buffer), ctypes.c_size_t(64), ctypes.c_size_t(300_000_000))
    libc.free(last)
    libc.malloc(ctypes.c_size_t(2**20))
    ctypes.memset(buffer, 1, 300_000_000)
    last = buffer
print(resident() - before)
"""


def run(program, **environment):
    """Return the output of `program`, run without the allocator settings of this process."""
    clean = {name: value for name, value in os.environ.items() if name not in {*SETTINGS, "JAX_PLATFORMS"}}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_freed_memory_is_reused():
    assert float(run(REPEAT)) > 19  # every allocation faults in new pages
    assert float(run(KEEP + REPEAT)) < 3


def test_freed_buffers_fit_the_next_ones():
    with_thread_cache = SETTINGS["GLIBC_TUNABLES"].replace("tcache_count=0", "tcache_count=7")
    assert float(run(ALIGNED, GLIBC_TUNABLES=with_thread_cache)) > 5
    assert float(run(KEEP + ALIGNED)) < 2


@pytest.mark.skipif(_glibc_version() < (2, 35), reason="limits mmap_threshold to 32 MB")
def test_one_large_buffer_is_resident():
    on_heap = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables((2, 34)).items())
    assert float(run(LARGE, GLIBC_TUNABLES=on_heap)) > 1.9
    assert float(run(KEEP + LARGE)) < 1.1


def test_embedded_code_does_not_restart_the_process():
    """In a notebook, for example, the process was started for another program than the code that runs."""
    code = KEEP + "print('continued')"
    program = f"import code; print('started'); code.InteractiveInterpreter().runcode(compile({code!r}, 'file', 'exec'))"
    assert run(program).split("\n") == ["started", "continued", ""]


@pytest.mark.parametrize("arguments", [[], ["-"], ["-", "--config=default"]])
def test_a_program_from_standard_input_runs(arguments):
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"JAX_PLATFORMS": "cpu"}
    command, program = [sys.executable, *arguments], KEEP + "print('continued')"
    ran = subprocess.run(command, input=program, env=clean, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == "continued\n"


@pytest.mark.parametrize(
    ("environment", "restarts"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": ""}, False),
        ({"PYTHONPATH": "plugins"}, False),
        ({"PYTHONPATH": "plugins", "JAX_PLATFORMS": "cpu"}, True),
        ({"PYTHONPATH": "uninstalled"}, True),
    ],
)
def test_when_the_process_restarts(tmp_path, environment, restarts):
    # JAX's GPU plugins install such a package. After they are uninstalled, an empty folder may remain.
    (tmp_path / "plugins" / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    (tmp_path / "plugins" / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    (tmp_path / "uninstalled" / "jax_plugins" / "__pycache__").mkdir(parents=True)
    environment = {
        name: str(tmp_path / value) if name == "PYTHONPATH" else value for name, value in environment.items()
    }
    printed = run(
        "import os; print('started', flush=True)\n" + KEEP + "print(os.environ.get('GLIBC_TUNABLES'))", **environment
    )
    assert printed.count("started") == 1 + restarts
    expected = SETTINGS | environment if restarts else environment
    assert printed.splitlines()[-1] == str(expected.get("GLIBC_TUNABLES"))
