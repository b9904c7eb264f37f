"""The files of a study: trial.json in the folder of each trial, and the list of settings in study.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cifar_flax import files
from cifar_flax.errors import ConfigError, require
from cifar_flax.study.space import Setting

RUNS = "runs"  # folder of the trials
STUDY = "study.json"
TRIAL = "trial.json"
FINISHED, DIVERGED, PRUNED = "finished", "diverged", "pruned"
_LOCK = ".study.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The content of trial.json, which is written when a trial has ended."""

    status: str  # finished | diverged | pruned
    reason: str = ""  # of a trial that is not finished
    operations: int = 0  # floating-point operations of the training and of the final evaluation
    validation: Mapping[str, Any] | None = None  # evaluation on the validation split, as in eval.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of a study and the names of their trials, which study.json also lists."""

    split: str  # that settings are compared on: validation, or the evaluation split
    settings: dict[str, list[str]] = field(default_factory=dict)  # name -> names of the trials
    values: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> values of the fields that vary

    @classmethod
    def of(cls, split: str, settings: Sequence[Setting], seeds: Sequence[int]) -> "Plan":
        return cls(
            split=split,
            settings={one.name: [one.trial(seed).name for seed in seeds] for one in settings},
            values={one.name: one.values for one in settings},
        )


def read_record(folder: Path) -> Record | None:
    """Return the record of the trial in `folder`, or None if it has not ended. Raise `ConfigError` if it is damaged."""
    try:
        return Record(**files.read_json(folder / TRIAL))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        allowed = f"its {TRIAL} is damaged; remove this file, and the study evaluates the trial again"
        raise ConfigError(f"PATH={str(folder)!r}: {allowed}") from error


def write_record(folder: Path, record: Record) -> None:
    files.write_json(folder / TRIAL, asdict(record))


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of the study in `folder`, or None if it holds no study. Raise `ConfigError` if it is damaged."""
    try:
        content = files.read_json(folder / STUDY)
        settings = {one["name"]: [trial["name"] for trial in one["trials"]] for one in content["settings"]}
        values: dict[str, Mapping[str, Any]] = {one["name"]: dict(one["values"]) for one in content["settings"]}
        return Plan(split=str(content["split"]), settings=settings, values=values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        allowed = f"its {STUDY} is damaged; remove it, and start the study again: finished trials are kept"
        raise ConfigError(f"PATH={str(folder)!r}: {allowed}") from error


def update_plan(folder: Path, plan: Plan) -> Plan:
    """Add to `plan` the settings of the study in `folder` that have a trial, write it, and return it.

    Processes that share the study take turns.
    """
    with files.locked(folder / _LOCK, wait=True):
        before = read_plan(folder) or plan
        names = {
            name: [trial for trial in trials if (folder / RUNS / trial).exists()]
            for name, trials in before.settings.items()
        }
        settings = {name: trials for name, trials in names.items() if trials} | plan.settings
        for name, trials in plan.settings.items():
            settings[name] = list(dict.fromkeys([*names.get(name, []), *trials]))
        merged = Plan(split=plan.split, settings=settings, values=before.values | plan.values)
        content = [
            {"name": name, "values": merged.values[name], "trials": [{"name": trial} for trial in trials]}
            for name, trials in settings.items()
        ]
        files.write_json(folder / STUDY, {"split": plan.split, "settings": content})
    return merged


def require_new(folder: Path) -> None:
    """Raise `ConfigError` if `folder` holds a run, not a study."""
    allowed = "holds a run; choose another folder for the study"
    require(not (folder / "config.json").exists(), "--workdir", str(folder), allowed)
