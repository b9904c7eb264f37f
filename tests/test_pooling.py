"""Test max-pooling and its gradient against NumPy, in the form of each platform, which all run on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.models.cpu import pooling
from cifar_flax.models.pooling import global_max_pool, max_pool

PLATFORMS = ("gpu", "tpu")  # a CPU without its own kernels pools as a GPU


def expected(x, dy, window):
    """Return the maxima of the windows of `x`, and the gradient, which the first maximum of each window gets."""
    batch, height, width, c = x.shape
    maximum, gradient = np.empty((batch, height // window, width // window, c), x.dtype), np.zeros_like(x)
    for b, i, j, k in np.ndindex(maximum.shape):
        rows, columns = (slice(place * window, (place + 1) * window) for place in (i, j))
        values = x[b, rows, columns, k]
        maximum[b, i, j, k] = values.max()
        first = np.unravel_index(values.argmax(), values.shape)
        gradient[b, i * window + first[0], j * window + first[1], k] = dy[b, i, j, k]
    return maximum, gradient


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("height", "width", "window"), [(8, 6, 2), (7, 5, 2), (9, 6, 3), (5, 10, 3), (3, 2, 2), (4, 8, 4)]
)
@pytest.mark.parametrize("values", [3, 1000])
def test_max_pool_equals_numpy(platform, dtype, height, width, window, values):
    """With three values, most windows contain their maximum more than once. Rows may fill no window."""
    rng = np.random.default_rng(0)
    x = rng.integers(-values, 0, (2, height, width, 3)).astype(dtype)
    dy = rng.integers(1, 100, (2, height // window, width // window, 3)).astype(dtype)
    found, backward = jax.vjp(lambda x: max_pool(x, window, platform=platform), jnp.asarray(x))
    maximum, gradient = expected(x, dy, window)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, maximum)
    np.testing.assert_array_equal(backward(jnp.asarray(dy))[0], gradient)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_propagates_nan(platform, place):
    """One element of the window gets its whole gradient. Other windows are not affected."""
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 1)).at[(0, *place)].set(jnp.nan)
    found, backward = jax.vjp(lambda x: max_pool(x, platform=platform), x)
    np.testing.assert_array_equal(jnp.isnan(found)[0, :, :, 0], [[True, False], [False, False]])
    (gradient,) = backward(jnp.ones_like(found))
    assert sorted(gradient[0, :2, :2, 0].ravel().tolist()) == [0, 0, 0, 1]
    np.testing.assert_array_equal(gradient.sum(), 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (31, 17)])
@pytest.mark.parametrize("values", [3, 1000])
def test_global_max_pool_equals_numpy(dtype, height, width, values):
    """With three values, all images contain their maximum more than once. The maximum may be negative."""
    rng = np.random.default_rng(0)
    x = rng.integers(-values, 0, (2, height, width, 3)).astype(dtype)
    dy = rng.integers(1, 100, (2, 3)).astype(dtype)
    found, backward = jax.vjp(global_max_pool, jnp.asarray(x))
    flat, gradient = x.reshape(2, -1, 3), np.zeros((2, height * width, 3), dtype)
    np.put_along_axis(gradient, flat.argmax(axis=1, keepdims=True), dy[:, None], axis=1)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, flat.max(axis=1))
    np.testing.assert_array_equal(backward(jnp.asarray(dy))[0], gradient.reshape(x.shape))


def test_global_max_pool_propagates_nan():
    """Other images and channels are not affected."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 2)).at[1, 2, 3, 0].set(jnp.nan).at[1, 3, 3, 0].set(jnp.nan)
    found, backward = jax.vjp(global_max_pool, x)
    np.testing.assert_array_equal(jnp.isnan(found), [[False, False], [True, False]])
    gradient = backward(jnp.ones_like(found))[0]
    np.testing.assert_array_equal(gradient.sum(axis=(1, 2)), jnp.ones((2, 2)))
    assert gradient[1, 2, 3, 0] == 1


def test_gradient_of_global_max_pool_compares_no_floats():
    """The gradient of `jnp.max` is NaN if an `x` that is computed again, with another rounding, has no maximum."""
    program = jax.make_jaxpr(jax.grad(lambda x: global_max_pool(x).sum()))(jnp.ones((1, 9, 9, 4)))
    names = {equation.primitive.name for equation in program.eqns}
    operands = {equation.invars[0].aval.dtype for equation in program.eqns if equation.primitive.name == "eq"}
    assert "argmax" in names
    assert not names & {"reduce_max", "div"}
    assert operands == {jnp.dtype("int32")}


def test_a_gpu_needs_no_select_and_scatter():
    """XLA has no deterministic version of it for GPUs. A TPU needs it, because it writes the other form to memory."""

    def program(platform):
        return str(jax.make_jaxpr(jax.grad(lambda x: max_pool(x, platform=platform).sum()))(jnp.ones((1, 4, 4, 1))))

    assert [name for name in ("cpu", "gpu", "tpu") if "select_and_scatter" in program(name)] == ["tpu"]


def test_cpu_max_pool_passes_the_gradient_to_the_first_of_equal_values():
    x = jnp.array([[[1.0], [3.0], [3.0], [2.0]], [[5.0], [5.0], [5.0], [5.0]]])  # two pooling windows of four elements
    np.testing.assert_array_equal(pooling.max_over_places(x), [[3], [5]])
    gradient = jax.grad(lambda x: jnp.sum(pooling.max_over_places(x) * jnp.array([[2.0], [3.0]])))(x)
    np.testing.assert_array_equal(gradient[..., 0], [[0, 2, 0, 0], [3, 0, 0, 0]])
