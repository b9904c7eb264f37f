"""Muon against the singular value decomposition, and kernels of different shapes in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_flax.training import muon
from cifar_flax.training.muon import orthogonal_kernels, orthogonalize
from cifar_flax.training.optimizers import GROUPS, GroupConfig, OptimConfig, learning_rates, make_optimizer


def composed_quintic(x, steps):
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 8, 4), (1, 6, 6)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_applies_the_polynomial_to_the_singular_values(shape, steps):
    matrices = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    s /= np.linalg.norm(matrices, axis=(1, 2))[:, None]
    expected = (u * composed_quintic(s, steps)[:, None, :]) @ vt
    with jax.default_matmul_precision("highest"):
        out = orthogonalize(jnp.asarray(matrices, jnp.float32), jnp.float32, steps)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_three_newton_schulz_steps_bring_singular_values_near_one():
    singular = jnp.linalg.svd(orthogonalize(jax.random.normal(jax.random.key(0), (4, 64, 576)), jnp.float32))[1]
    assert 0.3 < float(singular.min()) < float(singular.max()) < 1.6


def test_muon_equals_the_recipe_in_numpy(monkeypatch):
    """Compare three steps with the recipe written in NumPy for one kernel at a time; some kernels share a batch."""
    monkeypatch.setattr(muon, "MUON_DTYPE", jnp.float32)
    # The first three have 4 filters, the last two more filters than inputs.
    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 2, 4), "c": (3, 3, 3, 4), "d": (1, 1, 4, 5), "e": (1, 1, 2, 5)}
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(3)]
    groups = {group: GroupConfig(learning_rate=1.0) for group in GROUPS}
    config = OptimConfig(name="muon", learning_rate=0.24, momentum=0.6, **groups)
    optimizer = make_optimizer(config, learning_rates(config, 100, 10), jax.tree.map(lambda _: "convolutions", params))
    ours = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(ours)
    with jax.default_matmul_precision("highest"):
        for grads in gradients:
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
            ours = optax.apply_updates(ours, updates)
    for name, shape in shapes.items():
        weights, buffer = params[name]["kernel"].astype(np.float64), np.zeros(shape)
        for grads in gradients:
            g = grads[name]["kernel"]
            buffer = 0.6 * buffer + g
            u, s, vt = np.linalg.svd((g + 0.6 * buffer).reshape(-1, shape[-1]).T, full_matrices=False)
            update = (u * composed_quintic(s / np.linalg.norm(s), 3)) @ vt
            weights = weights * np.sqrt(shape[-1]) / np.linalg.norm(weights) - 0.24 * update.T.reshape(shape)
        np.testing.assert_allclose(ours[name]["kernel"], weights, atol=1e-4)


AIRBENCH94_WIDE = [(3, 3, 24, 64), (3, 3, 64, 64), (3, 3, 64, 256), *[(3, 3, 256, 256)] * 3]


def test_stacks_are_padded_with_zeros_at_the_end():
    stack = muon.stack_padded([jnp.array([[1, 2]]), jnp.array([[3], [4]])])
    np.testing.assert_array_equal(stack, [[[1, 2], [0, 0]], [[3, 0], [4, 0]]])


def test_zeros_change_neither_singular_values_nor_other_elements():
    matrix = jax.random.normal(jax.random.key(0), (1, 5, 7))
    padded = jnp.pad(matrix, ((0, 0), (0, 2), (0, 4)))
    with jax.default_matmul_precision("highest"):
        expected, result = orthogonalize(matrix, jnp.float32), orthogonalize(padded, jnp.float32)
    np.testing.assert_allclose(result, jnp.pad(expected, ((0, 0), (0, 2), (0, 4))), atol=1e-5)


def test_kernels_with_shorter_sides_of_the_same_length_are_one_batch():
    """Padding only the longer sides keeps the matrix products small: two batches of airbench94_wide's six kernels."""
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in AIRBENCH94_WIDE]
    program = jax.make_jaxpr(orthogonal_kernels)(kernels)
    products = [equation.outvars[0].aval.shape for equation in program.eqns if equation.primitive.name == "dot_general"]
    expected = [(2, 64, 64), (2, 64, 64), (2, 64, 576), (4, 256, 256), (4, 256, 256), (4, 256, 2304)]
    assert sorted(products) == sorted(3 * expected)


def test_a_network_without_convolutions_has_nothing_to_orthogonalize():
    optimizer = muon.muon(lambda step: 0.1, momentum=0.6)
    updates, _ = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}
