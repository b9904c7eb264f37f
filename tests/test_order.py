import numpy as np
import pytest

from cifar_flax.data import order

SIZES = [(1, 1), (7, 3), (10, 10), (50, 8), (1442, 64)]


def test_permutation_is_pinned():
    """The order must survive library upgrades: a run is resumed with whatever NumPy is installed then."""
    assert order.permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order.permutation(1, 2, 10).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_every_epoch_holds_every_example_once(size, batch_size):
    examples = np.arange(100, 100 + size, dtype=np.int32)
    steps = order.total_steps(3, size, batch_size)
    index, epoch = order.positions(5, examples, batch_size, 0, steps)
    assert index.shape == epoch.shape == (steps, batch_size)
    for e in range(3):
        assert sorted(index[epoch == e]) == examples.tolist()
    assert index.size - 3 * size < batch_size  # nothing is dropped, and only the last batch runs on


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_starting_late_gives_the_tail(size, batch_size):
    examples = np.arange(size, dtype=np.int32)
    steps = order.total_steps(4, size, batch_size)
    whole = order.positions(1, examples, batch_size, 0, steps)
    for start in {0, 1, steps // 2, steps - 1}:
        late = order.positions(1, examples, batch_size, start, steps)
        for all_of_it, tail in zip(whole, late, strict=True):
            np.testing.assert_array_equal(all_of_it[start:], tail)


@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_epochs_may_end_with_their_last_whole_batch(size, batch_size):
    examples = np.arange(100, 100 + size, dtype=np.int32)
    per_epoch = size // batch_size
    steps = order.total_steps(3, size, batch_size, drop_last=True)
    assert steps == 3 * per_epoch
    index, epoch = order.positions(5, examples, batch_size, 0, steps, drop_last=True)
    assert epoch.tolist() == [[e] * batch_size for e in range(3) for _ in range(per_epoch)]
    for e in range(3):
        shown = index[epoch == e].tolist()
        assert shown == examples[order.permutation(5, e, size)][: per_epoch * batch_size].tolist()
        assert len(set(shown)) == order.epoch_images(size, batch_size, drop_last=True)
    late = order.positions(5, examples, batch_size, steps - 1, steps, drop_last=True)
    np.testing.assert_array_equal(late[0], index[-1:])


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(order.permutation(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_uniform():
    """Each example stands at each place about equally often (chi-squared, 9 degrees of freedom per example)."""
    counts = np.zeros((10, 10))
    for epoch in range(5000):
        counts[np.arange(10), order.permutation(3, epoch, 10)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert 40 < chi_squared < 140  # mean 81, standard deviation 12.7


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_held_out_examples_are_apart(fraction):
    train, validation = order.split_validation(1000, fraction)
    assert len(validation) == 1000 * fraction
    assert sorted([*train, *validation]) == list(range(1000))
    again = order.split_validation(1000, fraction)
    np.testing.assert_array_equal(validation, again[1])


def test_total_steps_rounds_up():
    assert order.total_steps(16, 50_000, 256) == 3125
    assert order.total_steps(1, 101, 100) == 2
    assert order.total_steps(0.5, 100, 10) == 5
