"""The results file of `benchmarks.accelerator`: one JSON object for all stages, rewritten after each result.

    {"stages": {NAME: {"status": "running" | "done" | "failed" | "timed out", "seconds": S, "result": {...}}}}

`result` is what the stage has measured so far; a failed stage also has an "error".
"""

from pathlib import Path
from typing import Any

from cifar_flax.errors import UserError
from cifar_flax.files import read_json, write_json


def read(path: Path) -> dict[str, Any]:
    """Return the results in `path`; those of a new campaign if there is no such file.

    Raise `UserError` if it is not a results file.
    """
    if not path.exists():
        return {"stages": {}}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("stages"), dict):
        raise UserError(f"--out={str(path)!r}: is not a results file of benchmarks.accelerator")
    return found


def update(path: Path, stage: str, **fields: Any) -> None:
    """Set fields of a stage."""
    results = read(path)
    results["stages"].setdefault(stage, {}).update(fields)
    write_json(path, results)


def save_result(path: Path, stage: str, result: Any) -> None:
    update(path, stage, result=result)
