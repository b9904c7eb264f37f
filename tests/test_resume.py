"""Runs that are stopped, killed or changed, and go on: what they end with is what they would have ended with."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import FILES, REPOSITORY, assert_same_run, final_state, make_tiny_config, read_metrics
from killed import MOMENTS
from processes import CONFIG, end, environment, run, start, start_all, wait_for_checkpoint
from processes import assert_same_run as assert_alike

from cifar_flax import cli, evaluate, files, lifecycle, metrics, records, train
from cifar_flax.averaging import AveragingConfig
from cifar_flax.errors import UserError
from cifar_flax.lifecycle import Stopped, signals_end_the_process

ARGUMENTS = ("--config", "config.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def test_a_run_killed_at_every_moment_ends_as_if_it_had_never_been(folder):
    straight = start(folder, *ARGUMENTS, "--workdir=straight")
    ((_, err),) = end([straight])
    assert straight.returncode == 0, err
    command = [sys.executable, str(REPOSITORY / "tests" / "killed.py"), *ARGUMENTS, "--workdir=killed"]
    command += ["--config.checkpoint.keep=1"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = dict(re.findall(r"^([\w. ]+): (-?\d+)$", done.stdout, re.MULTILINE))
    assert codes == dict.fromkeys(MOMENTS, "-9")
    assert "damaged" not in done.stdout
    assert {path.name for path in (folder / "killed").iterdir()} == FILES
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir()] == ["34"]
    shutil.rmtree(folder / "straight" / "checkpoints" / "23")
    assert_same_run(make_tiny_config(), folder / "straight", folder / "killed")


def stop_at(monkeypatch, owner, name, when):
    """Sends SIGTERM to this very process when `owner.name` is called with such arguments, the first time."""
    original, sent = getattr(owner, name), []

    def stopping(*arguments, **settings):
        if not sent and when(*arguments):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, stopping)


def stopped(config, workdir):
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught, signals_end_the_process():
        train.train(config, workdir)
    assert caught.value.exit_code == 143


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


STOPS = {
    "in a step": (train.Run, "_read", lambda run, step, values: step == 6, 8),  # two calls are in flight
    "in the step before a line": (train.Run, "_read", lambda run, step, values: step == 13, 15),
    "in the last step": (train.Run, "_read", lambda run, step, values: step == 34, 34),
    "in an evaluation": (metrics, "add", lambda total, sums: total is not None, 12),
    "in a save": (files, "write_sealed", lambda path, content: True, 12),
}


@pytest.mark.parametrize("moment", STOPS)
def test_a_signal_stops_within_the_step_and_nothing_is_lost(tiny_config, straight, tmp_path, monkeypatch, moment):
    owner, name, when, last = STOPS[moment]
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, when)
        stopped(tiny_config, tmp_path / "run")
    # The save in the background may have gone on for some steps.
    assert saved(tmp_path / "run")[-1] == last or (moment == "in a save" and saved(tmp_path / "run")[-1] < 23)
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


def test_a_run_stopped_again_and_again_is_the_same_run(tiny_config, straight, tmp_path, monkeypatch):
    """At every third step, and in every evaluation."""
    for step in range(3, 34, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, train.Run, "_read", lambda run, now, values, step=step: now >= step)
            stop_at(patch, metrics, "add", lambda total, sums: total is not None)
            stopped(tiny_config, tmp_path / "run")
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


def test_a_call_of_many_steps_is_the_last_one(tiny_config, tmp_path, monkeypatch):
    """Of the loops on the device, none is begun before the one before it has been read."""
    tiny_config.data.drop_last = True
    tiny_config.train = dataclasses.replace(tiny_config.train, steps_per_call=11, log_every=11)
    tiny_config.averaging = AveragingConfig(name="lookahead", decay=0.95, every=5)
    tiny_config.checkpoint.every_epochs = tiny_config.eval.every_epochs = 3
    train.train(tiny_config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_at(patch, train.Run, "_read", lambda run, step, values: step == 11)
        stopped(tiny_config, tmp_path / "run")
    assert saved(tmp_path / "run") == [11]
    train.train(tiny_config, tmp_path / "run")
    assert_same_run(tiny_config, tmp_path / "straight", tmp_path / "run")


def test_best_checkpoints_survive_a_stop_in_their_evaluation(tiny_config, tmp_path, monkeypatch):
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
        one, other = (records.read_record(folder, step) for folder in folders)
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
    """Only one of them is sent it."""
    arguments = (*ARGUMENTS, "--config.train.epochs=40", *loops)
    processes = start_all(folder, [1, 1], *arguments, "--workdir=two")
    wait_for_checkpoint(folder / "two", processes)
    processes[1].send_signal(signal.SIGTERM)
    printed = end(processes)
    assert [process.returncode for process in processes] == [143, 143], printed
    (step,) = re.findall(r"saved step (\d+) of", printed[0][0])
    assert saved(folder / "two")[-1] == int(step)
    for _, err in printed:
        assert "stopped by SIGTERM" in err
    if loops:
        reference(folder, 2, *arguments)
        first, _ = run(folder, [1, 1], *arguments, "--workdir=two")
        assert f"resuming at step {step} of " in first
        assert_alike(folder, "one", "two")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_is_that_of_the_signal(folder, number, code):
    process = start(folder, *ARGUMENTS, "--config.train.epochs=200", "--workdir=run")
    wait_for_checkpoint(folder / "run", [process])
    process.send_signal(number)
    ((out, err),) = end([process])
    assert process.returncode == code
    assert "Traceback" not in err
    assert re.search(rf"saved step {saved(folder / 'run')[-1]} of \d+; the same command goes on from there", out)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(folder):
    """No file may grow beyond 48 KB, after the first checkpoint is saved."""
    arguments = (*ARGUMENTS, "--config.model.hidden=64", "--config.train.epochs=6", "--workdir=run")
    process = start(folder, *arguments)
    wait_for_checkpoint(folder / "run", [process])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (48_000, 48_000))
    ((_, err),) = end([process])
    assert process.returncode == 1
    (line,) = err.splitlines()
    pattern = r"error: the checkpoint of step \d+ could not be saved in .*; the newest there is of step \d+"
    assert re.search(pattern, line)
    newest = saved(folder / "run")[-1]
    process = start(folder, *arguments)
    ((out, err),) = end([process])
    assert process.returncode == 0, err
    assert f"resuming at step {newest} of" in out


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_config, straight, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "34").rglob("*.ocdbt"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="cannot be read"):  # its figures would be those of another step
        evaluate.evaluate(tiny_config, tmp_path / "run")
    train.train(tiny_config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "the checkpoint of step 34 is damaged (" in out
    assert "resuming at step 23 of 34" in out
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


def test_a_run_is_not_begun_anew_where_all_is_damaged(tiny_config, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for step in (23, 34):
        (tmp_path / "run" / "checkpoints" / str(step) / "record.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match="none of its checkpoints is as it was saved"):
            train.train(tiny_config, tmp_path / "run")


def test_harmless_changes_pass_and_change_nothing(tiny_config, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, train.Run, "_read", lambda run, step, values: step == 13)
        stopped(tiny_config, tmp_path / "run")
    tiny_config.train.log_every = 7
    tiny_config.checkpoint.keep = 5
    tiny_config.eval.batch_size = 50
    tiny_config.on_nonfinite = "skip"
    train.train(tiny_config, tmp_path / "run")
    states = [final_state(tiny_config, path) for path in (straight[0], tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert files.read_json(tmp_path / "run" / "config.json")["train"]["log_every"] == 7


def test_a_longer_run_goes_on_under_a_constant_schedule(tiny_config, tmp_path):
    tiny_config.optim = dataclasses.replace(tiny_config.optim, schedule="constant")
    train.train(tiny_config, tmp_path / "straight")
    tiny_config.train.epochs = 2
    train.train(tiny_config, tmp_path / "longer")
    tiny_config.train.epochs = 3
    train.train(tiny_config, tmp_path / "longer")
    states = [final_state(tiny_config, tmp_path / name) for name in ("straight", "longer")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("release", ["0.1"])
def test_a_run_of_an_earlier_release_goes_on(tmp_path, capsys, release):
    """Stopped by SIGTERM in its second epoch; the figures are those that the release itself came to.

    Add a folder for each release that changes what a checkpoint or a config is; never change one that is there.
    """
    shutil.copytree(REPOSITORY / "tests" / "fixtures" / f"run-{release}", tmp_path / "run")
    command = cli.parse(["--mode=eval", f"--workdir={tmp_path / 'run'}"], ("train", "eval"))
    result = evaluate.evaluate(command.config, command.workdir)
    assert (result["step"], result["loss"]) == (29, pytest.approx(2.2060029365647007, rel=1e-4))
    train.train(command.config, tmp_path / "run")
    assert "resuming at step 29 of 46" in capsys.readouterr().out
    result = files.read_json(tmp_path / "run" / "eval.json")
    assert (result["step"], result["loss"]) == (46, pytest.approx(2.106122255996919, rel=1e-3))
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == [10, 20, 23, 23, 30, 40, 46, 46]


def test_another_network_is_refused_with_the_difference(tiny_config, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()  # the checkpoints tell it too
    tiny_config.model.width = 8
    with pytest.raises(UserError, match=r"model\.width: 4 in the checkpoint, 8 in the config.*choose another"):
        train.train(tiny_config, tmp_path / "run")


def test_the_saved_config_is_that_of_the_last_start(tiny_config, straight, tmp_path, capsys):
    """Also where it was lost, as the checkpoints tell it too."""
    shutil.copytree(straight[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    for damage in (path.unlink, lambda: path.write_text("{")):
        damage()
        train.train(tiny_config, tmp_path / "run")
        assert path.read_bytes() == (straight[0] / "config.json").read_bytes()
        assert "is finished: 34 steps of 34" in capsys.readouterr().out


def test_the_loop_never_compiles(tiny_config, tmp_path, monkeypatch):
    """A signal would have to wait for it."""
    compiled = []

    def note(name, *arguments, **settings):
        if "backend_compile" in name:
            compiled.append(lifecycle._deferring)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train.train(tiny_config, tmp_path / "run")
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled.count(False) > 3
    assert compiled.count(True) == 0


def test_nobody_has_to_read_what_a_run_says(folder):
    """The terminal is gone, or the disk is full on which the log lies."""
    with open("/dev/full", "w") as nobody:
        command = [
            sys.executable,
            str(REPOSITORY / "main.py"),
            *ARGUMENTS,
            "--config.train.epochs=200",
            "--workdir=run",
        ]
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=nobody, stderr=nobody)
        wait_for_checkpoint(folder / "run", [])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert saved(folder / "run")


def test_a_second_run_in_the_same_folder_is_refused(folder, tiny_config, monkeypatch):
    process = start(folder, *ARGUMENTS, "--config.train.epochs=200", "--workdir=run")
    wait_for_checkpoint(folder / "run", [process])
    with pytest.raises(UserError, match=f"process {process.pid} on .* trains there; wait for its end or choose"):
        train.train(tiny_config, folder / "run")
    process.kill()
    end([process])
    tiny_config.train.epochs, tiny_config.optim.warmup_epochs = 200, 0
    stop_at(monkeypatch, train.Run, "_read", lambda run, step, values: True)
    stopped(tiny_config, folder / "run")  # a dead one holds nothing
