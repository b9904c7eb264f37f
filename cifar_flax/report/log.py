"""metrics.jsonl as columns of numbers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Columns of one split, sorted by epoch: missing values, and those that are not finite numbers, are NaN.
Lines = np.recarray

_COLUMNS = ("epoch", "loss", "accuracy", "learning_rate", "images_per_second", "input_wait_fraction", "skipped_steps")
_LARGEST = float(np.finfo(np.float32).max)  # runs compute in float32


@dataclass(frozen=True, slots=True)
class Log:
    splits: dict[str, Lines]  # in the order of their first lines

    @property
    def train(self) -> Lines | None:
        return self.splits.get("train")

    @property
    def monitored(self) -> str | None:
        """The split that was evaluated while training; the last one if there are several."""
        return next((split for split in reversed(self.splits) if split != "train"), None)

    def training_median(self, column: str) -> float | None:
        """Return the median of the finite values in the training lines; None if there are none."""
        values = np.array([]) if self.train is None else self.train[column]
        return None if np.all(np.isnan(values)) else float(np.nanmedian(values))


def read_log(path: Path) -> Log:
    """Return the lines that a run has logged; skip others. There need not be a file. Raises `OSError`."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that is still writing, or not this program's
            continue
        if isinstance(record, dict) and isinstance(record.get("split"), str):
            values = tuple(_number(record.get(column)) for column in _COLUMNS)
            if values[0] >= 0:  # not NaN
                rows.setdefault(record["split"], []).append(values)
    dtype = [(column, float) for column in _COLUMNS]
    ordered = {split: sorted(values, key=lambda row: row[0]) for split, values in rows.items()}
    return Log({split: np.array(values, dtype).view(np.recarray) for split, values in ordered.items()})


def _number(value: Any) -> float:
    """Return NaN for anything but a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _LARGEST else math.nan
