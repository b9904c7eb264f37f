"""Runs of several real processes, over the loopback interface."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import NOT_TIMES, REPOSITORY, read_metrics

from cifar_flax import distributed
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.parallel import ParallelConfig

CONFIG = """
from cifar_flax.config import Config, EvalConfig, TrainConfig
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig
from cifar_flax.optim import OptimConfig

def get_config():
    return Config(
        data=DataConfig(name="digits", pipeline="resident"),
        augment=AugmentConfig(flip="random", crop_padding=2),
        model=CNNConfig(width=4, hidden=16),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, schedule="cosine", weight_decay=0.01),
        train=TrainConfig(batch_size=128, epochs=3, log_every=4),
        eval=EvalConfig(batch_size=100),
    )
"""
TIMEOUT = 240  # seconds


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def free_port(ports=(0,)):
    """The first of `ports` that nobody listens on; 0 is any."""
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return one.getsockname()[1]
    raise OSError("no port is free")


def start(folder, *arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), *arguments],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(folder, devices, *arguments):
    """The processes of one run, each with so many devices."""
    where = f"--config.parallel.coordinator=127.0.0.1:{free_port()}"
    common = (*arguments, where, f"--config.parallel.num_processes={len(devices)}")
    return [
        start(folder, *common, f"--config.parallel.process_id={number}", devices=count)
        for number, count in enumerate(devices)
    ]


def end(processes):
    """What each printed, and to which of the two streams; leaves none of them running."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        return [process.communicate(timeout=TIMEOUT) for process in processes]


def run(folder, devices, *arguments):
    processes = start_all(folder, devices, *arguments)
    printed = end(processes)
    assert [process.returncode for process in processes] == [0] * len(devices), printed
    return [out for out, _ in printed]


def reference(folder, devices, *arguments):
    """One process with so many devices."""
    process = start(folder, "--config", "config.py", "--workdir=one", *arguments, devices=devices)
    ((_, err),) = end([process])
    assert process.returncode == 0, err


def assert_same_run(folder, one, other):
    records = [read_metrics(folder / name) for name in (one, other)]
    assert len(records[0]) == len(records[1])
    for ours, theirs in zip(*records, strict=True):
        for name in NOT_TIMES:
            # Sums over processes are taken in another order than sums over the devices of one.
            expected = pytest.approx(theirs[name], rel=1e-5) if name in ("loss", "learning_rate") else theirs[name]
            assert ours[name] == expected, (name, ours)
    results = [json.loads((folder / name / "eval.json").read_text()) for name in (one, other)]
    assert results[0]["confusion_matrix"] == results[1]["confusion_matrix"]


def test_two_processes_train_as_one_does(folder):
    reference(folder, devices=2)
    first, second = run(folder, [1, 1], "--config", "config.py", "--workdir=two")
    assert_same_run(folder, "one", "two")
    host = re.escape(socket.gethostname())
    for number, out in enumerate((first, second)):
        lines = [line for line in out.splitlines() if "Gloo" not in line]
        assert lines[0] == f"[process {number} of 2, {socket.gethostname()}] 1 of 2 devices"
        assert len(lines) == 1 if number else re.match(rf"\[process 0 of 2, {host}\] digits: 1442 images", lines[1])
    assert first.count("test loss") == 3
    names = {path.name for path in (folder / "two").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "eval.json", "confusion_matrix.png", "tensorboard"}
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 1  # one process wrote

    # Evaluation by two processes; what a run was spread over is not asked of it.
    result = (folder / "two" / "eval.json").read_bytes()
    (folder / "two" / "eval.json").unlink()
    run(folder, [1, 1], "--mode=eval", "--workdir=two")
    assert (folder / "two" / "eval.json").read_bytes() == result
    alone = start(folder, "--mode=eval", "--workdir=two")
    ((_, err),) = end([alone])
    assert (alone.returncode, err) == (0, "")
    one, two = json.loads(result), json.loads((folder / "two" / "eval.json").read_text())
    assert one["confusion_matrix"] == two["confusion_matrix"]


def wait_for_checkpoint(workdir, processes):
    while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_go_on_where_four_were_killed(folder):
    """One of four is killed: the others end with an error, and soon. Two go on from what is saved."""
    arguments = ("--config", "config.py", "--config.train.epochs=12")
    reference(folder, 2, *arguments)
    processes = start_all(folder, [1] * 4, *arguments, "--workdir=four")
    wait_for_checkpoint(folder / "four", processes)
    processes[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = [process.wait(timeout=60) for process in processes]
    assert time.monotonic() - killed < 60
    assert codes[2] == -signal.SIGKILL
    assert all(code != 0 for code in codes)
    end(processes)
    first, _ = run(folder, [1, 1], *arguments, "--workdir=four")
    assert re.search(r"resuming at step \d+ of 136, on 2 x cpu", first)
    assert_same_run(folder, "one", "four")


@pytest.mark.slow
def test_four_processes_train_as_one_does(folder):
    reference(folder, devices=4)
    run(folder, [1] * 4, "--config", "config.py", "--workdir=four")
    assert_same_run(folder, "one", "four")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--config.parallel.backend=jit", "--config.data.pipeline=streaming"),
        ("--config.train.sync_batchnorm=False", "--config.data.drop_last=True", "--config.train.steps_per_call=11"),
    ],
    ids=["jit, streaming", "batch statistics per device, loops"],
)
def test_two_processes_of_two_devices_train_as_one_of_four_does(folder, arguments):
    """And get several views of those images alone of which the network is unsure."""
    every = ("--config.eval.tta=mirror", "--config.eval.tta_below=0.9", "--config.train.log_every=11")
    arguments = ("--config", "config.py", *every, *arguments)
    reference(folder, 4, *arguments)
    run(folder, [2, 2], *arguments, "--workdir=two")
    assert_same_run(folder, "one", "two")


