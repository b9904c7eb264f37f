"""The settings of the stages of `benchmarks.accelerator`, and its results file.

The results file is one JSON object for all stages, rewritten after each result:

    {"stages": {NAME: {"status": "running" | "done" | "failed" | "timed out", "seconds": S, "result": {...}}}}

`result` is what the stage has measured so far; a failed stage also has an "error".
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rehearsal
from cifar_flax import arguments
from cifar_flax.config import Config
from cifar_flax.errors import UserError
from cifar_flax.files import read_json, write_json

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of a stage."""

    end: float  # time limit, in seconds since the epoch
    data_cache: str = ""  # folder of the decoded data; "": the config's
    peers: tuple[str, ...] = ()  # scripts
    rehearse: bool = False
    results: str = ""  # the campaign's JSON file, to read the results of earlier stages from

    def config(self, name: str, *overrides: str) -> Config:
        """Return the config `name` with `overrides`."""
        return arguments.parse(self.command_line(name, *overrides)).config

    def command_line(self, name: str, *overrides: str) -> list[str]:
        """Return the arguments of `main.py` for the config `name`."""
        toy = rehearsal.OVERRIDES[name] if self.rehearse else ()
        fields = (*overrides, *toy, *([f"data.cache_dir={self.data_cache}"] if self.data_cache else ()))
        return ["--config", str(REPOSITORY / "configs" / f"{name}.py"), *(f"--config.{field}" for field in fields)]

    def seconds_left(self) -> float:
        return self.end - time.time()

    def trials(self, count: int) -> int:
        return rehearsal.TRIALS if self.rehearse else count


def read(path: Path) -> dict[str, Any]:
    """Return the results in `path`; those of a new campaign if there is no such file.

    Raise `UserError` if it is not a results file.
    """
    if not path.exists():
        return {"stages": {}}
    try:
        found = read_json(path)
        stages = found["stages"]
        assert all("status" in stage for stage in stages.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"--out={str(path)!r}: is not a results file of benchmarks.accelerator") from error
    return found


def claim(path: Path, **measured: Any) -> None:
    """Write what is measured (the device, whether in a rehearsal) to `path`.

    Raise `UserError` if `path` has results of something else, which the new ones would be mixed with.
    """
    results = read(path)
    known = {name: results.get(name, value) for name, value in measured.items()}
    if known != measured:
        raise UserError(f"--out={str(path)!r}: has results of {known}, not of {measured}; choose another file")
    write_json(path, measured | results)


def update(path: Path, stage: str, **fields: Any) -> None:
    """Set fields of a stage."""
    results = read(path)
    results["stages"].setdefault(stage, {}).update(fields)
    write_json(path, results)


def save_result(path: Path, stage: str, result: Any) -> None:
    update(path, stage, result=result)
