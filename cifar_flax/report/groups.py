"""Runs to compare, in groups of runs that differ only in the seed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_flax.report import charts, results
from cifar_flax.report.log import Log
from cifar_flax.report.results import Result
from cifar_flax.report.statistics import Difference, Mean, differences, mean_of

UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    name: str
    folder: Path
    seed: str
    setting: str = ""  # of a trial of a study
    settings: Mapping[str, str]
    log: Log
    result: Result | None  # content of eval.json, or the evaluation on the validation split; None: not finished
    status: str = ""  # finished | unfinished or, of a trial, also diverged | pruned | failed
    seconds: float | None = None  # of training
    operations: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in the seed: the seeds of a setting. A single run is a group, too."""

    key: str  # letter or number that identifies the group on the page
    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result]

    @property
    def result(self) -> Result | None:
        """Return the result of the first finished run, for the properties that all runs share."""
        return next((run.result for run in self.runs if run.result), None)

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """Return the known values of `of` in the finished runs."""
        return [value for run in self.finished if (value := of(run)) is not None]

    def metric(self, name: str) -> Mean | None:
        """Return the mean of a metric of the results, or None if no run has it."""
        found = self.values(lambda run: (run.result or {}).get(name))
        return mean_of(found) if found else None

    def accuracies(self) -> dict[int, float]:
        """Return seed -> accuracy."""
        return {int(run.seed): run.result["accuracy"] for run in self.finished if run.result and run.seed.isdecimal()}


def have_seeds(groups: Sequence[Group]) -> bool:
    """Return whether a group has several runs, so that means and their intervals are compared."""
    return any(len(group.runs) > 1 for group in groups)


def have_trials(groups: Sequence[Group]) -> bool:
    """Return whether a group has several runs or trials of a study, so that the page lists the runs."""
    return have_seeds(groups) or any(run.setting for group in groups for run in group.runs)


def all_differences(groups: Sequence[Group]) -> list[Difference]:
    """Return the differences of all pairs of groups with a finished run, by their keys.

    They are those evaluated on the same images as the first one.
    """
    first = next((group.result for group in groups if group.result), None)
    same = [group for group in groups if group.result and first and results.comparable(group.result, first)]
    return differences({group.key: found for group in same if (found := group.accuracies())})


def line(group: Group, split: Callable[[Log], str | None], column: str, style: int) -> charts.Line | None:
    """Return the curve of a column of metrics.jsonl: of several runs, the mean, with a band of ± one std.

    The curve ends where the first of the runs ends; runs that have not finished count only if none has. Return None if
    no value was logged.
    """
    logs = [run.log for run in group.finished or group.runs]
    chosen = [log.splits[name] for log in logs if (name := split(log)) in log.splits and name is not None]
    logged = [lines for lines in chosen if column in (lines.dtype.names or ())]
    if not logged:
        return None
    if len(logged) == 1:
        return charts.Line(group.key, logged[0].epoch, logged[0][column], style)
    epochs = [np.round(lines.epoch, 9) for lines in logged]
    shared = epochs[0][np.isin(epochs[0], list(set.intersection(*(set(one.tolist()) for one in epochs))))]
    rows = [lines[column][np.searchsorted(one, shared)] for one, lines in zip(epochs, logged, strict=True)]
    mean, std = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
    return charts.Line(group.key, shared, mean, style, std)


def keyed(groups: Sequence[Group]) -> list[Group]:
    """Return `groups` with the keys A, B, ... or, of more than 26, 1, 2, ..."""
    letters = [chr(ord("A") + i) for i in range(26)]
    keys = letters if len(groups) <= 26 else [str(i + 1) for i in range(len(groups))]
    return [dataclasses.replace(group, key=key) for key, group in zip(keys, groups, strict=False)]
