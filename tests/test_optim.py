import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_flax.errors import ConfigError
from cifar_flax.optim import OptimConfig, make_optimizer, make_schedule

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}


def gradient(seed, scale=1.0):
    return jax.tree.map(lambda x: scale * jax.random.normal(jax.random.key(seed), x.shape), PARAMS)


def run(config, gradients, learning_rate=0.1):
    optimizer = make_optimizer(config, optax.constant_schedule(learning_rate))
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 0.1), ("linear", 0.1 * (1 - 45 / 90)), ("cosine", 0.05)])
def test_schedules(schedule, middle):
    config = OptimConfig(learning_rate=0.1, schedule=schedule, warmup_epochs=1)
    rate = make_schedule(config, total_steps=100, steps_per_epoch=10)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.05, 0.1])
    assert float(rate(55)) == pytest.approx(middle)
    assert float(rate(100)) == pytest.approx(0.1 if schedule == "constant" else 0, abs=1e-8)


def test_warmup_must_be_shorter_than_the_run():
    make_schedule(OptimConfig(warmup_epochs=9.9), total_steps=100, steps_per_epoch=10)
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=10: must be shorter than the run of 10 epochs"):
        make_schedule(OptimConfig(warmup_epochs=10), total_steps=100, steps_per_epoch=10)


def test_weight_decay_is_for_matrices():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for name in ("adamw", "sgd"):
        after = run(OptimConfig(name=name, weight_decay=0.5), [zero])
        np.testing.assert_allclose(after["kernel"], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
        np.testing.assert_array_equal(after["bias"], PARAMS["bias"])


def test_sgd_with_momentum_is_nesterovs():
    grads = [gradient(seed) for seed in (1, 2)]
    after = run(OptimConfig(name="sgd", momentum=0.9), grads)
    first, second = grads
    velocity = jax.tree.map(lambda a, b: 0.9 * a + b, first, second)
    steps = jax.tree.map(lambda a, b, v: (a + 0.9 * a) + (b + 0.9 * v), first, second, velocity)
    assert_trees_close(after, jax.tree.map(lambda p, s: p - 0.1 * s, PARAMS, steps), rtol=1e-5)


def test_adam_takes_its_decays():
    grads = [gradient(seed) for seed in (1, 2, 3)]
    default = run(OptimConfig(name="adam"), grads)
    assert_trees_close(default, run(OptimConfig(name="adam", b1=0.9, b2=0.999), grads))
    for other in (
        OptimConfig(name="adam", b1=0.5),
        OptimConfig(name="adam", b2=0.9),
        OptimConfig(name="adam", eps=1.0),
    ):
        assert not np.allclose(run(other, grads)["kernel"], default["kernel"])


def test_clipping_bounds_the_global_norm():
    huge = gradient(1, scale=1e3)
    after = run(OptimConfig(name="sgd", clip_norm=0.5), [huge], learning_rate=1.0)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, PARAMS))
    assert float(moved) == pytest.approx(0.5, rel=1e-5)
    small = gradient(1, scale=1e-3)
    assert_trees_close(run(OptimConfig(name="sgd", clip_norm=0.5), [small]), run(OptimConfig(name="sgd"), [small]))


def test_accumulated_gradients_are_one_averaged_step():
    grads = [gradient(seed) for seed in range(4)]
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in (grads[:2], grads[2:])]
    accumulated = run(OptimConfig(name="adamw", weight_decay=0.1, accumulate_steps=2), grads)
    assert_trees_close(accumulated, run(OptimConfig(name="adamw", weight_decay=0.1), mean), rtol=1e-5)


def test_accumulation_follows_the_schedule_of_steps():
    config = OptimConfig(name="sgd", accumulate_steps=2)
    optimizer = make_optimizer(config, lambda step: 1.0 * step)
    state, ones = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    moves = []
    for _ in range(6):
        updates, state = optimizer.update(ones, state, PARAMS)
        moves.append(float(updates["bias"][0]))
    assert moves == [0, 0, 0, -2, 0, -4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lion"}, "optim.name='lion': must be one of adam, adamw, sgd"),
        ({"schedule": "step"}, "optim.schedule='step': must be one of constant, cosine, linear"),
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0: must be at least 0"),
        ({"name": "adam", "weight_decay": 0.1}, "optim.weight_decay=0.1: does not apply to adam"),
        ({"name": "sgd", "b1": 0.9}, "optim.b1=0.9: does not apply to sgd"),
        ({"name": "adamw", "momentum": 0.9}, "optim.momentum=0.9: does not apply to adamw"),
        ({"name": "sgd", "eps": 1e-8}, "optim.eps=1e-08: does not apply to sgd"),
        ({"eps": 0.0}, "optim.eps=0.0: must be above 0"),
        ({"b2": 1.0}, "optim.b2=1.0: must be in [0, 1)"),
        ({"accumulate_steps": 0}, "optim.accumulate_steps=0: must be at least 1"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**fields).validate()
    assert str(caught.value) == message
