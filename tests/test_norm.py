"""Test BatchNorm against float64 NumPy, nnx.BatchNorm, and itself on the whole batch of several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from cifar_flax.models.layers import gelu
from cifar_flax.models.norm import BatchNorm, identity

PLATFORMS = ("cpu", "cuda")
SHAPE, CHANNELS = (6, 5, 4, 3), 3
# Each activation, and its float64 reference.
ACTIVATIONS = {
    "identity": (identity, lambda z: z),
    "relu": (nnx.relu, lambda z: np.maximum(z, 0)),
    "gelu": (gelu, lambda z: z * scipy.special.ndtr(z)),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(platform="cpu", *, use_scale=True, **settings):
    """Return a layer with a random scale and bias."""
    layer = BatchNorm(CHANNELS, use_scale=use_scale, platform=platform, rngs=nnx.Rngs(0), **settings)
    if use_scale:
        layer.scale[...] = jnp.asarray(1 + 0.3 * normal(1, CHANNELS))
    layer.bias[...] = jnp.asarray(normal(2, CHANNELS))
    return layer


def training_pass(layer, **settings):
    """Return a function of (parameters, input, shortcut) that returns the output and the running averages."""
    graphdef, params, batch_stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
    params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

    def call(params, x, shortcut=None):
        merged = nnx.merge(graphdef, params, batch_stats)
        out = merged(x, use_running_average=False, shortcut=shortcut, **settings)
        return out, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    return call, params


def reference(x, scale, bias, shortcut, activation, epsilon):
    """Return the output, computed by NumPy in float64."""
    x, scale, bias, shortcut = (np.asarray(array, np.float64) for array in (x, scale, bias, shortcut))
    axes = tuple(range(x.ndim - 1))
    normalized = (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)
    return activation(normalized * scale + bias + shortcut)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("mean", "std"), [(1000, 1), (10, 0.001), (-1000, 1)])
def test_variance_is_precise_if_the_mean_is_large(platform, mean, std):
    """E[x^2] - E[x]^2 has an error of more than the variance."""
    x = (mean + std * normal(0, 64, 15, 15, CHANNELS)).astype(np.float32)
    call, params = training_pass(make(platform, momentum=0.0, epsilon=1e-12))
    out, found = jax.jit(call)(params, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found["var"], wide.var((0, 1, 2)), rtol=0.01)
    np.testing.assert_allclose(found["mean"], wide.mean((0, 1, 2)), rtol=1e-6)
    expected = reference(x, params["scale"], params["bias"], 0, ACTIVATIONS["identity"][1], 1e-12)
    np.testing.assert_allclose(out, expected, atol=0.02)


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 7, 7)])
def test_variance_is_precise_with_a_single_outlier(place):
    x = 3 + normal(0, 8, 15, 15, CHANNELS)
    x[place] = 1e4  # (0, 7, 7) is the element that is subtracted from all elements
    _, found = jax.jit(training_pass(make(momentum=0.0))[0])(training_pass(make())[1], x)
    np.testing.assert_allclose(found["var"], x.astype(np.float64).var((0, 1, 2)), rtol=0.01)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_channels_become_their_bias(platform, dtype):
    """Images without color, or with a border of one value, contain such channels."""
    x = jnp.broadcast_to(jnp.array([0.1, 1000 / 3, -7]), (16, 7, 7, CHANNELS)).astype(dtype)
    call, params = training_pass(make(platform, epsilon=1e-12), activation=gelu)
    (out, _), transpose = jax.vjp(lambda params, x: call(params, x), params, x)
    expected = jnp.broadcast_to(gelu(params["bias"]), x.shape).astype(dtype)
    np.testing.assert_array_equal(out, expected)
    zero = jax.tree.map(jnp.zeros_like, call(params, x)[1])
    for leaf in jax.tree.leaves(transpose((jnp.asarray(normal(3, *x.shape), dtype), zero))):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_shortcut", [True, False])
def test_output_and_gradient_equal_those_of_float64(platform, name, use_scale, use_shortcut):
    """Compare the gradient with differences of the reference in random directions."""
    activation, expected_activation = ACTIVATIONS[name]
    x, weight, shortcut = 2 + 3 * normal(0, *SHAPE), normal(3, *SHAPE), normal(4, *SHAPE)
    call, params = training_pass(make(platform, use_scale=use_scale), activation=activation)

    def expected(params, x, shortcut):
        added = shortcut if use_shortcut else 0
        return reference(x, params.get("scale", 1), params["bias"], added, expected_activation, 1e-5)

    def loss(params, x, shortcut):
        out, _ = call(params, x, shortcut if use_shortcut else None)
        return jnp.sum(weight * out), out

    point = params, x, shortcut
    gradient, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*point)
    np.testing.assert_allclose(out, expected(*point), atol=1e-5)
    point = jax.tree.map(lambda array: np.asarray(array, np.float64), point)
    for seed in range(4):
        directions = jax.tree.map(lambda array, seed=seed: normal(10 + seed, *array.shape), point)
        ahead, behind = (
            jax.tree.map(lambda array, d, step=step: array + step * d, point, directions) for step in (1e-6, -1e-6)
        )
        slope = np.sum(weight * (expected(*ahead) - expected(*behind))) / 2e-6
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(directions), strict=True)
        assert sum(np.sum(np.float64(g) * d) for g, d in pairs) == pytest.approx(slope, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_running_averages_and_evaluation_equal_those_of_flax(platform):
    """Running variances are of the biased variance."""
    settings = {"momentum": 0.6, "epsilon": 1e-3}
    ours, flax = make(platform, **settings), nnx.BatchNorm(CHANNELS, **settings, rngs=nnx.Rngs(0))
    nnx.update(flax, nnx.state(ours))
    for seed in range(3):
        x = jnp.asarray(normal(seed, *SHAPE))
        for layer in (ours, flax):
            layer(x, use_running_average=False)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(flax, name)[...], rtol=1e-5, atol=1e-6)
    found, expected = (layer(x, use_running_average=True) for layer in (ours, flax))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_inputs_are_saved_for_the_gradient(dtype):
    x = jnp.asarray(normal(0, *SHAPE), dtype)
    call, params = training_pass(make("cuda"), activation=gelu)
    out, transpose = jax.vjp(lambda x, shortcut: call(params, x, shortcut)[0], x, x[::-1])
    assert out.dtype == dtype
    saved = [leaf for leaf in jax.tree.leaves(transpose) if leaf.size > CHANNELS]
    assert [(leaf.shape, leaf.dtype) for leaf in saved] == [(SHAPE, dtype)] * 2


@pytest.mark.parametrize("platform", PLATFORMS)
def test_devices_with_different_distributions_equal_the_whole_batch(platform):
    """Statistics and gradients with respect to the input are of the whole batch, those of parameters add up to it."""
    devices, axes = 4, (0, 0)
    x = normal(0, devices, *SHAPE) * [[[[[1]]]], [[[[9]]]], [[[[2]]]], [[[[0]]]]] + normal(
        1, devices, 1, 1, 1, CHANNELS
    )
    x = jnp.asarray(1000 + 50 * x, jnp.float32)
    weight = jnp.asarray(normal(2, *x.shape))

    def loss(call, params, x, weight):
        out, batch_stats = call(params, x)
        return jnp.sum(weight * out), batch_stats

    def gradient(axis_name):
        call, params = training_pass(make(platform, momentum=0.0, axis_name=axis_name), activation=gelu)
        return functools.partial(jax.grad(functools.partial(loss, call), argnums=(0, 1), has_aux=True), params)

    (params, dx), batch_stats = jax.vmap(gradient("devices"), axes, axis_name="devices")(x, weight)
    whole = (array.reshape(-1, *SHAPE[1:]) for array in (x, weight))
    (expected_params, expected_dx), expected = gradient(None)(*whole)
    for found in (jax.tree.map(lambda array, i=i: array[i], batch_stats) for i in range(devices)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)
    np.testing.assert_allclose(dx.reshape(expected_dx.shape), expected_dx, atol=1e-4 * np.abs(expected_dx).max())
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found.sum(axis=0), expected, rtol=1e-3),
        params,
        expected_params,
    )
