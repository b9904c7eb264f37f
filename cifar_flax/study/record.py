"""The files of a study: trial.json in the folder of each trial, and the list of settings in study.json."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cifar_flax import config as configs
from cifar_flax import files
from cifar_flax.config import Config
from cifar_flax.errors import ConfigError, UserError, first_of, require
from cifar_flax.paths import local_path
from cifar_flax.study.space import Setting

RUNS = "runs"  # folder of the trials
STUDY = "study.json"
ON_TEST = "study_on_test.json"  # a later comparison on the evaluation split
TRIAL = "trial.json"
_STATUSES = FINISHED, DIVERGED, PRUNED, FAILED = "finished", "diverged", "pruned", "failed"
_LOCK = ".study.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The content of trial.json, which is written when a trial has ended."""

    status: str  # finished | diverged | pruned | failed
    reason: str = ""  # of a trial that is not finished
    operations: int = 0  # floating-point operations of the training and of the final evaluation
    validation: Mapping[str, Any] | None = None  # evaluation on the validation split, as in eval.json; None: no split


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of a study and the names of their trials, which study.json also lists."""

    on_test: bool  # whether settings are compared on the evaluation split, not on the validation split
    settings: dict[str, list[str]]  # name -> names of the trials
    values: dict[str, Mapping[str, Any]]  # name -> values of the fields that vary

    @classmethod
    def of(cls, settings: Sequence[Setting], seeds: Sequence[int], *, on_test: bool) -> "Plan":
        return cls(
            on_test=on_test,
            settings={one.name: [one.trial(seed).name for seed in seeds] for one in settings},
            values={one.name: one.values for one in settings},
        )


def read_record(folder: Path) -> Record | None:
    """Return the record of the trial in `folder`, or None if it has not ended. Raise `ConfigError` if it is damaged."""
    try:
        record = Record(**files.read_json(folder / TRIAL))
        fits = record.status in _STATUSES and isinstance(record.reason, str) and isinstance(record.operations, int)
        if not fits or not isinstance(record.validation, Mapping | None):
            raise ValueError(record)
        return record
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
        for name in itertools.chain(settings, *settings.values()):
            if Path(name).name != name:
                raise ValueError(name)
        return Plan(on_test=bool(content["on_test"]), settings=settings, values=values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        allowed = f"its {STUDY} is damaged; remove it, and start the study again: finished trials are kept"
        raise ConfigError(f"PATH={str(folder)!r}: {allowed}") from error


def update_plan(folder: Path, plan: Plan) -> None:
    """Write `plan` to study.json, with the settings and trials that it lists already."""
    with files.locked(folder / _LOCK, wait=True):
        before = read_plan(folder) or plan
        settings = before.settings | plan.settings
        for name in settings:
            known = (*before.settings.get(name, ()), *plan.settings.get(name, ()))
            settings[name] = list(dict.fromkeys(known))
        values = before.values | plan.values
        content = [
            {"name": name, "values": values[name], "trials": [{"name": trial} for trial in trials]}
            for name, trials in settings.items()
        ]
        files.write_json(folder / STUDY, {"on_test": plan.on_test, "settings": content})


def write_results(folder: Path, content: dict[str, Any]) -> None:
    """Write study.json, with the settings that another process has added since the plan of `content` was read."""
    with files.locked(folder / _LOCK, wait=True):
        names = {one["name"] for one in content["settings"]}
        now = files.read_json(folder / STUDY)["settings"]
        files.write_json(
            folder / STUDY, content | {"settings": [*content["settings"], *(o for o in now if o["name"] not in names)]}
        )


def require_usable(folder: Path, config: Config) -> None:
    """Raise `ConfigError` if `folder` cannot be the folder of a study with the data of `config`."""
    allowed = "holds a run; choose another folder for the study"
    require(not (folder / "config.json").exists(), "--workdir", str(folder), allowed)
    if config.data.folder:
        data, here = local_path("data.folder", config.data.folder).resolve(), folder.resolve()
        allowed = "must not be inside data.folder, whose folders are classes; choose another folder"
        require(data not in (here, *here.parents), "--workdir", str(folder), allowed)


def make_folder(folder: Path) -> None:
    """Create `folder` if it does not exist. Raise `UserError` if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--workdir={str(folder)!r}"
        raise UserError(f"{where}: cannot be used as the folder of a study: {error.strerror}") from error


def require_same_config(folder: Path, config: Config) -> None:
    """Raise `ConfigError` if the trial in `folder` has another config, also in settings that a run may change."""
    try:
        saved = configs.shared(configs.from_dict(files.read_json(folder / "config.json")))
    except (OSError, ValueError, ConfigError):  # no trial yet, or one that cannot resume, which is reported
        return
    now = configs.shared(config)
    changed = [f"{path}: {saved.get(path)!r} there, {now[path]!r} now" for path in now if saved.get(path) != now[path]]
    allowed = f"was started with another config ({first_of(changed)}); choose another --workdir, or delete this trial"
    require(not changed, "--workdir", str(folder), allowed)
