"""How processes find each other, agree and end, without starting any."""

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
    """What `jax.distributed.initialize` is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    monkeypatch.setattr(processes, "has_module", lambda name: False)
    return calls


@pytest.mark.parametrize(
    ("settings", "variables", "joins"),
    [
        ({}, {}, False),
        ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),  # a shell in a job of four tasks
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"distributed": "off"}, {"SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"distributed": "on"}, {}, True),
        ({"coordinator": "a:1", "num_processes": 1, "process_id": 0}, {}, True),
    ],
)
def test_who_joins_other_processes(initialized, monkeypatch, settings, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.start(ParallelConfig(heartbeat_timeout_seconds=20, **settings))
    assert len(initialized) == joins
    assert all(call["heartbeat_timeout_seconds"] == 20 for call in initialized)


def test_a_tpu_host_asks_its_slice(initialized, monkeypatch):
    monkeypatch.setattr(processes, "has_module", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    processes.start(ParallelConfig())
    assert len(initialized) == 1


def test_joining_whom_nobody_names_is_refused(monkeypatch):
    def fail(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='on': nothing that JAX knows says who takes part"):
        processes.start(ParallelConfig(distributed="on"))
    monkeypatch.setenv("PMI_SIZE", "4")  # alone, each of the four would write to the same folder
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='auto': nothing that JAX knows .*; or off"):
        processes.start(ParallelConfig())


def test_others_that_cannot_be_reached_are_one_message(monkeypatch):
    def fail(**settings):
        raise RuntimeError("DEADLINE_EXCEEDED:\n barrier")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"cannot be reached .*DEADLINE_EXCEEDED: barrier"):
        processes.start(ParallelConfig(coordinator="a:1", num_processes=2, process_id=1))


def test_only_what_tells_of_lost_processes_is_taken_for_it(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert processes.lost_peer(gloo) is None  # alone, there is nobody to lose
    monkeypatch.setattr(processes, "_label", "[process 1 of 2, a] ")
    assert "another process of the run has ended" in str(processes.lost_peer(gloo))
    assert processes.lost_peer(ValueError("operands could not be broadcast")) is None


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch):
    """How the process ends, one of several that never come to their end; and for how long it would wait for them."""
    never, seconds = threading.Event(), []
    join = threading.Thread.join

    def leave(code):
        raise Left(code)

    def join_soon(thread, timeout=None):
        seconds.append(timeout)
        join(thread, min(timeout, 0.1))

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: never.wait(10))
    monkeypatch.setattr(threading.Thread, "join", join_soon)
    monkeypatch.setattr(os, "_exit", leave)
    yield seconds
    never.set()


def test_a_process_of_several_never_waits_long_after_an_error(ends):
    with pytest.raises(Left, match="3"):
        processes.run(lambda: 3)
    assert ends == [processes._LAST_WORDS_OF_MAIN]


def test_a_process_of_several_waits_for_the_others_on_success(ends, monkeypatch):
    waited = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: waited.append(True))
    with pytest.raises(SystemExit, match="0"):
        processes.run(lambda: 0)
    assert waited
    assert not ends


def test_after_an_error_the_main_process_leaves_last(ends, monkeypatch):
    """The others, whom it joins, abort when it has gone, whatever they were about to say."""
    for number in range(3):
        monkeypatch.setattr(processes, "_label", f"[process {number} of 3, a] ")
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(Left):
            processes.run(lambda: 1)
    main, *others = ends
    assert main >= max(others) + 3  # seconds, as far apart as processes may find an error


def test_an_unforeseen_error_ends_one_of_several_too(ends, capsys):
    with pytest.raises(Left, match="1"):
        processes.run(lambda: 1 // 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_agreement_is_of_values(monkeypatch):
    """Four processes, the second and the fourth of which have something else."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda own: np.stack([own, own + 1, own, own + 1])
    )
    with pytest.raises(UserError, match=r"^processes \[1, 3\] have another data than process 0"):
        processes.require_agreement(data={"b": 1, "a": [1.5]})


def test_no_checkpoint_is_blamed_for_a_lost_process(monkeypatch, tmp_path):
    """Orbax's reading has barriers: the advice to delete a folder would cost an intact one."""
    lost = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    assert "cannot be read" in str(metadata.unreadable(tmp_path, 3, lost))
    monkeypatch.setattr(processes, "_label", "[process 1 of 2, a] ")
    assert "another process of the run has ended" in str(metadata.unreadable(tmp_path, 3, lost))
