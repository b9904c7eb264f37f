"""Test the sampling order: epochs are permutations, resuming continues them, and releases do not change them."""

import hashlib
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import indices

from cifar_flax.data import order

SIZES = [(1, 1), (7, 3), (10, 10), (50, 8), (1442, 64)]


def test_permutation_is_pinned():
    """The permutations must not depend on the version of NumPy: a run may be resumed with another one."""
    assert order.permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order.permutation(1, 2, 10).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


def test_equal_keys_keep_their_order(monkeypatch):
    keys = np.arange(1000, dtype=np.uint64)[::-1] // 7
    monkeypatch.setattr(np.random, "Philox", lambda key: SimpleNamespace(random_raw=lambda size: keys[:size].copy()))
    expected = sorted(range(1000), key=lambda i: (keys[i], i))
    assert order.permutation(0, 0, 1000).tolist() == expected


def test_memory_does_not_grow_with_the_number_of_epochs():
    examples, peaks = np.arange(50_000, dtype=np.int32), []
    for epochs in (2, 20):
        tracemalloc.start()
        for _ in order.batches(0, examples, 256, 10, epochs * 195):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1] / len(examples))
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1  # bytes per example
    assert peaks[1] < 50


def test_earlier_epochs_are_not_shuffled(monkeypatch):
    shuffled, permutation = [], order.permutation
    monkeypatch.setattr(
        order, "permutation", lambda seed, epoch, n: shuffled.append(epoch) or permutation(seed, epoch, n)
    )
    steps = order.batches(0, np.arange(100, dtype=np.int32), 10, 10**6, 2 * 10**6)
    assert shuffled == []  # nor is one before it is needed
    for _ in range(10):
        next(steps)
    assert shuffled == [10**5]


def test_sampling_order_is_pinned():
    """Steps 190 to 400 on CIFAR-10, across ends of epochs, with and without `drop_last`, as computed with NumPy 2.4."""
    examples = np.arange(50_000, dtype=np.int32)
    for drop_last, expected in ((False, "62c213999cffe8f7"), (True, "50cb10fbf790f913")):
        index, epoch = indices(7, examples, 256, 190, 400, drop_last)
        digest = hashlib.sha256(index.astype("<i4").tobytes() + epoch.astype("<i4").tobytes()).hexdigest()
        assert digest[:16] == expected


SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def runs(draw):
    """Draw the positions of the examples of a split, a batch size and a number of epochs, which may be fractional."""
    size = draw(st.integers(1, 300))
    first = draw(st.integers(0, 10**6))
    batch_size = draw(st.integers(1, size))
    return np.arange(first, first + 3 * size, 3, dtype=np.int32), batch_size, draw(st.floats(0.01, 4))


@given(runs(), SEEDS)
def test_every_epoch_contains_every_example_once(run, seed):
    examples, batch_size, epochs = run
    steps = order.total_steps(epochs, len(examples), batch_size)
    index, epoch = indices(seed, examples, batch_size, 0, steps)
    assert index.shape == epoch.shape == (steps, batch_size)
    assert (np.diff(epoch.ravel()) >= 0).all()
    for e in range(int(index.size // len(examples))):
        assert sorted(index[epoch == e]) == examples.tolist()
    rest = index[epoch == index.size // len(examples)].tolist()
    assert len(set(rest)) == len(rest) == index.size % len(examples)
    assert index.size - epochs * len(examples) < batch_size  # only the last batch may exceed `epochs`


@given(runs(), SEEDS)
def test_no_example_repeats_within_an_epoch_with_drop_last(run, seed):
    examples, batch_size, epochs = run
    steps = order.total_steps(epochs, len(examples), batch_size, drop_last=True)
    index, epoch = indices(seed, examples, batch_size, 0, steps, drop_last=True)
    whole = len(examples) // batch_size
    assert (epoch == (np.arange(steps) // whole)[:, None]).all()
    for e in range(-(-steps // whole)):
        shown = index[epoch == e].tolist()
        assert len(set(shown)) == len(shown) <= order.epoch_images(len(examples), batch_size, drop_last=True)
        assert set(shown) <= set(examples.tolist())


@given(runs(), SEEDS, st.booleans(), st.data())
def test_a_later_start_continues_the_same_order(run, seed, drop_last, data):
    examples, batch_size, epochs = run
    steps = order.total_steps(epochs, len(examples), batch_size, drop_last)
    start = data.draw(st.integers(0, steps))
    whole = indices(seed, examples, batch_size, 0, steps, drop_last)
    late = indices(seed, examples, batch_size, start, steps, drop_last)
    for full, tail in zip(whole, late, strict=True):
        np.testing.assert_array_equal(full[start:], tail)


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_drop_last_ends_each_epoch_with_its_last_full_batch(size, batch_size):
    examples = np.arange(100, 100 + size, dtype=np.int32)
    per_epoch = size // batch_size
    steps = order.total_steps(3, size, batch_size, drop_last=True)
    assert steps == 3 * per_epoch
    index, epoch = indices(5, examples, batch_size, 0, steps, drop_last=True)
    assert epoch.tolist() == [[e] * batch_size for e in range(3) for _ in range(per_epoch)]
    for e in range(3):
        shown = index[epoch == e].tolist()
        assert shown == examples[order.permutation(5, e, size)][: per_epoch * batch_size].tolist()
        assert len(set(shown)) == order.epoch_images(size, batch_size, drop_last=True)
    late = indices(5, examples, batch_size, steps - 1, steps, drop_last=True)
    np.testing.assert_array_equal(late[0], index[-1:])


def test_each_seed_and_epoch_has_its_own_order():
    orders = {tuple(order.permutation(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_uniform():
    """Each example is at each position about equally often (chi-squared, 9 degrees of freedom per example)."""
    counts = np.zeros((10, 10))
    for epoch in range(5000):
        counts[np.arange(10), order.permutation(3, epoch, 10)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert 40 < chi_squared < 140  # mean 81, standard deviation 12.7


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_validation_examples_are_not_in_the_train_part(fraction):
    train, validation = order.split_validation(1000, fraction)
    assert len(validation) == 1000 * fraction
    assert sorted([*train, *validation]) == list(range(1000))
    again = order.split_validation(1000, fraction)
    np.testing.assert_array_equal(validation, again[1])


def test_total_steps_rounds_up():
    assert order.total_steps(16, 50_000, 256) == 3125
    assert order.total_steps(1, 101, 100) == 2
    assert order.total_steps(0.5, 100, 10) == 5
