import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.errors import ConfigError
from cifar_flax.training import averaging
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.state import TrainState

TOTAL = 12


def run(config):
    """Add 1 to both weights in each of twelve steps; return the weights and the averages after each step."""
    weights = ({"kernel": jnp.zeros(2)}, {"mean": jnp.zeros(2)})
    average = averaging.init(config, weights)
    history = []
    for step in range(1, TOTAL + 1):
        weights = jax.tree.map(lambda x: x + 1, weights)
        weights, average = averaging.update(config, jnp.int32(step), TOTAL, weights, average)
        history.append((float(weights[0]["kernel"][0]), float(average[1]["mean"][0]) if average else None))
    return history


def test_none_keeps_nothing():
    assert averaging.init(AveragingConfig(), {"kernel": jnp.ones(2)}) == ()
    assert run(AveragingConfig()) == [(step, None) for step in range(1, TOTAL + 1)]


def test_ema_does_not_change_the_weights():
    mean, expected = 0.0, []
    for step in range(1, TOTAL + 1):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * step
        expected.append((step, mean))
    np.testing.assert_allclose(run(AveragingConfig(name="ema", decay=0.5)), expected, rtol=1e-5)


def test_lookahead_resets_the_weights():
    """As in airbench: every 5 steps and after the last step, with a decay that grows with the cube of the step."""
    weights, mean, expected = 0.0, 0.0, []
    for step in range(1, TOTAL + 1):
        weights += 1
        if step % 5 == 0:
            decay = 0.95**5 * (step / TOTAL) ** 3
            mean = weights = mean + (1 - decay) * (weights - mean)
        if step == TOTAL:
            weights = mean
        expected.append((weights, mean))
    assert expected[TOTAL - 1][0] == expected[10 - 1][1]
    np.testing.assert_allclose(run(AveragingConfig(name="lookahead", decay=0.95, every=5)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", averaging.AVERAGES)
def test_only_ema_weights_are_evaluated(name):
    state = TrainState(step=1, seed=0, params="last", batch_stats="last", opt_state=(), average=("mean", "mean"))
    assert state.evaluated(AveragingConfig(name=name)) == (("mean" if name == "ema" else "last"),) * 2


def test_the_first_average_is_a_copy():
    """A step is donated the buffers of both, so they must not be the same."""
    weights = {"kernel": jnp.ones(2)}
    average = jax.jit(lambda weights: (weights, averaging.init(AveragingConfig(name="ema"), weights)))(weights)[1]
    assert average["kernel"] is not weights["kernel"]
    np.testing.assert_array_equal(average["kernel"], weights["kernel"])


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"decay": 1.0}, "averaging.decay=1.0: "),
        ({"every": 0}, "averaging.every=0: "),
    ],
)
def test_invalid_settings_are_refused(fields, setting):
    with pytest.raises(ConfigError) as caught:
        AveragingConfig(**fields).validate()
    assert str(caught.value).startswith(setting)
