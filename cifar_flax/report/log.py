"""metrics.jsonl as columns of numbers."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

COLUMNS = ("loss", "accuracy", "learning_rate", "images_per_second", "input_wait_fraction", "skipped_steps")
_LARGEST = float(np.finfo(np.float32).max)  # what a run computes is below


@dataclass(frozen=True, slots=True)
class Lines:
    """Those of one split, by epoch. What a line does not tell, and what is no finite number, is NaN."""

    epoch: Float[np.ndarray, " lines"]
    columns: dict[str, Float[np.ndarray, " lines"]]  # of `COLUMNS`

    def __getitem__(self, column: str) -> Float[np.ndarray, " lines"]:
        return self.columns[column]

    def median(self, column: str) -> float | None:
        values = self[column][~np.isnan(self[column])]
        return float(np.median(values)) if len(values) else None


@dataclass(frozen=True, slots=True)
class Log:
    splits: dict[str, Lines]  # in the order of their first lines

    @property
    def train(self) -> Lines | None:
        return self.splits.get("train")

    @property
    def monitored(self) -> str | None:
        """The split that was evaluated while training, the last where there are several."""
        return next((split for split in reversed(self.splits) if split != "train"), None)

    @property
    def epochs(self) -> float:
        return max((float(lines.epoch[-1]) for lines in self.splits.values()), default=0.0)


def read_log(path: Path) -> Log:
    """All lines that a run has written; others are left out, and there need not be a file. Raises `OSError`."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for record in _records(path):
        epoch, split = _number(record.get("epoch")), record.get("split")
        if isinstance(split, str) and epoch >= 0:
            rows.setdefault(split, []).append((epoch, *(_number(record.get(name)) for name in COLUMNS)))
    splits = {}
    for split, values in rows.items():
        array = np.array(values)
        epoch, *columns = array[np.argsort(array[:, 0], kind="stable")].T
        splits[split] = Lines(epoch, dict(zip(COLUMNS, columns, strict=True)))
    return Log(splits)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # half a line of a run that is at work, or what a run never wrote
                continue
            if isinstance(record, dict):
                yield record


def _number(value: Any) -> float:
    """NaN for what is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _LARGEST else math.nan
