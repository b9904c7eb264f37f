"""Means over seeds with confidence intervals, and the differences of settings."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from jaxtyping import Float

from cifar_flax import packages

LEVEL = 0.95  # of all intervals
RESOLUTION = 0.001  # difference of accuracies, as a fraction, that `Difference.more_seeds` settles
_NOISE = 1e-9  # standard deviations below it are rounding errors
MOST_SEEDS = 10**6  # that `Difference.more_seeds` returns


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of `count` values; for a single value, the others are None, for equal ones, the interval."""

    count: int
    mean: float
    std: float | None  # sample standard deviation
    low: float | None  # of the 95 % confidence interval of the mean
    high: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of one setting minus that of another.

    The others are None if there are too few seeds, or if the values do not vary.
    """

    first: str
    second: str
    mean: float  # of the differences at shared seeds if they are paired
    low: float | None = None  # of the confidence interval, corrected for the number of comparisons
    high: float | None = None
    p: float | None = None  # two-sided, corrected likewise
    method: str = ""  # paired | Welch
    count: int | None = None  # shared seeds, if paired
    more_seeds: int | None = None  # seeds to add to both until the half-width of the interval is at most RESOLUTION


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of `values` with its interval by Student's t-distribution (Student 1908)."""
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Mean(count, mean, None, None, None)
    std = float(np.std(values, ddof=1))
    if std < _NOISE:
        return Mean(count, mean, 0.0, None, None)
    half = _quantile(count - 1, 1) * std / math.sqrt(count)
    return Mean(count, mean, std, mean - half, mean + half)


def differences(samples: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """Return the differences of all pairs of settings; `samples` has seed -> value for each setting.

    A pair that shares at least two seeds is compared by Student's t-test of the differences at these seeds, another one
    by Welch's t-test. Intervals and p-values are corrected by the number of pairs (Bonferroni): with a probability of
    95 %, all intervals hold.

    Source: Welch 1947, "The Generalization of 'Student's' Problem when Several Different Population Variances are
    Involved"; Dunn 1961, "Multiple Comparisons Among Means" (the correction).
    """
    pairs = list(itertools.combinations(samples, 2))
    return [_difference(first, second, samples, len(pairs)) for first, second in pairs]


def _difference(first: str, second: str, samples: Mapping[str, Mapping[int, float]], comparisons: int) -> Difference:
    ours, theirs = samples[first], samples[second]
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) >= 2:
        groups = [np.array([ours[seed] - theirs[seed] for seed in shared])]
        mean = float(np.mean(groups[0]))
    else:
        groups = [np.array(list(values.values())) for values in (ours, theirs)]
        mean = float(np.mean(groups[0]) - np.mean(groups[1]))
    counts = [len(group) for group in groups]
    if min(counts) < 2:
        return Difference(first, second, mean)
    variances = [_variance(group) for group in groups]
    error, freedom = _error(variances, counts)
    if error == 0:
        return Difference(first, second, mean)
    half = _quantile(freedom, comparisons) * error
    return Difference(
        first,
        second,
        mean,
        low=mean - half,
        high=mean + half,
        p=min(1.0, comparisons * _p(abs(mean) / error, freedom)),
        method="paired" if len(groups) == 1 else "Welch",
        count=len(shared) if len(groups) == 1 else None,
        more_seeds=_more_seeds(variances, counts, comparisons),
    )


def _variance(values: Float[np.ndarray, " n"]) -> float:
    """Return the sample variance, and 0 if only rounding differs."""
    std = float(np.std(values, ddof=1))
    return std**2 if std > _NOISE else 0.0


def _error(variances: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a mean, or of the difference of two, and its degrees of freedom."""
    parts = [variance / count for variance, count in zip(variances, counts, strict=True)]
    squares = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return math.sqrt(sum(parts)), sum(parts) ** 2 / squares if squares else min(counts) - 1.0


def _more_seeds(variances: Sequence[float], counts: Sequence[int], comparisons: int) -> int:
    """Return the smallest number of seeds to add to each setting for an interval as narrow as `RESOLUTION`.

    It is at most `MOST_SEEDS`.
    """

    def is_enough(more: int) -> bool:
        error, freedom = _error(variances, [count + more for count in counts])
        return _quantile(freedom, comparisons) * error <= RESOLUTION

    if is_enough(0):
        return 0
    low, high = 0, 1
    while not is_enough(high):
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return MOST_SEEDS
    while high - low > 1:  # is_enough(high), and not is_enough(low)
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return min(high, MOST_SEEDS)


def _quantile(freedom: float, comparisons: int) -> float:
    """Return the factor of the standard error that is the half-width of an interval."""
    return float(_special().stdtrit(freedom, 1 - (1 - LEVEL) / 2 / comparisons))


def _p(t: float, freedom: float) -> float:
    return float(2 * _special().stdtr(freedom, -t))


@functools.cache
def _special() -> ModuleType:
    return packages.load("scipy")
