import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cifar_flax.models import layers


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (3, 7, 5, 1), (1, 3, 3, 4)])
def test_patch_convolution_equals_xla(shape):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 6)
    out = layers._xla_conv2d(x, kernel)
    np.testing.assert_allclose(layers._patch_conv2d(x, kernel), out, rtol=1e-5, atol=1e-5)
    weight = normal(2, *out.shape)
    for argument in (0, 1):
        plain, patch = (
            jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weight), argument)(x, kernel)
            for f in (layers._xla_conv2d, layers._patch_conv2d)
        )
        np.testing.assert_allclose(patch, plain, rtol=1e-4, atol=1e-4)


def test_each_platform_gets_its_own_convolution():
    lowered = jax.jit(layers.conv2d).trace(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4)))
    assert "stablehlo.convolution" not in lowered.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in lowered.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("size", "window"), [(30, 2), (7, 2), (9, 3), (4, 4)])
def test_max_pool_equals_reduce_window(size, window):
    x = normal(0, 2, size, size, 5)

    def reference(x):
        dims = (1, window, window, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, dims, dims, "VALID")

    np.testing.assert_array_equal(layers.max_pool(x, window), reference(x))
    weight = normal(1, *reference(x).shape)
    pools = (lambda x: layers.max_pool(x, window), reference)
    gradients = [jax.grad(lambda x, pool=pool: jnp.sum(pool(x) * weight))(x) for pool in pools]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


def test_max_pool_of_equal_values_keeps_the_gradient_whole():
    gradient = jax.grad(lambda x: jnp.sum(layers.max_pool(x)))(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 4, 4, 1), 0.25))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_dropout_rate_and_scale(rate):
    x = jnp.ones((1024, 31, 33))  # enough elements to tell a rate from the next one, 1/256 away
    out = np.asarray(layers.dropout(x, jax.random.split(jax.random.key(0), 1024), rate))
    share = round(rate * 256) / 256
    deviation = np.sqrt(share * (1 - share) / out.size)
    assert abs(np.mean(out == 0) - share) < 5 * deviation
    np.testing.assert_allclose(out[out != 0], 1 / (1 - share), rtol=1e-6)
    per_place = np.mean(out == 0, axis=0)  # no place, and no byte of a random word, is special
    assert np.all(np.abs(per_place - share) < 6 * np.sqrt(share * (1 - share) / 1024))


def test_dropout_mask_belongs_to_the_example():
    x, keys = normal(0, 8, 50), jax.random.split(jax.random.key(0), 8)
    out = np.asarray(layers.dropout(x, keys, 0.5))
    order = np.array([3, 1, 7, 0])
    np.testing.assert_array_equal(layers.dropout(x[order], keys[order], 0.5), out[order])
    masks = {tuple(row == 0) for row in out}
    assert len(masks) == 8


def test_dropout_of_rate_zero_changes_nothing():
    x = normal(0, 4, 9)
    np.testing.assert_array_equal(layers.dropout(x, jax.random.split(jax.random.key(0), 4), 0.0), x)
