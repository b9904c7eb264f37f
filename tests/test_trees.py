"""The check for NaN and infinity."""

import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.runtime.trees import all_finite


def tree(place=None, value=0.0):
    """Return arrays of different ranks and lengths, with `value` at one place."""
    arrays = {"kernel": np.ones((2, 3, 5)), "bias": np.ones(7), "loss": np.ones(()), "count": np.ones((), int)}
    if place is not None:
        name, index = place
        arrays[name][index] = value
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def test_finite_arrays_are_finite():
    assert all_finite(tree())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "place", [("kernel", (0, 0, 0)), ("kernel", (1, 2, 4)), ("bias", 0), ("bias", 6), ("loss", ())]
)
def test_one_element_that_is_not_finite_is_found(place, value):
    assert not all_finite(tree(place, value))


def test_values_of_opposite_sign_do_not_cancel():
    assert not all_finite({"a": jnp.array([np.inf, 0]), "b": jnp.array([-np.inf, 0])})
