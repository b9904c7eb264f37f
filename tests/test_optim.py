"""Optimizers, groups of parameters and learning-rate schedules against their definitions."""

import dataclasses
import itertools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY

from cifar_flax.errors import ConfigError
from cifar_flax.training.optimizers import (
    GroupConfig,
    OptimConfig,
    learning_rates,
    make_optimizer,
    make_schedule,
)

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
PARAM_GROUPS = {"kernel": "dense", "bias": "biases"}


def gradient(seed, scale=1.0):
    return jax.tree.map(lambda x: scale * jax.random.normal(jax.random.key(seed), x.shape), PARAMS)


def run(config, gradients, learning_rate=0.1, params=PARAMS, param_groups=PARAM_GROUPS):
    """Return the parameters after one step for each of `gradients`."""
    config = dataclasses.replace(config, learning_rate=learning_rate)
    optimizer = make_optimizer(config, learning_rates(config, 100, 10), param_groups)
    state = optimizer.init(params)
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


def test_schedules_may_start_and_end_above_zero():
    config = OptimConfig(learning_rate=10.0, schedule="linear", warmup_epochs=1, warmup_start=0.2, final_share=0.07)
    rate = make_schedule(config, total_steps=110, steps_per_epoch=10)
    assert [float(rate(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx([2, 6, 10, 5.35, 0.7])


def test_final_epochs_keep_the_last_learning_rate():
    config = OptimConfig(learning_rate=10.0, schedule="linear", warmup_epochs=1, final_share=0.07, final_epochs=2)
    rate = make_schedule(config, total_steps=130, steps_per_epoch=10)
    assert [float(rate(step)) for step in (10, 60, 110, 120, 129)] == pytest.approx([10, 5.35, 0.7, 0.7, 0.7])
    config.final_epochs = 12
    with pytest.raises(ConfigError, match=r"optim\.final_epochs=12: takes 120 steps, which must be fewer than"):
        make_schedule(config, total_steps=130, steps_per_epoch=10)


def test_warmup_must_be_shorter_than_the_run():
    make_schedule(OptimConfig(warmup_epochs=9.9), total_steps=100, steps_per_epoch=10)
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=10: must be shorter than the run of 100 steps"):
        make_schedule(OptimConfig(warmup_epochs=10), total_steps=100, steps_per_epoch=10)


def test_weight_decay_does_not_apply_to_biases():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for name in ("adamw", "sgd"):
        after = run(OptimConfig(name=name, weight_decay=0.5), [zero])
        np.testing.assert_allclose(after["kernel"], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
        np.testing.assert_array_equal(after["bias"], PARAMS["bias"])


def test_sgd_uses_nesterov_momentum():
    grads = [gradient(seed) for seed in (1, 2)]
    after = run(OptimConfig(name="sgd", momentum=0.9), grads)
    first, second = grads
    velocity = jax.tree.map(lambda a, b: 0.9 * a + b, first, second)
    steps = jax.tree.map(lambda a, b, v: (a + 0.9 * a) + (b + 0.9 * v), first, second, velocity)
    assert_trees_close(after, jax.tree.map(lambda p, s: p - 0.1 * s, PARAMS, steps), rtol=1e-5)


def test_adam_uses_b1_b2_and_eps():
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


def test_gradient_accumulation_equals_one_step_with_the_mean_gradient():
    grads = [gradient(seed) for seed in range(4)]
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in (grads[:2], grads[2:])]
    accumulated = run(OptimConfig(name="adamw", weight_decay=0.1, accumulate_steps=2), grads)
    assert_trees_close(accumulated, run(OptimConfig(name="adamw", weight_decay=0.1), mean), rtol=1e-5)


def test_gradient_accumulation_keeps_the_schedule_in_steps():
    config = OptimConfig(name="sgd", learning_rate=10.0, warmup_epochs=1, accumulate_steps=2)
    # During the warm-up, the learning rate of step n is n.
    optimizer = make_optimizer(config, learning_rates(config, 100, 10), PARAM_GROUPS)
    state, ones = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    moves = []
    for _ in range(6):
        updates, state = optimizer.update(ones, state, PARAMS)
        moves.append(float(updates["bias"][0]))
    assert moves == pytest.approx([0, 0, 0, -2, 0, -4])


NETWORK = {
    "conv": {"kernel": jnp.full((3, 3, 2, 4), 2.0)},
    "head": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)},
    "whitening": {"bias": jnp.full(3, 2.0)},
}
NETWORK_GROUPS = {
    "conv": {"kernel": "convolutions"},
    "head": {"kernel": "dense", "bias": "biases"},
    "whitening": {"bias": "whitening"},
}


def moves(config, steps, total_steps=100):
    """Return the update of each parameter of `NETWORK` in each step; all gradients are 1."""
    optimizer = make_optimizer(config, learning_rates(config, total_steps, 10), NETWORK_GROUPS)
    state, grads = optimizer.init(NETWORK), jax.tree.map(jnp.ones_like, NETWORK)
    out = []
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, NETWORK)
        out.append(
            {
                jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf.ravel()[0])
                for path, leaf in jax.tree.leaves_with_path(updates)
            }
        )
    return out


def test_groups_have_their_own_learning_rates_and_weight_decays():
    config = OptimConfig(
        name="sgd",
        learning_rate=0.1,
        weight_decay=0.5,
        dense=GroupConfig(learning_rate=1.0, weight_decay=0.25),
        biases=GroupConfig(learning_rate=0.01, weight_decay=1.0),
    )
    (move,) = moves(config, 1)
    assert move == pytest.approx(
        {
            "conv/kernel": -0.1 * (1 + 0.5 * 2),
            "head/kernel": -1.0 * (1 + 0.25 * 2),
            "head/bias": -0.01 * (1 + 1.0 * 2),
            "whitening/bias": -0.01 * (1 + 1.0 * 2),  # the settings of the biases, since none are set
        }
    )


