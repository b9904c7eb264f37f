"""Read metrics.jsonl into columns of numbers."""

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Columns of one split, sorted by epoch. Missing values and values that are not finite numbers are NaN.
Lines = np.recarray

_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "accuracy",
    "learning_rate",
    "images_per_second",
    "input_wait_fraction",
    "skipped_steps",
)
_NOT_METRICS = {*_COLUMNS, "checkpoint_blocked_seconds"}
_LARGEST = float(np.finfo(np.float32).max)  # runs compute in float32


@dataclass(frozen=True, slots=True)
class Log:
    splits: dict[str, Lines]  # in the order of their first lines in the file
    others: tuple[str, ...] = ()  # columns of all splits for metrics besides loss and accuracy

    @property
    def train(self) -> Lines | None:
        return self.splits.get("train")

    @property
    def monitored(self) -> str | None:
        """Return the split that was evaluated during training, or the last one if there are several."""
        return next((split for split in reversed(self.splits) if split != "train"), None)

    def training_median(self, column: str) -> float | None:
        """Return the median of the finite values in the training lines, or None if there are none."""
        values = np.array([]) if self.train is None else self.train[column]
        return None if np.all(np.isnan(values)) else float(np.nanmedian(values))


def read_log(path: Path) -> Log:
    """Return the log of a run, without invalid lines; it is empty if there is no file.

    Raise `OSError` if the file cannot be read.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    others: dict[str, None] = {}  # an ordered set
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # an unfinished last line of a run in progress, or a foreign line
            continue
        fits = isinstance(record, dict) and isinstance(record.get("split"), str)
        if fits and _number(record.get("epoch")) >= 0:  # not NaN
            rows.setdefault(record["split"], []).append(record)
            numbers = [name for name, value in record.items() if not math.isnan(_number(value))]
            others |= dict.fromkeys(name for name in numbers if name.isidentifier() and name not in _NOT_METRICS)
    columns = (*_COLUMNS, *others)
    splits = {}
    for split, records in rows.items():
        ordered = sorted(records, key=operator.itemgetter("epoch"))
        values = [tuple(_number(record.get(column)) for column in columns) for record in ordered]
        splits[split] = np.array(values, [(column, float) for column in columns]).view(np.recarray)
    return Log(splits, tuple(others))


def _number(value: Any) -> float:
    """Return `value` as a float, or NaN if it is not a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _LARGEST else math.nan
