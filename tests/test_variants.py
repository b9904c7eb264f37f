"""Test the variants of airbench94_wide: their settings, and that their patches change what they are meant to change."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.campaign import Settings
from benchmarks.programs import DATASET
from benchmarks.variants import VARIANTS
from cifar_flax.models import pooling
from cifar_flax.training.setup import setup
from cifar_flax.training.timetable import Timetable


@pytest.mark.parametrize("overrides", sorted({one.overrides for one in VARIANTS.values()}), ids=str)
def test_all_calls_of_a_variant_have_the_same_length(overrides):
    """Otherwise, a GPU waits for the host in each iteration, and the variant would measure this, too."""
    config = Settings(end=0).config("airbench94_wide", *overrides)
    task, _ = setup(config, DATASET)
    timetable = Timetable(config, DATASET.num_examples, task, "resident")
    assert timetable.lengths() == {config.train.steps_per_call}


@pytest.fixture
def patched():
    """Return a function that applies the patch of a variant until the end of the test."""
    yield lambda name: VARIANTS[name].patch()
    mock.patch.stopall()


def test_pooling_variant_replaces_the_pooling_of_a_gpu(patched):
    def program(platform):
        gradient = jax.grad(lambda x: jnp.sum(pooling.max_pool(x, platform=platform)))
        return str(jax.make_jaxpr(gradient)(jnp.ones((2, 4, 4, 3))))

    before = program("gpu")
    patched("reduce_window_pool")
    assert program("gpu") == program("tpu") != before


def test_views_as_one_batch_equal_one_view_after_the_other(patched):
    views = jax.random.normal(jax.random.key(0), (6, 4, 8, 8, 3))
    sizes = []

    def network(x):
        sizes.append(len(x))
        return x.sum(axis=(1, 2))

    expected = jax.lax.map(network, views)
    patched("views_as_one_batch")
    np.testing.assert_allclose(jax.lax.map(network, views), expected, rtol=1e-5)
    assert sizes[-1] == 6 * 4
