"""Runs of several processes: how they find each other, agree, speak and end."""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cifar_flax import files
from cifar_flax.errors import ConfigError, UserError, one_line
from cifar_flax.packages import has_module
from cifar_flax.runtime.devices import Layout, ParallelConfig

# For how many seconds a process that ends with an error waits until all have come to their end. When the main process
# has gone, which joins them, the others abort at once: it stays longer, until those that can have said what they found.
_LAST_WORDS = 1.0
_LAST_WORDS_OF_MAIN = 5.0

_label = ""  # of this process, where there are several


def start(config: ParallelConfig) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX looks for devices.

    Raises `ConfigError` where `distributed` is on and nothing says who they are, `UserError` where they cannot be had.
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
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from signals.py
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:  # nothing that JAX knows has launched this process
        if config.distributed == "on" or _num_tasks() > 1:
            allowed = "nothing that JAX knows says who takes part: set parallel.coordinator, num_processes, process_id"
            raise ConfigError(f"parallel.distributed={config.distributed!r}: {allowed}; or off ({error})") from error
        return
    except RuntimeError as error:
        raise UserError(f"the other processes of the run cannot be reached ({one_line(error)})") from error
    if jax.process_count() > 1:
        _label = f"[process {jax.process_index()} of {jax.process_count()}, {socket.gethostname()}] "
        print(f"{_label}{jax.local_device_count()} of {jax.device_count()} devices", flush=True)


def _is_launched() -> bool:
    """Whether a launcher has started this process among others, or, on a TPU, may have: its metadata tell."""
    tpu = has_module("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu" and "SLURM_JOB_ID" not in os.environ
    return tpu or _num_tasks() > 1


def _num_tasks() -> int:
    """How many processes the launcher has started.

    Slurm's shells know their job's number of tasks too; only that of the step is the number of processes at work.
    """
    return max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def is_main() -> bool:
    """Whether this is the process that writes files and tells of the run."""
    return jax.process_index() == 0


def label() -> str:
    """What the lines of this process begin with: which of several it is, and on which host."""
    return _label


def log(text: str) -> None:
    """Prints a line of the run, once for all processes; a run does not end because nobody reads it any more."""
    if is_main():
        with contextlib.suppress(OSError):
            print(f"{_label}{text}")


def wait_for_all() -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.process_allgather(np.zeros(1, np.int32))


def from_main(value: int) -> int:
    """What the main process has as `value`, in all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Agreement:
    """Lets all processes know of the same call when one of them wants something.

    Each asks once before every call of a step, with a number that is 0 while it wants nothing, and is told the greatest
    number of all `lag` calls later: by then the devices have found it, behind the steps, and nobody has waited for it.
    """

    def __init__(self, layout: Layout, lag: int):
        self._layout, self._lag = layout, lag
        self._greatest = jax.jit(jnp.max, out_shardings=layout.replicated)
        self._asked: deque[jax.Array] = deque()

    def __call__(self, wanted: int) -> int:
        if jax.process_count() == 1:
            return wanted
        with jax.transfer_guard("allow"):  # this is meant to cross
            numbers = self._layout.shard_batch(np.full(jax.local_device_count(), wanted, np.int32))
        self._asked.append(self._greatest(numbers))
        return int(jax.device_get(self._asked.popleft())) if len(self._asked) > self._lag else 0


def require_agreement(**values: Any) -> None:
    """Raises `UserError`, in every process, unless all of them call this with equal `values` (of JSON)."""
    if jax.process_count() == 1:
        return
    for name, value in values.items():
        checksum = bytes.fromhex(files.json_checksum(value))
        digests = multihost_utils.process_allgather(np.frombuffer(checksum, np.uint8))
        others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
        if others:
            which = f"process {others[0]} has" if len(others) == 1 else f"processes {others} have"
            raise UserError(f"{which} another {name} than process 0; start all of them with the same")


def lost_peer(error: Exception) -> UserError | None:
    """What to tell where `error` says that another process has gone; None where it says something else."""
    if _label and re.search("gloo|nccl|coordination|barrier|heartbeat|connection", str(error), re.IGNORECASE):
        return UserError(
            f"another process of the run has ended or cannot be reached ({one_line(error)}); see its log; the same "
            "command goes on from the newest checkpoint"
        )
    return None


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the code that `main` returns: on success after the others, else soon.

    JAX would have it wait for the others, and they, in the middle of a step, would wait for it.
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
            if stream is not None:
                stream.flush()
        except OSError:  # what cannot be written must not become the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if jax.distributed.is_initialized() and code:
        leaving = threading.Thread(target=_leave, daemon=True)
        leaving.start()
        leaving.join(_LAST_WORDS if _label and not is_main() else _LAST_WORDS_OF_MAIN)
        os._exit(code)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.exit(code)


def _leave() -> None:
    """Returns when all processes have come here."""
    with contextlib.suppress(Exception):  # the main process may have gone already
        jax.distributed.shutdown()
