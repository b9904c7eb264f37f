"""Test the training loop: calls of one step and of many steps, reading metrics late, donation, transfers."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import NOT_TIMES, final_state, make_tiny_config, needs_tensorflow, read_metrics

from cifar_flax.data.batches import GROUP, Batch, Indices
from cifar_flax.errors import UserError
from cifar_flax.modes.train import train
from cifar_flax.telemetry.progress import Progress
from cifar_flax.training.loop import READ_LAG, run_calls
from cifar_flax.training.steps import Call
from cifar_flax.training.trainer import Trainer


def test_metrics_are_read_late():
    """When metrics of a step are read, later steps are already dispatched: the device does not wait for the host."""
    events = []

    def train_step(state, batch):
        events.append(("dispatch", int(batch.index[0])))
        return state, {}

    def batch_of(step):
        vector = np.full(1, step, np.int32)
        return Batch(np.zeros((1, 2, 2, 3), np.uint8), vector, vector, vector, np.ones(1, bool))

    state = Trainer(make_tiny_config()).initial_state
    batches = iter([batch_of(step) for step in range(11, 17)])
    run_calls(train_step, state, batches, range(11, 17), lambda step, values: events.append(("read", step)))
    assert [step for kind, step in events if kind == "read"] == list(range(11, 17))
    assert READ_LAG >= 1
    for step in range(11, 17):
        assert events.index(("read", step)) > events.index(("dispatch", min(step + READ_LAG, 16)))
    # Before the first read, perhaps no step has run yet, and the loop takes READ_LAG + 1 batches: fewer than GROUP.
    assert GROUP > events.index(("read", 11)) == READ_LAG + 1


def test_the_training_call_donates_its_state(tiny_config):
    trainer = Trainer(tiny_config)
    state, call = trainer.initial_state, trainer.compile(trainer.initial_state)
    call(state, next(trainer.inputs(0, 0)))
    assert state.params["hidden"]["kernel"].is_deleted()


def test_the_loop_disallows_implicit_transfers(tiny_config):
    trainer = Trainer(tiny_config)
    position = np.zeros((1, 128), np.int32)  # not on the device
    call = trainer.compile(trainer.initial_state)
    inputs = iter([Call(0, 1, Indices(position, position, position == 0))])
    with pytest.raises(Exception, match="host-to-device"):
        run_calls(call, trainer.initial_state, inputs, range(1, 2), lambda step, values: None)


@needs_tensorflow
def test_one_call_of_many_steps_equals_many_calls_of_one_step(tiny_config, tmp_path):
    """Train 33 steps by `tf.data`, by calls of one step, of seven (the last one of five), and by one of 33 steps."""
    tiny_config.data.drop_last = True
    tiny_config.train = dataclasses.replace(tiny_config.train, log_every=33)
    tiny_config.eval.every_epochs = tiny_config.checkpoint.every_epochs = 3
    plain = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, pipeline="streaming"))
    train(plain, tmp_path / "plain")
    for steps_per_call in (1, 7, 33):
        folder = tmp_path / f"calls of {steps_per_call}"
        tiny_config.train.steps_per_call = steps_per_call
        train(tiny_config, folder)
        states = [final_state(config, path) for config, path in ((plain, tmp_path / "plain"), (tiny_config, folder))]
        assert [int(state.step) for state in states] == [33, 33]
        # Adam turns the rounding error of a gradient near zero into a full step.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *(state.params for state in states))
        for plain_line, line in zip(read_metrics(tmp_path / "plain"), read_metrics(folder), strict=True):
            assert [plain_line[name] for name in NOT_TIMES[:3]] == [line[name] for name in NOT_TIMES[:3]]
            assert line["loss"] == pytest.approx(plain_line["loss"], rel=1e-3)
            assert line["learning_rate"] == pytest.approx(plain_line["learning_rate"])


@pytest.mark.parametrize("steps_per_call", [11, 9])
def test_divergence_inside_a_call_reports_the_step(tiny_config, tmp_path, steps_per_call):
    tiny_config.train = dataclasses.replace(tiny_config.train, steps_per_call=steps_per_call, log_every=11)
    tiny_config.optim.learning_rate = 1e30
    with pytest.raises(UserError, match=r"step [2-9]\b.*\b(nan|inf)\b"):
        train(tiny_config, tmp_path / "run")


def test_only_the_steps_of_a_call_count(tiny_config, straight, tmp_path, monkeypatch, capsys):
    """Calls of at most three steps end at each fourth step and at the end of an epoch: some have one or two steps."""
    tiny_config.train.steps_per_call = 3
    advanced, advance = [], Progress.advance
    monkeypatch.setattr(Progress, "advance", lambda self, steps: advanced.append(steps) or advance(self, steps))
    tiny_config.on_nonfinite = "skip"  # counts steps that are not finite, which padding looks like
    train(tiny_config, tmp_path / "run")
    assert advanced == [3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 2]  # evaluations after 12, 23 and 34 steps
    for expected, line in zip(read_metrics(straight[0]), read_metrics(tmp_path / "run"), strict=True):
        assert [expected[name] for name in NOT_TIMES[:3]] == [line[name] for name in NOT_TIMES[:3]]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert line["learning_rate"] == pytest.approx(expected["learning_rate"])
        assert line.get("skipped_steps", 0) == 0
