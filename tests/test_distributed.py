"""How processes join, agree and exit; tested with mocks in one process."""

import os
import threading

import jax
import numpy as np
import pytest

from cifar_flax.checkpoints import metadata
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.runtime import processes
from cifar_flax.runtime.devices import ParallelConfig


@pytest.fixture
def initialized(monkeypatch):
    """Return the list of the arguments of each call of `jax.distributed.initialize`."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    monkeypatch.setattr(processes, "has_module", lambda name: False)
    return calls


@pytest.mark.parametrize(
    ("settings", "variables", "joins"),
    [
        ({}, {}, False),
        ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),  # an interactive shell in a job of four tasks
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"distributed": "off"}, {"SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"distributed": "on"}, {}, True),
        ({"coordinator": "a:1", "num_processes": 1, "process_id": 0}, {}, True),
    ],
)
def test_when_a_process_joins_others(initialized, monkeypatch, settings, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.start(ParallelConfig(heartbeat_timeout_seconds=20, **settings))
    assert len(initialized) == joins
    assert all(call["heartbeat_timeout_seconds"] == 20 for call in initialized)


def test_a_tpu_host_joins_its_slice(initialized, monkeypatch):
    monkeypatch.setattr(processes, "has_module", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    processes.start(ParallelConfig())
    assert len(initialized) == 1


def test_joining_unknown_processes_is_refused(monkeypatch):
    def fail(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='on': .*parallel\.coordinator"):
        processes.start(ParallelConfig(distributed="on"))
    monkeypatch.setenv("PMI_SIZE", "4")  # four separate runs would write to the same folder
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='auto': .*\boff\b"):
        processes.start(ParallelConfig())


def test_unreachable_processes_are_reported_in_one_line(monkeypatch):
    def fail(**settings):
        raise RuntimeError("DEADLINE_EXCEEDED:\n barrier")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="DEADLINE_EXCEEDED: barrier"):
        processes.start(ParallelConfig(coordinator="a:1", num_processes=2, process_id=1))


def test_only_errors_of_communication_mean_a_lost_process(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert processes.lost_peer(gloo) is None  # a single process cannot lose another
    monkeypatch.setattr(processes, "_label", "[process 1 of 2, a] ")
    assert "another process" in str(processes.lost_peer(gloo))
    assert processes.lost_peer(ValueError("operands could not be broadcast")) is None


class Exited(BaseException):
    """Raised instead of ending the process."""


@pytest.fixture
def timeouts(monkeypatch):
    """Simulate a process whose peers never shut down; return the timeouts with which it waits for them."""
    never, seconds = threading.Event(), []
    join = threading.Thread.join

    def leave(code):
        raise Exited(code)

    def join_soon(thread, timeout=None):
        seconds.append(timeout)
        join(thread, min(timeout, 0.1))

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: never.wait(10))
    monkeypatch.setattr(threading.Thread, "join", join_soon)
    monkeypatch.setattr(os, "_exit", leave)
    yield seconds
    never.set()


def test_after_an_error_a_process_waits_for_others_with_a_timeout(timeouts):
    with pytest.raises(Exited, match="3"):
        processes.run(lambda: 3)
    assert timeouts == [processes._EXIT_SECONDS_OF_MAIN]


def test_on_success_a_process_waits_for_the_others(timeouts, monkeypatch):
    waited = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: waited.append(True))
    with pytest.raises(SystemExit, match="0"):
        processes.run(lambda: 0)
    assert waited
    assert not timeouts


def test_after_an_error_the_main_process_exits_last(timeouts, monkeypatch):
    """The other processes abort when the main process, the coordinator, is gone, before they have printed errors."""
    for number in range(3):
        monkeypatch.setattr(processes, "_label", f"[process {number} of 3, a] ")
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(Exited):
            processes.run(lambda: 1)
    main, *others = timeouts
    assert main >= max(others) + 3  # seconds between the first and the last process that meets an error


def test_an_unexpected_error_ends_one_of_several_processes(timeouts, capsys):
    with pytest.raises(Exited, match="1"):
        processes.run(lambda: 1 // 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_different_values_are_reported_with_their_processes(monkeypatch):
    """Of four processes, the second and the fourth have other values."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda own: np.stack([own, own + 1, own, own + 1])
    )
    with pytest.raises(UserError, match=r"^processes \[1, 3\] .*\bdata\b"):
        processes.require_agreement(data={"b": 1, "a": [1.5]})


def test_a_lost_process_is_not_reported_as_a_damaged_checkpoint(monkeypatch, tmp_path):
    """Orbax waits at barriers while it reads; a user might delete an intact checkpoint that is reported as damaged."""
    lost = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    assert f"{tmp_path}/3" in str(metadata.unreadable(tmp_path, 3, lost))
    monkeypatch.setattr(processes, "_label", "[process 1 of 2, a] ")
    assert "another process" in str(metadata.unreadable(tmp_path, 3, lost))
