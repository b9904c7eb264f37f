"""Test dropout, random bits and GELU against reference implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.models import layers
from cifar_flax.models.cpu import threefry


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_dropout_rate_and_scale(rate):
    x = jnp.ones((1024, 31, 33))  # enough elements to distinguish rates that differ by 1/256
    out = np.asarray(layers.dropout(x, jax.random.split(jax.random.key(0), 1024), rate))
    fraction = round(rate * 256) / 256
    std = np.sqrt(fraction * (1 - fraction) / out.size)
    assert abs(np.mean(out == 0) - fraction) < 5 * std
    np.testing.assert_allclose(out[out != 0], 1 / (1 - fraction), rtol=1e-6)
    per_position = np.mean(out == 0, axis=0)  # the rate is the same at each position and in each byte of a random word
    assert np.all(np.abs(per_position - fraction) < 6 * np.sqrt(fraction * (1 - fraction) / 1024))


def test_dropout_mask_depends_on_the_example_not_on_its_position():
    x, keys = normal(0, 8, 50), jax.random.split(jax.random.key(0), 8)
    out = np.asarray(layers.dropout(x, keys, 0.5))
    order = np.array([3, 1, 7, 0])
    np.testing.assert_array_equal(layers.dropout(x[order], keys[order], 0.5), out[order])
    masks = {tuple(row == 0) for row in out}
    assert len(masks) == 8


@pytest.mark.parametrize("count", [1, 37, 1800])
def test_random_words_equal_jax(count):
    keys = jax.random.split(jax.random.key(7, impl="threefry2x32"), 5)
    expected = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)
    np.testing.assert_array_equal(threefry.random_words(keys, count), expected)


def test_dropout_of_rate_zero_changes_nothing():
    x = normal(0, 4, 9)
    np.testing.assert_array_equal(layers.dropout(x, jax.random.split(jax.random.key(0), 4), 0.0), x)


def test_gelu_is_exact():
    x = jnp.linspace(-8, 8, 201)
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    slopes = (jax.vmap(jax.grad(f))(x) for f in (layers.gelu, lambda x: jax.nn.gelu(x, approximate=False)))
    np.testing.assert_allclose(*slopes, atol=2e-6)
