"""Read the metrics and settings of a run, and format them as text."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from cifar_flax import files
from cifar_flax.errors import require
from cifar_flax.report import charts
from cifar_flax.report.log import Log
from cifar_flax.report.page import NOTHING, Markup, percent
from cifar_flax.telemetry.scalars import is_fraction, other_scalars, title
from cifar_flax.training import metrics

Result = Mapping[str, Any]  # content of eval.json

_METRICS = ("accuracy", "num_examples", "loss", "top5_accuracy", "expected_calibration_error")


def read_result(folder: Path) -> Result | None:
    """Return eval.json of the run in `folder`, or None if there is none yet.

    Raise `ConfigError` if it is damaged.
    """
    path = folder / "eval.json"
    if not path.exists():
        return None
    try:
        result = files.read_json(path)
    except ValueError:
        result = None
    require(is_result(result), "PATH", str(folder), "its eval.json is damaged; run --mode=eval to write it again")
    return result


def is_result(result: Any) -> bool:
    """Return whether `result` is an evaluation, as eval.json has it."""
    try:
        values = [result[name] for name in _METRICS]
        values += [row[name] for row in result["per_class"].values() for name in ("recall", "f1")]
        fits = all(map(math.isfinite, values)) and 0 <= result["accuracy"] <= 1 and result["num_examples"] >= 1
        return fits and isinstance(result["dataset"], str) and isinstance(result["split"], str)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return False


def correct(result: Result) -> int:
    return round(result["accuracy"] * result["num_examples"])


def interval(result: Result) -> str:
    """Return the 95 % confidence interval of the accuracy, such as "74.64 to 76.33 %"."""
    low, high = metrics.wilson_interval(correct(result), result["num_examples"])
    return f"{100 * low:.2f} to {percent(high)}"


def comparable(result: Result, other: Result) -> bool:
    """Return whether both results have the same dataset, split and number of images."""
    return all(result[name] == other[name] for name in ("dataset", "split", "num_examples"))


def difference(result: Result, reference: Result) -> str:
    """Return the accuracy difference in percentage points ± its standard error, assuming independent images."""
    variances = [r["accuracy"] * (1 - r["accuracy"]) / r["num_examples"] for r in (result, reference)]
    points = 100 * (result["accuracy"] - reference["accuracy"])
    sign = "\u2212" if points < 0 else "+"
    return f"{sign}{abs(points):.2f} ± {100 * math.sqrt(sum(variances)):.2f}"


def other_metrics(result: Result) -> dict[str, str]:
    """Return title -> value of the scalar metrics that not every evaluation has."""
    return {
        title(name): percent(value) if is_fraction(name) else f"{value:.4g}"
        for name, value in other_scalars(result).items()
    }


def metric_chart(name: str, lines: Sequence[charts.Line], split: str = "") -> Markup:
    """Return a chart of the metric `name`, a column of metrics.jsonl, in `split`."""
    heading = title(name)
    heading = heading[:1].upper() + heading[1:] + (f", {split}" if split else "")
    show = charts.percentage if is_fraction(name) else charts.number
    return charts.line_chart(heading, lines, show=show)


def epochs(log: Log) -> str:
    """Return the last epoch in the log."""
    last = [float(lines.epoch[-1]) for lines in log.splits.values()]
    return charts.number(round(max(last), 2)) if last else NOTHING


def training_rate(log: Log) -> str:
    """Return the training throughput in images per second: the median over the log."""
    rate = log.training_median("images_per_second")
    return NOTHING if rate is None else f"{rate:,.0f}"


def training_seconds(log: Log, batch_size: int) -> float | None:
    """Return the seconds of the training steps of a run, without evaluations, or None if they are not logged.

    A run that was interrupted counts like an uninterrupted one.
    """
    if log.train is None or not len(log.train):
        return None
    steps = np.diff(log.train.step, prepend=0.0)
    return float(np.nansum(steps * batch_size / log.train.images_per_second))


def settings(config: dict[str, Any]) -> dict[str, str]:
    """Return a flat mapping of all settings, such as {"optim.learning_rate": "0.001"}."""
    flat = traverse_util.flatten_dict(config, sep=".")
    return {path: '""' if value == "" else str(value) for path, value in flat.items()}