def test_the_whitening_group_overrides_the_settings_of_the_biases():
    config = OptimConfig(name="sgd", learning_rate=0.1, weight_decay=0.5, biases=GroupConfig(learning_rate=0.01))
    config.whitening = GroupConfig(learning_rate=0.2, weight_decay=0.25)
    (move,) = moves(config, 1)
    assert move["head/bias"] == pytest.approx(-0.01)  # no weight decay by default
    assert move["whitening/bias"] == pytest.approx(-0.2 * (1 + 0.25 * 2))


def test_a_group_may_be_frozen():
    """Check both ways to freeze a group, at once or after a linear decay; other groups are not affected."""
    config = OptimConfig(name="sgd", learning_rate=1.0, schedule="linear", whitening=GroupConfig(frozen_from=0.4))
    assert [move["whitening/bias"] for move in moves(config, 6)] == pytest.approx([-1, -0.99, -0.98, -0.97, 0, 0])
    config.whitening.own_decay = True
    assert [move["whitening/bias"] for move in moves(config, 6)] == pytest.approx([-1, -0.75, -0.5, -0.25, 0, 0])
    assert [move["head/bias"] for move in moves(config, 6)] == pytest.approx([-1, -0.99, -0.98, -0.97, -0.96, -0.95])


def recipe(config_file):
    return runpy.run_path(str(REPOSITORY / "configs" / config_file))["get_config"]()


def summed_sgd(weights, gradients_of_sum, rates, decay, momentum):
    """Return the weights after steps of PyTorch's Nesterov SGD, as the originals use it.

    `decay` is the originals' weight decay divided by their learning rate.
    """
    buffer = 0.0
    for g, rate in zip(gradients_of_sum, rates, strict=True):
        g = g + decay * weights
        buffer = momentum * buffer + g
        weights = weights - rate * (g + momentum * buffer)
    return weights


def linear_decay(rate, steps, total):
    return [rate * max(1 - step / total, 0) for step in range(steps)]


def triangle(rate, steps, total, warm):
    fractions = [
        0.2 + 0.8 * step / warm if step < warm else 1 - (step - warm) / (total - warm) for step in range(steps)
    ]
    return [rate * fraction for fraction in fractions]


AIRBENCH_STEPS = {
    "airbench94.py": 4100,
    "airbench94_wide.py": 296,
    "airbench94_muon.py": 200,
    "airbench95.py": 5500,
    "airbench96.py": 1776,
    "laptop.py": 950,
}
# Configs with the constants of later records -> the steps in which the whitening bias is trained, and the last steps,
# which have the final learning rate.
LATER_RECORDS = {
    "airbench94.py": (50, 160),
    "airbench94_wide.py": (8, 26),
    "airbench95.py": (50, 160),
    "laptop.py": (25, 50),
}
MUON = (*LATER_RECORDS, "airbench94_muon.py")  # tests/test_muon.py covers the update of their convolutions
GROUPS_BY_SGD = [
    (file, group)
    for file, group in itertools.product(AIRBENCH_STEPS, ("head", "norm", "whitening", "conv"))
    if group != "conv" or file not in MUON
]


@pytest.mark.parametrize(("file", "group"), GROUPS_BY_SGD)
def test_airbench_configs_use_the_constants_of_the_originals(file, group):
    """Compare four steps with SGD in NumPy, whose constants refer to the gradient of the sum over the batch."""
    config, total = recipe(file), AIRBENCH_STEPS[file]
    batch, per_epoch = config.train.batch_size, total / config.train.epochs
    momentum = 0.85
    if file in LATER_RECORDS:
        trained, final = LATER_RECORDS[file]
        rate, momentum = {"head": 0.5415, "norm": 0.0573, "whitening": 0.0573}[group], 0.825
        # To 0 while the whitening bias is trained; otherwise to 5 % in all but the last steps.
        rates = linear_decay(rate, 4, trained if group == "whitening" else (total - final) / 0.95)
        decay = 1.0418e-6 * batch / rate
    elif file == "airbench94_muon.py":
        rate = {"head": 0.67, "norm": 0.053, "whitening": 0.053}[group]
        rates = linear_decay(rate, 4, 75 if group == "whitening" else 200)
        decay = 2e-6 * 2000 / rate
    else:
        assert file == "airbench96.py"
        kilostep = 1024 * (1 + 1 / (1 - 0.85))
        lr, wd, warm = 9.0, 0.012, 177
        rate = lr / kilostep * (64 if group == "norm" else 1)
        rates, decay = triangle(rate, 4, total, warm), wd * 1024 / kilostep / rate
    shape = {"head": (5, 3), "conv": (3, 3, 2, 4)}.get(group, (3,))
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=shape), [rng.normal(size=shape) / 1000 for _ in range(4)]
    name = "whitening" if group == "whitening" else "layer"
    label = {"head": "dense", "norm": "biases", "conv": "convolutions"}.get(group, group)
    optimizer = make_optimizer(config.optim, learning_rates(config.optim, total, per_epoch), {name: {"tensor": label}})
    params = {name: {"tensor": jnp.asarray(start, jnp.float32)}}
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update({name: {"tensor": jnp.asarray(g, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
    expected = summed_sgd(start, [g * batch for g in gradients], rates, decay, momentum)
    np.testing.assert_allclose(params[name]["tensor"], expected, rtol=1e-4, atol=1e-5)
