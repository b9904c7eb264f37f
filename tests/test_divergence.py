"""Steps with a non-finite loss or gradient: the run stops or skips them."""

import json
import re

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

# Rest of a message about a step with a finite loss, but a non-finite gradient or state.
FINITE_LOSS = r"(?=.*\b\d\.\d)(?=.*\bgradient\b)(?!.*\bnan\b)"


@pytest.fixture
def poison(monkeypatch):
    """Return a function that makes the images of some examples NaN in the training step."""

    def of(bad):
        augment = steps.augment

        def poisoned(examples, context, mean, std):
            image, target = augment(examples, context, mean, std)
            return jnp.where(bad(context.epoch)[:, None, None, None], jnp.nan, image), target

        monkeypatch.setattr(steps, "augment", poisoned)

    return of


def test_the_run_stops_at_the_step_and_does_not_save_it(tiny_config, tmp_path, poison):
    """Step 12 is the first with an image of the second epoch."""
    poison(lambda epoch: epoch == 1)
    with pytest.raises(UserError, match=r"step 12\b.*\bnan\b") as caught:
        train(tiny_config, tmp_path / "run")
    # The learning rate, the last finite loss, and two suggestions.
    for pattern in (r"\b0\.0\d", r"\b2\.\d", "on_nonfinite=skip", r"optim\.learning_rate"):
        assert re.search(pattern, str(caught.value)), pattern
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [4, 8]


def test_a_nan_gradient_stops_the_run_too(tiny_config, tmp_path, monkeypatch):
    @jax.custom_vjp
    def nan_backwards(x):
        return x

    nan_backwards.defvjp(lambda x: (x, None), lambda _, grad: (jnp.full_like(grad, jnp.nan),))
    loss = steps.optax.softmax_cross_entropy
    monkeypatch.setattr(
        steps.optax, "softmax_cross_entropy", lambda logits, target: loss(nan_backwards(logits), target)
    )
    with pytest.raises(UserError, match=rf"step 1\b{FINITE_LOSS}"):
        train(tiny_config, tmp_path / "run")


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0, "accumulate_steps": 2}], ids=str)
def test_skipped_steps_do_not_change_the_state(tiny_config, tmp_path, poison, settings):
    """All images of the second epoch are NaN: the state after it equals the state before it."""
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

    with Checkpoints(tmp_path / "run" / "checkpoints", tiny_config.checkpoint) as checkpoints:
        before, after = (checkpoints.restore(step, trainer.initial_state) for step in (11, 22))
    assert (int(before.step), int(after.step)) == (11, 22)
    jax.tree.map(np.testing.assert_array_equal, without_counts(before), without_counts(after))
    last = final_state(tiny_config, tmp_path / "run")
    assert np.abs(np.asarray(last.params["conv"]["kernel"]) - np.asarray(after.params["conv"]["kernel"])).max() > 0
    if not settings:  # the schedule counts skipped steps too, so the applied learning rate is the logged one
        is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
        leaves = jax.tree.leaves(last.opt_state, is_leaf=is_schedule)
        assert {int(leaf.count) for leaf in leaves if is_schedule(leaf)} == {33}


def without_counts(state):
    """Return `state` without the step counts of the run and the schedules, which skipped steps advance too."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    opt_state = jax.tree.map(lambda x: 0 if is_schedule(x) else x, state.opt_state, is_leaf=is_schedule)
    return state._replace(step=0, opt_state=opt_state)


def test_too_many_skipped_steps_in_a_row_stop_the_run(tiny_config, tmp_path, poison):
    poison(lambda epoch: epoch == 1)
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 5
    tiny_config.data.drop_last = True
    with pytest.raises(UserError, match=r"step 16\b.*\bnan\b.*\b5\b") as caught:
        train(tiny_config, tmp_path / "run")
    assert "on_nonfinite=skip" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["11"]


def test_a_stopped_run_can_resume_with_skipping(tiny_config, tmp_path, poison):
    poison(lambda epoch: epoch == 1)
    tiny_config.data.drop_last = True
    with pytest.raises(UserError, match=r"step 12\b.*\bnan\b"):
        train(tiny_config, tmp_path / "run")
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 11 + 1
    train(tiny_config, tmp_path / "run")
    assert sum(line.get("skipped_steps", 0) for line in read_metrics(tmp_path / "run")) == 11


def test_an_update_that_overflows_is_skipped(tiny_config, tmp_path):
    """Loss and gradient are finite, but the updated weights are not."""
    tiny_config.optim = OptimConfig(name="sgd", learning_rate=3e38, momentum=0.99)
    tiny_config.model = CNNConfig(width=4, hidden=16)
    tiny_config.on_nonfinite, tiny_config.max_skipped = "skip", 3
    with pytest.raises(UserError, match=rf"step 3\b{FINITE_LOSS}(?=.*\bstate\b)"):
        train(tiny_config, tmp_path / "run")


def test_the_count_of_skipped_steps_continues_after_a_restart():
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
    with pytest.raises(UserError, match=r"step 5\b.*\bnan\b"):
        second.check(5, values(False))
    third = NonFiniteGuard(4, first.loss, first.skipped)
    third.check(4, values(True, False, False, False))  # a finite step resets the count
    assert third.skipped == 3