@pytest.mark.slow
def test_a_process_that_hangs_counts_as_dead(folder):
    """Stopped, it closes no connection: only its silence tells, for as long as the config says."""
    arguments = ("--config", "config.py", "--workdir=two", "--config.train.epochs=100")
    processes = start_all(folder, [1, 1], *arguments, "--config.parallel.heartbeat_timeout_seconds=10")
    wait_for_checkpoint(folder / "two", processes)
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert processes[0].wait(timeout=60) != 0
    assert time.monotonic() - stopped < 40
    processes[1].kill()
    (_, err), _ = end(processes)
    assert "another task died" in err


def test_processes_that_disagree_say_so_and_end(folder):
    where = f"--config.parallel.coordinator=127.0.0.1:{free_port()}"
    common = ("--config", "config.py", "--workdir=run", where, "--config.parallel.num_processes=2")
    processes = [
        start(folder, *common, f"--config.parallel.process_id={number}", f"--config.optim.learning_rate=0.0{number}1")
        for number in range(2)
    ]
    printed = end(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for number, (_, err) in enumerate(printed):
        message = f"[process {number} of 2, {socket.gethostname()}] error: process 1 has another config than process 0"
        assert err.splitlines()[0].startswith(message)
    assert not (folder / "run").exists()


def test_pmap_is_for_one_process(folder):
    arguments = ("--config", "config.py", "--workdir=run", "--config.parallel.backend=pmap")
    processes = start_all(folder, [1, 1], *arguments)
    for _, err in end(processes):
        assert "parallel.backend='pmap': is for one process; there are 2; shard_map is for any number" in err
    assert [process.returncode for process in processes] == [2, 2]


def test_processes_with_fewer_devices_than_others_are_refused(folder):
    processes = start_all(folder, [2, 1], "--config", "config.py", "--workdir=run")
    for _, err in end(processes):
        assert "error: each process must have as many devices; they have 2, 1" in err
    assert [process.returncode for process in processes] == [1, 1]


def test_the_workdir_must_be_shared(folder):
    """Two hosts with folders of their own under the same name."""
    where, processes = f"--config.parallel.coordinator=127.0.0.1:{free_port()}", []
    for number in range(2):
        (folder / f"host{number}").mkdir()
        common = ("--config", str(folder / "config.py"), where, "--config.parallel.num_processes=2")
        processes.append(start(folder / f"host{number}", *common, f"--config.parallel.process_id={number}"))
    (_, first), (_, second) = end(processes)
    assert "must be one folder for all processes; process 0 has made another" in second
    assert "another process of the run has ended" in first
    assert all(process.returncode != 0 for process in processes)


@pytest.fixture
def initialized(monkeypatch):
    """What `jax.distributed.initialize` is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    monkeypatch.setattr(distributed, "installed", lambda name: False)
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
    distributed.start(ParallelConfig(heartbeat_timeout_seconds=20, **settings))
    assert len(initialized) == joins
    assert all(call["heartbeat_timeout_seconds"] == 20 for call in initialized)


def test_a_tpu_host_asks_its_slice(initialized, monkeypatch):
    monkeypatch.setattr(distributed, "installed", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    distributed.start(ParallelConfig())
    assert len(initialized) == 1


def test_joining_whom_nobody_names_is_refused(monkeypatch):
    def fail(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='on': nothing that JAX knows says who takes part"):
        distributed.start(ParallelConfig(distributed="on"))
    monkeypatch.setenv("PMI_SIZE", "4")  # alone, each of the four would write to the same folder
    with pytest.raises(ConfigError, match=r"^parallel\.distributed='auto': nothing that JAX knows .*; or off"):
        distributed.start(ParallelConfig())


def test_others_that_cannot_be_reached_are_one_message(monkeypatch):
    def fail(**settings):
        raise RuntimeError("DEADLINE_EXCEEDED:\n barrier")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"cannot be reached .*DEADLINE_EXCEEDED: barrier"):
        distributed.start(ParallelConfig(coordinator="a:1", num_processes=2, process_id=1))


def test_only_what_tells_of_lost_processes_is_taken_for_it(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert distributed.lost_peer(gloo) is None  # alone, there is nobody to lose
    monkeypatch.setattr(distributed, "_label", "[process 1 of 2, a] ")
    assert "another process of the run has ended" in str(distributed.lost_peer(gloo))
    assert distributed.lost_peer(ValueError("operands could not be broadcast")) is None


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_of_several_never_waits_after_an_error(monkeypatch, code):
    left = []
    monkeypatch.setattr(distributed, "_LAST_WORDS", 0)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: left.append("after the others"))
    with pytest.raises(SystemExit):
        distributed.run(lambda: code)
    assert left[0] == (code or "after the others")


def test_an_unforeseen_error_ends_one_of_several_at_once(monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(distributed, "_LAST_WORDS", 0)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Ended, match="1"):
        distributed.run(lambda: 1 // 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_agreement_is_of_values(monkeypatch):
    """Four processes, the second and the fourth of which have something else."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda own: np.stack([own, own + 1, own, own + 1])
    )
    with pytest.raises(UserError, match=r"^processes \[1, 3\] have another data than process 0"):
        distributed.require_agreement(data={"b": 1, "a": [1.5]})
