"""Runs that differ only in seed and schedule share their compiled programs."""

import functools

import pytest
from conftest import make_tiny_config

from cifar_flax.config import program_settings
from cifar_flax.runtime.devices import Layout
from cifar_flax.training.trainer import Trainer

# Field -> another value of it. Programs take the first ones as arguments; the others change them.
SCHEDULE = {
    "optim.learning_rate": 0.5, "optim.schedule": "linear", "optim.final_share": 0.5, "optim.final_epochs": 1.0,
    "optim.warmup_epochs": 1.0, "optim.warmup_start": 0.5, "optim.dense.learning_rate": 0.1,
    "optim.biases.learning_rate": 0.1, "seed": 7,
}  # fmt: skip
COMPILED = {"optim.weight_decay": 0.5, "optim.b1": 0.5, "train.label_smoothing": 0.1, "train.epochs": 4.0}


class Lowered(Exception):
    """Raised in place of the compilation."""


def changed(values):
    """Return the tiny config with other values of fields."""
    config = make_tiny_config()
    for path, value in values.items():
        *groups, name = path.split(".")
        setattr(functools.reduce(getattr, groups, config), name, value)
    config.validate()
    return config


def program(config, monkeypatch):
    """Return the text of the training program of `config`, before XLA's optimizations."""
    lowered = []

    def lower(self, step, state, inputs, *shared, batch_axis=0, donate=False):
        function = self.parallelize(step, shared=len(shared), batch_axis=batch_axis)
        lowered.append(function.lower(state, inputs, *shared))
        raise Lowered

    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "compile", lower)
        with pytest.raises(Lowered):
            trainer.compile(trainer.initial_state)
    return lowered[0].as_text()


def test_schedules_and_seeds_share_a_program(monkeypatch):
    base, other = make_tiny_config(), changed(SCHEDULE)
    assert program_settings(other) == program_settings(base)
    assert program(other, monkeypatch) == program(base, monkeypatch)
    for path, value in COMPILED.items():
        assert program_settings(changed({path: value})) != program_settings(base)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED)
def test_other_settings_change_the_program(path, monkeypatch):
    """If one of these tests fails, `config._ARGUMENTS` may list one more field."""
    assert program(changed({path: COMPILED[path]}), monkeypatch) != program(make_tiny_config(), monkeypatch)
