"""The metrics and the settings of a run, as text."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from cifar_flax import files
from cifar_flax.errors import require
from cifar_flax.report.charts import number
from cifar_flax.report.log import Log
from cifar_flax.report.page import NOTHING, percent
from cifar_flax.training import metrics

Result = Mapping[str, Any]  # what eval.json holds

_METRICS = ("accuracy", "num_examples", "loss", "top5_accuracy", "expected_calibration_error")


def read_result(folder: Path) -> Result | None:
    """Return eval.json of the run in `folder`, or None if there is none yet. Raises `ConfigError` if it is damaged."""
    path = folder / "eval.json"
    if not path.exists():
        return None
    try:
        result = files.read_json(path)
        values = [result[name] for name in _METRICS]
        values += [row[name] for row in result["per_class"].values() for name in ("recall", "f1")]
        fits = all(map(math.isfinite, values)) and 0 <= result["accuracy"] <= 1 and result["num_examples"] >= 1
        fits = fits and isinstance(result["dataset"], str) and isinstance(result["split"], str)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        fits = False
    require(fits, "PATH", str(folder), "its eval.json is damaged; --mode=eval writes it again")
    return result


def correct(result: Result) -> int:
    return round(result["accuracy"] * result["num_examples"])


def interval(result: Result) -> str:
    """Return the 95 % confidence interval of the accuracy, such as "74.64 to 76.33 %"."""
    low, high = metrics.wilson_interval(correct(result), result["num_examples"])
    return f"{100 * low:.2f} to {percent(high)}"


def comparable(result: Result, other: Result) -> bool:
    """Return whether both have the same data set, split and number of examples."""
    return all(result[name] == other[name] for name in ("dataset", "split", "num_examples"))


def difference(result: Result, reference: Result) -> str:
    """Return the difference of the accuracies in percentage points ± its standard error (for independent images)."""
    variances = [r["accuracy"] * (1 - r["accuracy"]) / r["num_examples"] for r in (result, reference)]
    points = 100 * (result["accuracy"] - reference["accuracy"])
    sign = "\u2212" if points < 0 else "+"
    return f"{sign}{abs(points):.2f} ± {100 * math.sqrt(sum(variances)):.2f}"


def epochs(log: Log) -> str:
    return number(round(max(float(lines.epoch[-1]) for lines in log.splits.values()), 2)) if log.splits else NOTHING


def training_rate(log: Log) -> str:
    """Return images per second, the median of the log's lines."""
    rate = log.training_median("images_per_second")
    return NOTHING if rate is None else f"{rate:,.0f}"


def settings(config: dict[str, Any]) -> dict[str, str]:
    """Return path -> value of every setting, such as "optim.learning_rate" -> "0.001"."""
    flat = traverse_util.flatten_dict(config, sep=".")
    return {path: '""' if value == "" else str(value) for path, value in flat.items()}
