import itertools

import numpy as np
import pytest
import scipy.stats

from cifar_flax.report import statistics

RNG = np.random.default_rng(0)
SAMPLES = {name: dict(enumerate(RNG.normal(0.9 + i / 1000, 0.002, 5))) for i, name in enumerate("abc")}


def test_a_mean_has_the_interval_of_students_t_distribution():
    values = list(SAMPLES["a"].values())
    found = statistics.mean_of(values)
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert (found.count, found.mean, found.std) == pytest.approx((5, np.mean(values), np.std(values, ddof=1)))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert statistics.mean_of([0.5]) == statistics.Mean(1, 0.5, None, None, None)


def test_settings_with_equal_seeds_are_compared_by_pairs():
    pairs = statistics.differences(SAMPLES)
    assert [(pair.first, pair.second) for pair in pairs] == list(itertools.combinations("abc", 2))
    for pair in pairs:
        test = scipy.stats.ttest_rel(list(SAMPLES[pair.first].values()), list(SAMPLES[pair.second].values()))
        low, high = test.confidence_interval(1 - 0.05 / 3)
        assert pair.method == "paired"
        assert (pair.low, pair.high, pair.p) == pytest.approx((low, high, min(1, 3 * test.pvalue)))


def test_settings_without_shared_seeds_are_compared_by_welchs_test():
    other = {4: 0.91, 5: 0.89, 6: 0.925, 7: 0.9}  # one shared seed is too few
    (pair,) = statistics.differences({"a": SAMPLES["a"], "other": other})
    test = scipy.stats.ttest_ind(list(SAMPLES["a"].values()), list(other.values()), equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (pair.method, pair.count) == ("Welch", None)
    assert (pair.low, pair.high, pair.p) == pytest.approx((low, high, test.pvalue))


def test_seeds_that_one_setting_lacks_do_not_count_in_a_pair():
    """Without the best seed of one setting, the difference stays what it is at the other seeds."""
    ours = {0: 0.95, 1: 0.90, 2: 0.85, 3: 0.80}
    theirs = {seed: value - 0.001 - seed / 10_000 for seed, value in ours.items() if seed}
    (pair,) = statistics.differences({"a": ours, "b": theirs})
    assert (pair.method, pair.count) == ("paired", 3)
    assert pair.mean == pytest.approx(0.0012)
    assert pair.low > 0


def test_all_intervals_hold_together_in_95_of_100_studies():
    """Simulate 200 studies of four equal settings: the correction keeps wrong differences in at most one of twenty."""
    rng, wrong, wrong_alone = np.random.default_rng(1), 0, 0
    for _ in range(200):
        pairs = statistics.differences({name: dict(enumerate(rng.normal(0.9, 0.001, 6))) for name in "abcd"})
        wrong += any(pair.low > 0 or pair.high < 0 for pair in pairs)
        wrong_alone += any(pair.p < 0.05 * len(pairs) for pair in pairs)  # p-values without the correction
    assert wrong <= 10
    assert wrong_alone > 20


@pytest.mark.parametrize(
    "others", [dict(enumerate(RNG.normal(0.9, 0.004, 5))), {7: 0.9, 8: 0.91, 9: 0.905}, {9: 0.9, 10: 0.91}]
)
def test_more_seeds_are_the_fewest_that_settle_a_difference(others):
    (pair,) = statistics.differences({"a": SAMPLES["a"], "b": others})

    def half_width(more):
        if pair.method == "paired":
            n = len(others) + more
            std = np.std([SAMPLES["a"][seed] - others[seed] for seed in others], ddof=1)
            return scipy.stats.t.ppf(0.975, n - 1) * std / n**0.5
        n, m = len(SAMPLES["a"]) + more, len(others) + more
        a, b = np.var(list(SAMPLES["a"].values()), ddof=1) / n, np.var(list(others.values()), ddof=1) / m
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
        return scipy.stats.t.ppf(0.975, freedom) * (a + b) ** 0.5

    assert pair.more_seeds > 0
    assert half_width(pair.more_seeds) <= statistics.RESOLUTION < half_width(pair.more_seeds - 1)


def test_the_number_of_seeds_is_limited():
    (pair,) = statistics.differences({"a": {0: 0.1, 1: 0.9}, "b": {0: 0.9, 1: 0.1}})
    assert pair.more_seeds == statistics.MOST_SEEDS


def test_samples_without_spread_or_with_one_value_have_no_interval():
    (pair,) = statistics.differences({"a": {0: 0.9}, "b": {0: 0.8, 1: 0.7}})
    assert (pair.mean, pair.low, pair.p, pair.method) == (pytest.approx(0.15), None, None, "")
    equal = {seed: (wrong + 10) / 144 for seed, wrong in enumerate((109, 120))}
    (pair,) = statistics.differences({"a": equal, "b": {seed: value - 1 / 144 for seed, value in equal.items()}})
    assert (pair.mean, pair.low, pair.high, pair.p, pair.more_seeds) == (pytest.approx(1 / 144), *[None] * 4)
    found = statistics.mean_of([0.9, 0.9, 0.9])
    assert (found.std, found.low, found.high) == (0.0, None, None)
    assert statistics.differences({"a": {0: 0.9}}) == []
