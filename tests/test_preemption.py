"""Test runs that a signal stops: after which step, with which exit code, and that resuming loses nothing."""

import dataclasses
import re
import signal
import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY, assert_same_run
from processes import CONFIG, end, environment, reference, run, start, start_all, wait_for_checkpoint
from processes import assert_same_run as assert_alike
from stops import saved, stop_at, stopped

from cifar_flax import files
from cifar_flax.checkpoints import metadata
from cifar_flax.modes import train
from cifar_flax.runtime import signals
from cifar_flax.training import loop, metrics
from cifar_flax.training.averaging import AveragingConfig

ARGUMENTS = ("--config", "config.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


STOPS = {
    "in a step": (loop.TrainingLoop, "_read", lambda run, step, values: step == 6, 6),
    "in the step before a log line": (loop.TrainingLoop, "_read", lambda run, step, values: step == 15, 15),
    "in the last step": (loop.TrainingLoop, "_read", lambda run, step, values: step == 34, 34),
    "in an evaluation": (metrics, "add", lambda total, sums: total is not None, 12),
    "in a save": (files, "write_sealed", lambda path, content: True, 12),
}


@pytest.mark.parametrize("moment", STOPS)
def test_a_signal_stops_within_the_step_and_nothing_is_lost(tiny_config, straight, tmp_path, monkeypatch, moment):
    owner, name, when, last = STOPS[moment]
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, when)
        stopped(tiny_config, tmp_path / "run")
    steps = saved(tmp_path / "run")
    # The loop continues while a checkpoint is saved in the background.
    assert steps[-1] == last or (moment == "in a save" and last < steps[-1] <= 34)
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, straight[0], tmp_path / "run")
    assert saved(tmp_path / "run") == saved(straight[0])


def test_steps_already_dispatched_to_an_accelerator_finish(tiny_config, straight, tmp_path, monkeypatch):
    """When a step is read on an accelerator, two more are already dispatched; they finish in milliseconds."""
    assert [loop.read_lag(*run) for run in (("gpu", 1), ("tpu", 1), ("gpu", 2), ("cpu", 1))] == [2, 2, 0, 0]
    monkeypatch.setattr(loop, "read_lag", lambda platform, steps_per_call: loop.READ_LAG)
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 6)
        stopped(tiny_config, tmp_path / "run")
    assert saved(tmp_path / "run") == [6 + loop.READ_LAG]
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_with_the_same_state(tiny_config, straight, tmp_path, monkeypatch):
    """Stop the run at every fifth step and in every evaluation."""
    for step in range(5, 34, 5):
        with monkeypatch.context() as patch:
            stop_at(patch, loop.TrainingLoop, "_read", lambda run, now, values, step=step: now >= step)
            stop_at(patch, metrics, "add", lambda total, sums: total is not None)
            stopped(tiny_config, tmp_path / "run")
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


@pytest.mark.parametrize(
    ("steps_per_call", "log_every", "last"),
    [(11, 11, 11), pytest.param(5, 8, 13, marks=pytest.mark.slow)],
    ids=["equal calls", "different calls"],
)
def test_a_signal_in_a_call_of_many_steps_stops_after_that_call(
    tiny_config, tmp_path, monkeypatch, steps_per_call, log_every, last
):
    """No loop on the device starts before the previous one has been read. Resuming makes the calls that are left."""
    tiny_config.data.drop_last = True
    tiny_config.train = dataclasses.replace(tiny_config.train, steps_per_call=steps_per_call, log_every=log_every)
    tiny_config.averaging = AveragingConfig(name="lookahead", decay=0.95, every=5)
    tiny_config.checkpoint.every_epochs = tiny_config.eval.every_epochs = 3
    train.train(tiny_config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step >= 11)
        stopped(tiny_config, tmp_path / "run")
    assert saved(tmp_path / "run") == [last]
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_best_checkpoints_survive_a_stop_during_their_evaluation(tiny_config, tmp_path, monkeypatch):
    tiny_config.data.validation_fraction = 0.2
    tiny_config.checkpoint.keep_best = 1
    tiny_config.eval.checkpoint = "best"
    train.train(tiny_config, tmp_path / "straight")
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_at(patch, metrics, "add", lambda total, sums: total is not None)
            stopped(tiny_config, tmp_path / "run")
    assert saved(tmp_path / "run") == [10, 19]
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, tmp_path / "straight", tmp_path / "run")
    folders = [tmp_path / name / "checkpoints" for name in ("straight", "run")]
    assert saved(tmp_path / "straight") == saved(tmp_path / "run")
    for step in saved(tmp_path / "run"):
        one, other = (metadata.read_metadata(folder, step) for folder in folders)
        assert one["accuracy"] == other["accuracy"]


@pytest.mark.parametrize(
    "loops",
    [
        (),
        pytest.param(
            ("--config.data.drop_last=True", "--config.train.steps_per_call=11", "--config.train.log_every=11"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["steps", "loops"],
)
def test_one_signal_stops_all_processes_at_the_same_step(folder, loops):
    """Send SIGTERM to only one of two processes."""
    arguments = (*ARGUMENTS, "--config.train.epochs=20", *loops)
    processes = start_all(folder, [1, 1], *arguments, "--workdir=two")
    wait_for_checkpoint(folder / "two", processes)
    processes[1].send_signal(signal.SIGTERM)
    printed = end(processes)
    assert [process.returncode for process in processes] == [143, 143], printed
    (step,) = re.findall(r"saved step (\d+) of", printed[0][0])
    assert saved(folder / "two")[-1] == int(step)
    for _, err in printed:
        assert "SIGTERM" in err
    if loops:
        reference(folder, 2, *arguments)
        first, _ = run(folder, [1, 1], *arguments, "--workdir=two")
        assert f"resuming from step {step} of " in first
        assert_alike(folder, "one", "two")


def test_sigint_ends_the_run_with_its_exit_code(folder):
    """Other tests check the exit code of SIGTERM."""
    process = start(folder, *ARGUMENTS, "--config.train.epochs=200", "--workdir=run")
    wait_for_checkpoint(folder / "run", [process])
    process.send_signal(signal.SIGINT)
    ((out, err),) = end([process])
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(rf"saved step {saved(folder / 'run')[-1]} of \d+", out)


def test_the_loop_never_compiles(tiny_config, tmp_path, monkeypatch):
    """Compilation in the loop would delay the response to a signal."""
    compiled = []

    def note(name, *arguments, **settings):
        if "backend_compile" in name:
            compiled.append(signals._deferring)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train.train(tiny_config, tmp_path / "run")
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled.count(False) > 3
    assert compiled.count(True) == 0


def test_a_run_continues_if_its_output_cannot_be_written(folder):
    """Writes to stdout and stderr fail if the terminal is closed, which sends SIGHUP, or if the log's disk is full."""
    with open("/dev/full", "w") as full:
        command = [
            sys.executable,
            str(REPOSITORY / "main.py"),
            *ARGUMENTS,
            "--config.train.epochs=200",
            "--workdir=run",
        ]
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=full, stderr=full)
        wait_for_checkpoint(folder / "run", [])
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 129
    assert saved(folder / "run")
