import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_flax import models
from cifar_flax.models import CNNConfig


def build(**fields):
    return models.build(CNNConfig(**fields), (32, 32, 3), 10, platform="cpu", rngs=nnx.Rngs(0))


def arrays(model, kind):
    return nnx.to_pure_dict(nnx.state(model, kind))


def test_parameter_count_equals_that_of_the_reference_network():
    assert sum(leaf.size for leaf in jax.tree.leaves(arrays(build(), nnx.Param))) == 3_693_002


def test_initial_values_are_keras_defaults():
    params = arrays(build(), nnx.Param)
    for layer, fan_in, fan_out in (("conv", 27, 288), ("hidden", 7200, 512), ("head", 512, 10)):
        kernel, limit = np.asarray(params[layer]["kernel"]), np.sqrt(6 / (fan_in + fan_out))
        assert np.abs(kernel).max() <= limit
        np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.05)  # the std of a uniform distribution
        assert not np.any(params[layer]["bias"])
    assert np.all(params["norm"]["scale"] == 1)
    assert not np.any(params["norm"]["bias"])


def test_forward_pass_equals_the_layers_in_numpy():
    """Parameters and batch statistics are random, so that each of them matters."""
    model = build()
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        value = rng.normal(0, 0.1, variable.shape).astype(np.float32)
        variable[...] = jnp.asarray(np.abs(value) + 0.5 if path[-1] == "var" else value)
        holder = model
        for name in path[:-1]:
            holder = getattr(holder, name)
        getattr(holder, path[-1])[...] = variable[...]
    p, s = (jax.tree.map(np.asarray, arrays(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    x = rng.normal(0, 1, (2, 32, 32, 3)).astype(np.float32)

    conv = sum(
        np.einsum("bhwc,cd->bhwd", x[:, i : i + 30, j : j + 30], p["conv"]["kernel"][i, j])
        for i in range(3)
        for j in range(3)
    )
    relu = np.maximum(conv + p["conv"]["bias"], 0)
    pooled = relu.reshape(2, 15, 2, 15, 2, 32).max(axis=(2, 4))
    normed = (pooled - s["norm"]["mean"]) / np.sqrt(s["norm"]["var"] + 1e-3) * p["norm"]["scale"] + p["norm"]["bias"]
    hidden = np.maximum(normed.reshape(2, -1) @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    logits = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(model(jnp.asarray(x)), logits, rtol=1e-4, atol=1e-4)


def test_training_updates_batch_statistics_with_the_momentum_of_keras():
    model = build(conv_dropout=0.0, hidden_dropout=0.0)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    before = nnx.relu(model.conv(x))
    model(x, jax.random.split(jax.random.key(1), 4))
    stats = arrays(model, nnx.BatchStat)["norm"]
    np.testing.assert_allclose(stats["mean"], 0.01 * before.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * before.var(axis=(0, 1, 2)), rtol=1e-4)


def test_both_dropouts_apply_in_training_only():
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in (1, 2)]
    for rates in ({"conv_dropout": 0.2, "hidden_dropout": 0.0}, {"conv_dropout": 0.0, "hidden_dropout": 0.5}):
        model = build(**rates)
        assert not np.allclose(model(x, keys[0]), model(x, keys[1]))
        np.testing.assert_array_equal(model(x), model(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_applies_to_activations_only(dtype):
    model = build(dtype=dtype)
    graphdef, state = nnx.split(model)
    x, keys = jnp.zeros((2, 32, 32, 3)), jax.random.split(jax.random.key(0), 2)

    def run(state, x):
        model = nnx.merge(graphdef, state)
        return model(x, keys), nnx.state(model)

    logits, after = jax.eval_shape(run, state, x)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    products = [line for line in str(jax.make_jaxpr(run)(state, x)).splitlines() if "dot_general" in line]
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert len(products) >= 2
    assert all(f":{short}[" in line for line in products)
