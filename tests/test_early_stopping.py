"""Test `train.patience`: when a run stops early, and that an interrupted run stops at the same step."""

import dataclasses

import pytest
from conftest import assert_same_run, make_tiny_config, read_metrics
from stops import saved, stop_at, stopped

from cifar_flax.modes.train import train
from cifar_flax.training import loop
from cifar_flax.training.early_stopping import EarlyStopping
from cifar_flax.training.evaluator import Evaluator


@pytest.mark.parametrize(
    ("patience", "accuracies", "evaluations"),
    [
        (1, [0.1, 0.2, 0.3, 0.3], 4),
        (2, [0.5, 0.4, 0.6, 0.5, 0.55], 5),  # counts from the best one, not from the one before
        (2, [0.5, 0.5, 0.5], 3),
        (3, [0.0, 0.0, 0.0, 0.0], 4),
        (3, [0.5, 0.4, 0.4, 0.6, 0.4, 0.4], None),
        (0, [0.5] * 10, None),
    ],
)
def test_a_run_stops_after_patience_evaluations_without_improvement(patience, accuracies, evaluations):
    early_stopping, found = EarlyStopping(patience=patience), None
    for number, accuracy in enumerate(accuracies, start=1):
        assert found is None
        early_stopping = EarlyStopping(patience=patience, best=early_stopping.best, since=early_stopping.since)
        early_stopping.update(accuracy)
        found = number if early_stopping.is_due else None
    assert found == evaluations


@pytest.fixture
def config():
    """Return a config of three evaluations, after steps 10, 19 and 28; checkpoints are due after step 28 only."""
    config = make_tiny_config()
    config.data = dataclasses.replace(config.data, validation_fraction=0.2)
    config.checkpoint = dataclasses.replace(config.checkpoint, every_epochs=3)
    config.train = dataclasses.replace(config.train, patience=1)
    return config


def evaluations(workdir):
    return [line["step"] for line in read_metrics(workdir) if line["split"] == "validation"]


def test_accuracies_that_stay_equal_end_a_run(straight, config, tmp_path, capsys):
    """The learning rate is 0, and the statistics of BatchNorm are frozen."""
    config.optim = dataclasses.replace(config.optim, learning_rate=0.0)
    config.train = dataclasses.replace(config.train, init_from=str(straight[0]), freeze="backbone")
    train(config, tmp_path / "run")
    assert evaluations(tmp_path / "run") == [10, 19]  # patience + 1
    assert saved(tmp_path / "run") == [19]
    assert "stopping early at step 19 of 28" in capsys.readouterr().out
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.slow
def test_an_interrupted_run_stops_at_the_same_step(config, tmp_path, monkeypatch, capsys):
    """Stop a run in each evaluation and in the step after it. Only the first evaluation improves the accuracy."""
    update = EarlyStopping.update
    monkeypatch.setattr(EarlyStopping, "update", lambda self, accuracy: update(self, 0.5))
    train(config, tmp_path / "whole")
    moments = [
        (Evaluator, "__call__", lambda *arguments: True, 10),
        (loop.TrainingLoop, "_read", lambda run, step, values: True, 11),
        (Evaluator, "__call__", lambda *arguments: True, 19),
    ]
    for owner, name, when, last in moments:
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, when)
            stopped(config, tmp_path / "run")
        assert saved(tmp_path / "run") == [last]
    for state in ("stopping early at step 19 of 28", "is finished: 19 steps of 28, stopped early"):
        capsys.readouterr()
        train(config, tmp_path / "run")
        assert state in capsys.readouterr().out
        assert evaluations(tmp_path / "run") == [10, 19]
        assert_same_run(config, tmp_path / "whole", tmp_path / "run")

    # More patience continues the run, as if it had not stopped.
    for name, patience in (("run", 5), ("patient", 0)):
        config.train.patience = patience
        train(config, tmp_path / name)
    assert evaluations(tmp_path / "run") == [10, 19, 28]
    assert saved(tmp_path / "run") == saved(tmp_path / "patient") == [28]
    assert_same_run(config, tmp_path / "patient", tmp_path / "run")
