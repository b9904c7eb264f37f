"""Means over seeds with confidence intervals, and the differences of settings."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cifar_flax import packages

LEVEL = 0.95  # of all intervals
RESOLUTION = 0.001  # difference of accuracies, as a fraction, that `Difference.more_seeds` settles
MOST_SEEDS = 10**6  # that `Difference.more_seeds` returns


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of `count` values; the others are None for a single value."""

    count: int
    mean: float
    std: float | None  # sample standard deviation
    low: float | None  # of the 95 % confidence interval of the mean
    high: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of one setting minus that of another. The others are None if one of them has a single value."""

    first: str
    second: str
    mean: float
    low: float | None = None  # of the confidence interval, corrected for the number of comparisons
    high: float | None = None
    p: float | None = None  # two-sided, corrected likewise; None also if all differences are equal
    method: str = ""  # paired | Welch
    more_seeds: int | None = None  # seeds to add to both until the half-width of the interval is at most RESOLUTION


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of `values` with its interval by Student's t-distribution (Student 1908)."""
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Mean(count, mean, None, None, None)
    std = float(np.std(values, ddof=1))
    half = _quantile(count - 1, 1) * std / math.sqrt(count)
    return Mean(count, mean, std, mean - half, mean + half)


def differences(samples: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """Return the differences of all pairs of settings; `samples` has seed -> value for each setting.

    A pair with equal seeds is compared by Student's t-test of the differences at each seed, another one by Welch's
    t-test. Intervals and p-values are corrected by the number of pairs (Bonferroni): with a probability of 95 %, all
    intervals hold.

    Source: Welch 1947, "The Generalization of 'Student's' Problem when Several Different Population Variances are
    Involved"; Dunn 1961, "Multiple Comparisons Among Means" (the correction).
    """
    pairs = list(itertools.combinations(samples, 2))
    return [_difference(first, second, samples, len(pairs)) for first, second in pairs]


def _difference(first: str, second: str, samples: Mapping[str, Mapping[int, float]], comparisons: int) -> Difference:
    ours, theirs = samples[first], samples[second]
    a, b = (np.array(list(values.values())) for values in (ours, theirs))
    mean = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return Difference(first, second, mean)
    is_paired = ours.keys() == theirs.keys()
    if is_paired:
        variances = [float(np.var([ours[seed] - theirs[seed] for seed in ours], ddof=1))]
        counts = [len(ours)]
    else:
        variances, counts = [float(np.var(values, ddof=1)) for values in (a, b)], [len(a), len(b)]
    error, freedom = _error(variances, counts)
    half = _quantile(freedom, comparisons) * error
    p = min(1.0, comparisons * _p(abs(mean) / error, freedom)) if error else None
    more = min(_seeds(variances, comparisons, max(counts)) - max(counts), MOST_SEEDS)
    method = "paired" if is_paired else "Welch"
    return Difference(first, second, mean, mean - half, mean + half, p, method, more)


def _error(variances: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a mean, or of the difference of two, and its degrees of freedom."""
    parts = [variance / count for variance, count in zip(variances, counts, strict=True)]
    squares = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return math.sqrt(sum(parts)), sum(parts) ** 2 / squares if squares else min(counts) - 1.0


def _seeds(variances: Sequence[float], comparisons: int, count: int) -> int:
    """Return the smallest number of seeds from `count` on whose interval is as narrow as `RESOLUTION`."""

    def is_enough(number: int) -> bool:
        error, freedom = _error(variances, [number] * len(variances))
        return _quantile(freedom, comparisons) * error <= RESOLUTION

    low, high = count - 1, count
    while not is_enough(high):
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return count + MOST_SEEDS
    while high - low > 1:  # is_enough(high), and not is_enough(low)
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _quantile(freedom: float, comparisons: int) -> float:
    """Return the factor of the standard error that is the half-width of an interval."""
    return float(_special().stdtrit(freedom, 1 - (1 - LEVEL) / 2 / comparisons))


def _p(t: float, freedom: float) -> float:
    return float(2 * _special().stdtr(freedom, -t))


@functools.cache
def _special() -> ModuleType:
    return packages.load("scipy")
