"""Training steps with activations in float16, whose loss is scaled in the backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_steps import batch_of, build, gradients_kept, loss_and_gradient

from cifar_flax.training import steps


@functools.cache
def cnn(dtype):
    return build("cnn", jax.devices()[:1], dtype=dtype)


def gradient_of_confident_predictions(dtype, **changes):
    """Return the gradient of the hidden layer for a batch whose images almost surely belong to their class 0."""
    task, state = cnn(dtype)
    task = dataclasses.replace(task, **changes)
    params = state.params | {"head": state.params["head"] | {"bias": 22 * jnp.eye(10)[0]}}
    batch = batch_of(0)
    batch = dataclasses.replace(batch, label=np.zeros_like(batch.label))
    with gradients_kept() as optimizer:
        state = state._replace(params=params, opt_state=optimizer.init(params))
        state, _ = jax.jit(functools.partial(steps.train_step, task))(state, batch)
    return np.asarray(state.opt_state.trace["hidden"]["kernel"])


def test_loss_and_gradient_are_close_to_those_of_float32():
    """The returned loss is not scaled."""
    loss, gradient = loss_and_gradient(*cnn("float16"), None)
    expected_loss, expected = loss_and_gradient(*cnn("float32"), None)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert loss != expected_loss
    assert np.linalg.norm(gradient - expected) < 0.02 * np.linalg.norm(expected)


def test_gradients_that_underflow_float16_survive_with_the_loss_scale():
    expected = gradient_of_confident_predictions("float32")
    found = gradient_of_confident_predictions("float16")
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert np.linalg.norm(expected) > 0
    assert not gradient_of_confident_predictions("float16", loss_scale=1.0).any()


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1), ("bfloat16", 1), ("auto", 1), ("float16", 2**11)])
def test_only_float16_scales_the_loss(dtype, scale):
    assert cnn(dtype)[0].loss_scale == scale


def test_a_loss_scale_of_1_adds_nothing_to_the_program():
    task, state = cnn("float32")

    def count(scale, operation):
        step = functools.partial(steps.train_step, dataclasses.replace(task, loss_scale=scale))
        return jax.jit(step).lower(state, batch_of(0)).as_text().count(f"stablehlo.{operation} ")

    gradients = len(jax.tree.leaves(state.params))
    assert count(2.0, "divide") - count(1.0, "divide") == gradients + 1  # and the loss
