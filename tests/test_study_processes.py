"""Studies that are killed, and several processes that share one."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import processes
import pytest
from conftest import REPOSITORY, assert_same_run
from test_study import command, run

from cifar_flax.config import from_dict
from cifar_flax.data import sources
from cifar_flax.errors import UserError
from cifar_flax.files import lock_holder, locked
from cifar_flax.modes.compare import compare
from cifar_flax.study import locks


def start(folder, *options, cores=None):
    """Start a study in a process of its own, on `cores`."""
    prefix = [] if cores is None else ["taskset", "-c", cores]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "cifar_flax", *command(folder, *options)],
        cwd=REPOSITORY,
        env=processes.environment(PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + processes.TIMEOUT
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


OPTIONS = ["--seeds=2", "--config.train.epochs=6"]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_study_goes_on(tmp_path, number):
    """Kill a study in its second trial; the same command ends with the results of an uninterrupted one."""
    folder = tmp_path / "study"
    second = folder / "runs" / "tiny_seed1"
    process = start(folder, *OPTIONS)
    wait_for(lambda: list((second / "checkpoints").glob("[0-9]*[0-9]")), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=processes.TIMEOUT)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert "1 of 2 trials have ended; run the same command to resume" in output
    first = folder / "runs" / "tiny_seed0" / "trial.json"
    before = first.stat().st_mtime_ns
    compare([folder], None)  # in the middle
    assert json.loads((folder / "study.json").read_text())["settings"][0]["accuracy"]["count"] == 1
    process = start(folder, *OPTIONS)
    output, _ = process.communicate(timeout=processes.TIMEOUT)
    assert process.returncode == 0, output
    assert first.stat().st_mtime_ns == before
    assert "tiny_seed0: " not in output
    whole = tmp_path / "whole"
    run(whole, *OPTIONS)
    config = from_dict(json.loads((second / "config.json").read_text()))
    for seed in range(2):
        name = f"tiny_seed{seed}"
        assert_same_run(config, whole / "runs" / name, folder / "runs" / name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_share_the_trials(tmp_path):
    cores = sorted(os.sched_getaffinity(0))[:2]
    options = ["--seeds=6", "--config.train.epochs=2"]
    both = [start(tmp_path / "study", *options, cores=str(core)) for core in cores]
    outputs = [process.communicate(timeout=processes.TIMEOUT)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    ran = [[seed for seed in range(6) if f"tiny_seed{seed}: " in output] for output in outputs]
    assert sorted(ran[0] + ran[1]) == list(range(6))
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert found["settings"][0]["accuracy"]["count"] == 6


def test_a_trial_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys):
    """Wait for a trial whose lock is held; when its process dies, take the trial over."""
    folder = tmp_path / "study" / "runs" / "tiny_seed0"
    folder.mkdir(parents=True)
    slept = []
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"])

    def sleep(seconds):
        slept.append(seconds)
        other.kill()
        other.wait()

    wait_for(lambda: lock_holder(folder / ".lock") is not None, other)
    monkeypatch.setattr("cifar_flax.modes.study.time.sleep", sleep)
    found = run(tmp_path / "study", "--seeds=1", "--config.train.epochs=1")
    assert len(slept) >= 1
    assert found["settings"][0]["accuracy"]["count"] == 1


def test_cores_of_a_study_are_used_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load_both", lambda config: pytest.fail("the data was loaded first"))
    with locks.claimed(tmp_path / ".processes"):
        assert len(list((tmp_path / ".processes").iterdir())) == len(os.sched_getaffinity(0))
        with pytest.raises(UserError, match=r"already runs on core.*, in process \d+ on .* taskset -c CORES"):
            run(tmp_path, "--seeds=2")
        assert not (tmp_path / "runs").exists()


def test_a_process_without_enough_memory_is_refused(tmp_path, monkeypatch):
    """Another process of the study, on other cores, has needed more memory than is available."""
    folder, meminfo = tmp_path / ".processes", tmp_path / "meminfo"
    folder.mkdir()
    monkeypatch.setattr(locks, "_MEMORY", meminfo)
    with locked(folder / f"{locks._host()}.core9999", wait=False):
        meminfo.write_text("MemTotal:  9000000 kB\nMemAvailable:    1000 kB\n")
        with pytest.raises(
            UserError, match=r"needs \d+\.\d GB, but 0\.0 GB are available .*; start it on another machine"
        ):
            locks.require_free(folder)
        meminfo.write_text("MemAvailable: 900000000 kB\n")
        locks.require_free(folder)
    meminfo.write_text("MemAvailable: 1000 kB\n")
    locks.require_free(folder)  # no other process


@pytest.mark.parametrize(
    ("variables", "units"),
    [
        ({}, ["gpu0", "gpu1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, ["gpu3", "gpu5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a/b,GPU-c"}, ["gpuGPU-a-b", "gpuGPU-c"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "6,7"}, ["gpu6", "gpu7"]),
    ],
)
def test_accelerators_are_known_by_their_number_on_the_machine(monkeypatch, variables, units):
    devices = [SimpleNamespace(platform="gpu", id=i, local_hardware_id=i) for i in range(2)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert locks._units() == units
