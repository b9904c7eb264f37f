"""Multi-process runs: start, consistency checks, logging and exit."""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cifar_flax import files
from cifar_flax.errors import ConfigError, UserError, one_line
from cifar_flax.packages import has_module
from cifar_flax.runtime import streams
from cifar_flax.runtime.devices import Layout, ParallelConfig, all_devices

# Seconds that a process with an error waits for the others before it exits. The main process hosts the coordination
# service, and the others abort as soon as it exits, so it waits longer to let them report their errors.
_EXIT_SECONDS = 1.0
_EXIT_SECONDS_OF_MAIN = 5.0

_is_quiet = False  # whether `log` omits routine lines
_label = ""  # prefix of this process's log lines; "" in a single-process run


def start(config: ParallelConfig) -> None:
    """Connect to the other processes of the run, if there are any. Call this before JAX initializes its devices.

    Raise `ConfigError` if the other processes are required but not known, and `UserError` if they cannot be reached.
    """
    global _label
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": config.heartbeat_timeout_seconds}
    if config.coordinator:
        settings |= {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif config.distributed == "off" or not (config.distributed == "on" or _is_launched()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would replace the SIGTERM handler of signals.py
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:  # JAX detects no launcher
        if config.distributed == "on" or _num_tasks() > 1:
            reason = f"JAX cannot detect the other processes ({error})"
            advice = "Set parallel.coordinator, num_processes and process_id, or parallel.distributed=off"
            raise ConfigError(f"parallel.distributed={config.distributed!r}: {reason}. {advice}") from error
        return
    except RuntimeError as error:
        raise UserError(f"the other processes of the run cannot be reached ({one_line(error)})") from error
    all_devices()  # before other calls that would raise JAX's own error for a missing device
    if jax.process_count() > 1:
        _label = f"[process {jax.process_index()} of {jax.process_count()}, {socket.gethostname()}] "
        print(f"{_label}{jax.local_device_count()} of {jax.device_count()} devices", flush=True)


def _is_launched() -> bool:
    """Return whether a launcher may have started several processes. On a TPU, only the metadata server knows."""
    tpu = has_module("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu" and "SLURM_JOB_ID" not in os.environ
    return tpu or _num_tasks() > 1


def _num_tasks() -> int:
    """Return how many processes the launcher has started.

    SLURM_NTASKS is not used, because Slurm also sets it in a job's shell, which is a single process.
    """
    return max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def is_main() -> bool:
    """Return whether this is the main process (number 0), which writes the files and the log of the run."""
    return jax.process_index() == 0


def label() -> str:
    """Return the prefix of this process's log lines (its number and host), or "" in a single-process run."""
    return _label


def log(text: str, *, is_routine: bool = False) -> None:
    """Print `text` in the main process only; in a block of `quiet`, not if every run prints it (`is_routine`).

    Ignore a closed pipe, so that it cannot end a run.
    """
    if is_main() and not (_is_quiet and is_routine):
        streams.show(f"{_label}{text}")


@contextlib.contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """If `is_quiet`, make `log` omit routine lines inside the block."""
    global _is_quiet
    before, _is_quiet = _is_quiet, is_quiet
    try:
        yield
    finally:
        _is_quiet = before


def wait_for_all() -> None:
    """Block until every process has called this function."""
    if jax.process_count() > 1:
        multihost_utils.process_allgather(np.zeros(1, np.int32))


def from_main(value: int) -> int:
    """Return the main process's `value` in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Agreement:
    """All-reduce (max) of a per-process number, read `lag` calls later so that no training step waits for it.

    Every process must call this once before each call of a training step, with 0 for no request. All processes then
    see a request, such as the number of a signal, before the same step.
    """

    def __init__(self, layout: Layout, lag: int):
        self._layout, self._lag = layout, lag
        self._greatest = jax.jit(jnp.max, out_shardings=layout.replicated)
        self._asked: deque[jax.Array] = deque()

    def __call__(self, wanted: int) -> int:
        """Submit `wanted`; return the maximum over all processes of the numbers submitted `lag` calls earlier."""
        if jax.process_count() == 1:
            return wanted
        with jax.transfer_guard("allow"):  # this transfer is intended
            numbers = self._layout.shard_batch(np.full(jax.local_device_count(), wanted, np.int32))
        self._asked.append(self._greatest(numbers))
        return int(jax.device_get(self._asked.popleft())) if len(self._asked) > self._lag else 0


def require_agreement(**values: Any) -> None:
    """Raise `UserError` in every process unless all processes pass equal `values`, which must be JSON-serializable."""
    if jax.process_count() == 1:
        return
    for name, value in values.items():
        checksum = bytes.fromhex(files.json_checksum(value))
        digests = multihost_utils.process_allgather(np.frombuffer(checksum, np.uint8))
        others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
        if others:
            which = f"process {others[0]} differs" if len(others) == 1 else f"processes {others} differ"
            raise UserError(f"{which} from process 0 in {name}. Start all processes with the same {name}")


def lost_peer(error: Exception) -> UserError | None:
    """Return the error to report if the text of `error` suggests that another process has exited, else None."""
    if _label and re.search("gloo|nccl|coordination|barrier|heartbeat|connection", str(error), re.IGNORECASE):
        return UserError(
            f"another process of the run has ended or cannot be reached ({one_line(error)}). See its log; the same "
            "command resumes from the newest checkpoint"
        )
    return None


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with its return code. On success, wait for the other processes; else exit within seconds.

    JAX's exit handler is bypassed after an error: it would wait for the other processes, which would wait for this one
    in the middle of a step.
    """
    try:
        code = main()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
        try:
            stream.flush()
        except OSError:  # a failed flush must not change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if jax.distributed.is_initialized() and code:
        leaving = threading.Thread(target=_leave, daemon=True)
        leaving.start()
        leaving.join(_EXIT_SECONDS if _label and not is_main() else _EXIT_SECONDS_OF_MAIN)
        os._exit(code)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.exit(code)


def _leave() -> None:
    """Disconnect from the coordination service. This blocks until all processes disconnect."""
    with contextlib.suppress(Exception):  # the main process may have exited already
        jax.distributed.shutdown()
