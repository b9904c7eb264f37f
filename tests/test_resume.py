"""Test resuming killed, damaged and changed runs: the results equal those of an uninterrupted run."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import (
    FILES,
    REPOSITORY,
    assert_same_run,
    final_state,
    make_tiny_config,
    needs_tensorflow,
    python_path,
    read_metrics,
)
from killed import MOMENTS
from processes import CONFIG, environment
from stops import saved, stop_at, stopped

from cifar_flax import files, workdir
from cifar_flax.arguments import parse
from cifar_flax.errors import UserError
from cifar_flax.modes import evaluate, train
from cifar_flax.training import loop

ARGUMENTS = ("--config", "config.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def test_a_run_killed_at_every_moment_equals_an_uninterrupted_run(folder, straight):
    command = [sys.executable, str(REPOSITORY / "tests" / "killed.py"), *ARGUMENTS, "--workdir=killed"]
    command += ["--config.checkpoint.keep=1", "--config.optim.warmup_epochs=0.5"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = dict(re.findall(r"^([\w. ]+): (-?\d+)$", done.stdout, re.MULTILINE))
    assert codes == dict.fromkeys(MOMENTS, "-9")
    assert "damaged" not in done.stdout
    assert {path.name for path in (folder / "killed").iterdir()} == FILES
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir()] == ["34"]
    assert_same_run(make_tiny_config(), straight[0], folder / "killed")


# Runs main.py; after the first checkpoint is saved, no file may exceed 48 kB.
LIMITED = """
import resource, sys
from cifar_flax import cli
from cifar_flax.checkpoints.manager import Checkpoints
remove_old = Checkpoints._remove_old
def limiting(*arguments):
    remove_old(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (48_000, 48_000))
Checkpoints._remove_old = limiting
sys.exit(cli.main())
"""


def test_a_full_disk_ends_the_run_and_keeps_its_checkpoints(folder, capsys):
    """A limit of the file size simulates a full disk."""
    arguments = (*ARGUMENTS, "--config.model.hidden=64", "--workdir=run")
    command = [sys.executable, "-c", LIMITED, *arguments]
    variables = environment(PYTHONPATH=python_path(REPOSITORY))
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    newest = saved(folder / "run")[-1]
    assert re.search(rf"^error: .*\bstep \d+\b.*\bsaved\b.*\bstep {newest}\b", line)
    command = parse(["--config", str(folder / "config.py"), *arguments[2:]])
    train.train(command.config, folder / "run")
    assert f"resuming from step {newest} of" in capsys.readouterr().out


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny_config, straight, tmp_path, capsys, monkeypatch):
    """It also reports that it has another number of cores than the run that made the checkpoint."""
    shutil.copytree(straight[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "34").rglob("*.ocdbt"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"checkpoints/34 .*\bread\b"):  # instead of evaluating another step
        evaluate.evaluate(tiny_config, tmp_path / "run")
    monkeypatch.setattr("cifar_flax.runtime.environment.usable_cores", lambda: 99)
    train.train(tiny_config, tmp_path / "run")
    out = capsys.readouterr().out
    assert re.search(r"step 34\b.*\bdamaged", out)
    assert re.search(r"^results may differ by rounding: hardware: \d+ cores .*, now 99 cores ", out, re.MULTILINE)
    assert "resuming from step 23 of 34" in out
    assert_same_run(tiny_config, straight[0], tmp_path / "run")


def test_a_run_does_not_restart_if_all_checkpoints_are_damaged(tiny_config, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for step in (23, 34):
        (tmp_path / "run" / "checkpoints" / str(step) / "record.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match=r"checkpoints: .*\bdamaged\b"):
            train.train(tiny_config, tmp_path / "run")


def test_harmless_changes_of_the_config_do_not_change_the_result(tiny_config, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 13)
        stopped(tiny_config, tmp_path / "run")
    tiny_config.train.log_every = 7
    tiny_config.checkpoint.keep = 5
    tiny_config.eval.batch_size = 50
    train.train(tiny_config, tmp_path / "run")
    states = [final_state(tiny_config, path) for path in (straight[0], tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert files.read_json(tmp_path / "run" / "config.json")["train"]["log_every"] == 7


@pytest.mark.parametrize(
    ("pipeline", "steps_per_call"), [("resident", 5), pytest.param("streaming", 1, marks=needs_tensorflow)]
)
def test_a_run_resumes_with_another_pipeline_and_longer_calls(
    tiny_config, straight, tmp_path, monkeypatch, pipeline, steps_per_call
):
    """Such as a run of an earlier release, in which the config had other values of these settings."""
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 13)
        stopped(tiny_config, tmp_path / "run")
    tiny_config.data.pipeline, tiny_config.train.steps_per_call = pipeline, steps_per_call
    train.train(tiny_config, tmp_path / "run")
    for expected, line in zip(read_metrics(straight[0]), read_metrics(tmp_path / "run"), strict=True):
        assert (line["step"], line["split"]) == (expected["step"], expected["split"])
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_a_longer_run_may_resume_with_a_constant_schedule(tiny_config, tmp_path):
    tiny_config.optim = dataclasses.replace(tiny_config.optim, schedule="constant")
    train.train(tiny_config, tmp_path / "straight")
    tiny_config.train.epochs = 2
    train.train(tiny_config, tmp_path / "longer")
    tiny_config.train.epochs = 3
    train.train(tiny_config, tmp_path / "longer")
    states = [final_state(tiny_config, tmp_path / name) for name in ("straight", "longer")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("release", ["0.1"])
def test_a_run_of_an_earlier_release_resumes(tmp_path, capsys, release):
    """Resume a run that was stopped in its second epoch; the losses are those of the release itself.

    Add a fixture for each release that changes the format of checkpoints or configs. Never change an existing fixture.
    """
    shutil.copytree(REPOSITORY / "tests" / "fixtures" / f"run-{release}", tmp_path / "run")
    command = parse(["--mode=eval", f"--workdir={tmp_path / 'run'}"])
    result = evaluate.evaluate(command.config, command.workdir)
    assert (result["step"], result["loss"]) == (29, pytest.approx(2.2060029365647007, rel=1e-4))
    train.train(command.config, tmp_path / "run")
    assert "resuming from step 29 of 46" in capsys.readouterr().out
    result = files.read_json(tmp_path / "run" / "eval.json")
    assert (result["step"], result["loss"]) == (46, pytest.approx(2.106122255996919, rel=1e-3))
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == [10, 20, 23, 23, 30, 40, 46, 46]


def test_another_network_is_refused_with_the_difference(tiny_config, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()  # the checkpoints contain the config too
    tiny_config.model.width = 8
    with pytest.raises(UserError, match=r"model\.width: 4 in .*, 8 in .*--workdir"):
        train.train(tiny_config, tmp_path / "run")


def test_a_lost_or_damaged_config_is_saved_again(tiny_config, straight, tmp_path, capsys):
    """The checkpoints contain the config too."""
    shutil.copytree(straight[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    for damage in (path.unlink, lambda: path.write_text("{")):
        damage()
        train.train(tiny_config, tmp_path / "run")
        assert path.read_bytes() == (straight[0] / "config.json").read_bytes()
        assert "is finished" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused(tiny_config, tmp_path, monkeypatch):
    with (
        workdir.opened(tmp_path / "run", tiny_config),
        pytest.raises(UserError, match=f"process {os.getpid()} on "),
    ):
        train.train(tiny_config, tmp_path / "run")
    stop_at(monkeypatch, loop.TrainingLoop, "_read", lambda run, step, values: True)
    stopped(tiny_config, tmp_path / "run")
