"""The content of study.json."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cifar_flax.report import comparison, groups
from cifar_flax.report.groups import Group, Run
from cifar_flax.report.statistics import LEVEL, Difference
from cifar_flax.study.record import Plan
from cifar_flax.telemetry.scalars import scalars


def study(compared: Sequence[Group], pairs: Sequence[Difference], plan: Plan) -> dict[str, Any]:
    """Return the plan, and the numbers of the page, each with its split."""
    by_name = {group.runs[0].setting: group for group in compared}
    names = {group.key: name for name, group in by_name.items()}
    splits = {group.key: group.result["split"] for group in compared if group.result}
    return {
        "on_test": plan.on_test,
        "confidence": LEVEL,
        "correction": f"Bonferroni, {len(pairs)} comparisons",
        "settings": [
            {"name": name, "values": plan.values[name], **_setting(by_name.get(name))}
            | {"trials": [_trial(trial, by_name.get(name)) for trial in trials]}
            for name, trials in plan.settings.items()
        ],
        "differences": [
            dataclasses.asdict(pair)
            | {"first": names[pair.first], "second": names[pair.second], "split": splits[pair.first]}
            for pair in pairs
        ],
    }


def _setting(group: Group | None) -> dict[str, Any]:
    if group is None or group.result is None:
        return {}
    split = group.result["split"]
    content: dict[str, Any] = {"key": group.key, "dataset": group.result["dataset"], "split": split}
    for metric in scalars(group.result):
        if mean := group.metric(metric):
            content[metric] = {"split": split, **dataclasses.asdict(mean)}
    content["per_class"] = {
        name: {column: comparison.of_class(group, name, column) for column in ("recall", "f1")}
        for name in group.result["per_class"]
    }
    for field, values in (
        ("operations", group.values(lambda run: run.operations)),
        ("training_seconds", group.values(lambda run: run.seconds)),
    ):
        content[field] = float(np.mean(values)) if values else None
    content["curves"] = [
        curve
        for column in ("accuracy", "loss")
        for split in dict.fromkeys((group.finished[0].log.monitored, "train"))
        if split and (curve := _curve(group, split, column))
    ]
    return content


def _curve(group: Group, split: str, column: str) -> dict[str, Any]:
    """Return the mean of a column of metrics.jsonl over the seeds at each epoch; empty if it was not logged."""
    line = groups.line(group, lambda log: split, column, 0)
    if line is None:
        return {}
    std = None if line.half_width is None else _list(line.half_width)
    return {"split": split, "metric": column, "epoch": _list(line.x), "mean": _list(line.y), "std": std}


def _list(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _trial(name: str, group: Group | None) -> dict[str, Any]:
    run: Run | None = next((one for one in group.runs if one.folder.name == name), None) if group else None
    if run is None:
        return {"name": name, "status": "not started"}
    result: Mapping[str, Any] = run.result or {}
    return {
        "name": name,
        "seed": int(run.seed),
        "status": run.status,
        "split": result.get("split"),
        "accuracy": result.get("accuracy"),
        "loss": result.get("loss"),
        "operations": run.operations,
        "training_seconds": run.seconds,
    }
