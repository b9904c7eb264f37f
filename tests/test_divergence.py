"""Steps whose loss or gradient is not finite: the run stops, or leaves them out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import final_state, read_metrics

from cifar_flax.errors import UserError
from cifar_flax.models import CNNConfig
from cifar_flax.modes.train import train
from cifar_flax.training import steps
from cifar_flax.training.guard import NonFiniteGuard
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.trainer import Trainer


@pytest.fixture
def poison(monkeypatch):
    """Makes the images of some examples NaN where the step sees them, and with them whatever it computes."""

    def of(bad):
        augment = steps.augment

        def poisoned(image, keys, config, *, epoch, first_keys):
            clean = augment(image, keys, config, epoch=epoch, first_keys=first_keys).astype(jnp.float32)
            return jnp.where(bad(epoch)[:, None, None, None], jnp.nan, clean)

        monkeypatch.setattr(steps, "augment", poisoned)
        monkeypatch.setattr(steps, "normalize", lambda image, mean, std: image.astype(jnp.float32) / 255)

    return of


def test_the_run_stops_at_the_step_and_saves_nothing_of_it(tiny_config, tmp_path, poison):
    """Step 12 is the first that shows an image of the second epoch."""
    poison(lambda epoch: epoch == 1)
    pattern = (
        r"^the loss of step 12 is nan at a learning rate of 0\.0\d+, 2\.\d+ before; nothing of it is saved; "
        r"on_nonfinite=skip leaves such steps out; a lower optim\.learning_rate"
    )
    with pytest.raises(UserError, match=pattern):
        train(tiny_config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [4, 8]


def test_a_gradient_alone_stops_it_too(tiny_config, tmp_path, monkeypatch):
    @jax.custom_vjp
    def nan_backwards(x):
        return x

    nan_backwards.defvjp(lambda x: (x, None), lambda _, grad: (jnp.full_like(grad, jnp.nan),))
    loss = steps.optax.softmax_cross_entropy
    monkeypatch.setattr(
        steps.optax, "softmax_cross_entropy", lambda logits, target: loss(nan_backwards(logits), target)
    )
    message = r"^of step 1, whose loss is \d\.\d+, the gradient is not finite at a learning rate of"
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "run")


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0, "accumulate_steps": 2}], ids=str)
def test_steps_left_out_change_nothing(tiny_config, tmp_path, poison, settings):
    """All that the second epoch shows is poison: the state stays what the first one made of it."""
    poison(lambda epoch: epoch == 1)
    tiny_config.optim = OptimConfig(name="adamw", learning_rate=1e-2, **settings)
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 100
    tiny_config.checkpoint.keep, tiny_config.data.drop_last = 5, True
    train(tiny_config, tmp_path / "run")
    trainer = Trainer(tiny_config)
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert {line["step"]: line["skipped_steps"] for line in lines} == {
        4: 0,
        8: 0,
        11: 0,
        12: 1,
        16: 4,
        20: 4,
        22: 2,
        24: 0,
        28: 0,
        32: 0,
        33: 0,
    }
    assert [line["loss"] is None for line in lines] == [line["skipped_steps"] > 0 for line in lines]
    json.dumps(lines, allow_nan=False)
    from cifar_flax.checkpoints.manager import Checkpoints

    with Checkpoints(tmp_path / "run" / "checkpoints", tiny_config.checkpoint, read_only=True) as checkpoints:
        before, after = (checkpoints.restore(step, trainer.initial_state) for step in (11, 22))
    assert (int(before.step), int(after.step)) == (11, 22)
    jax.tree.map(np.testing.assert_array_equal, steady(before), steady(after))  # statistics of BatchNorm too
    last = final_state(tiny_config, tmp_path / "run")
    assert np.abs(np.asarray(last.params["conv"]["kernel"]) - np.asarray(after.params["conv"]["kernel"])).max() > 0
    if not settings:  # the schedule goes on with the steps: the rate that is applied is the one that is logged
        is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
        leaves = jax.tree.leaves(last.opt_state, is_leaf=is_schedule)
        assert {int(leaf.count) for leaf in leaves if is_schedule(leaf)} == {33}


def steady(state):
    """Without the counts that go on with the steps: that of the run and those of the schedules."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    opt_state = jax.tree.map(lambda x: 0 if is_schedule(x) else x, state.opt_state, is_leaf=is_schedule)
    return state._replace(step=0, opt_state=opt_state)


def test_too_many_in_a_row_stop_it_all_the_same(tiny_config, tmp_path, poison):
    poison(lambda epoch: epoch == 1)
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 5
    tiny_config.data.drop_last = True
    message = (
        r"^the loss of step 16 is nan at .*; it is the last of 5 skipped in a row; nothing of it is saved; a lower"
    )
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["11"]


def test_a_stopped_run_may_go_on_by_leaving_steps_out(tiny_config, tmp_path, poison):
    poison(lambda epoch: epoch == 1)
    tiny_config.data.drop_last = True
    with pytest.raises(UserError, match="the loss of step 12 is nan"):
        train(tiny_config, tmp_path / "run")
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 11 + 1
    train(tiny_config, tmp_path / "run")
    assert sum(line.get("skipped_steps", 0) for line in read_metrics(tmp_path / "run")) == 11


def test_an_update_that_overflows_is_left_out(tiny_config, tmp_path):
    """Loss and gradient are finite: only what the update makes of the weights is not."""
    tiny_config.optim = OptimConfig(name="sgd", learning_rate=3e38, momentum=0.99)
    tiny_config.model = CNNConfig(width=4, hidden=16)
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 3
    with pytest.raises(
        UserError, match=r"^of step 3, .* the gradient, or the state that it leads to, is .* the last of 3"
    ):
        train(tiny_config, tmp_path / "run")


def test_the_count_in_a_row_goes_on_where_a_run_was_stopped():
    def values(*finite):
        return {
            "loss": np.where(finite, np.float32(1), np.float32(np.nan)),
            "finite": np.array(finite),
            "learning_rate": np.full(len(finite), np.float32(0.1)),
        }

    first = NonFiniteGuard(4)
    first.check(1, values(True, False, False))
    assert (first.loss, first.skipped) == (1.0, 2)
    second = NonFiniteGuard(4, first.loss, first.skipped)
    second.check(4, values(False))
    with pytest.raises(UserError, match="the loss of step 5 is nan"):
        second.check(5, values(False))
    third = NonFiniteGuard(4, first.loss, first.skipped)
    third.check(4, values(True, False, False, False))  # one that is finite begins the count anew
    assert third.skipped == 3
