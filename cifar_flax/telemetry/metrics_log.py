"""Read and write metrics.jsonl: one line of JSON per logging step and per evaluation."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar_flax import files
from cifar_flax.errors import one_line
from cifar_flax.runtime import processes
from cifar_flax.telemetry.tensorboard import Events

Metrics = dict[str, Any]  # one line of metrics.jsonl


class MetricsWriter:
    """Append metrics to metrics.jsonl and TensorBoard's event files, in the main process only.

    Methods raise `OSError` with the file's name if they cannot write.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        mark: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Open the files to continue at `start_step`, and delete later lines, which the run will write again.

        `mark` has the size and checksum of metrics.jsonl at that step, `settings` the hyperparameters for TensorBoard.
        """
        self._file = self._events = None
        if not processes.is_main():
            return
        path = workdir / "metrics.jsonl"
        _keep_until(path, start_step, mark)
        self._file = path.open("a+b")
        with self._without_events_on_errors():
            self._events = Events(workdir / "tensorboard")
            self._events.start(start_step, settings or {})

    def close(self) -> None:
        if self._events is not None:
            with self._without_events_on_errors():
                self._events.close()
        if self._file is not None:
            self._file.close()

    def write(self, metrics: Metrics) -> None:
        if self._file is None:
            return
        try:
            self._file.write(f"{json.dumps(metrics)}\n".encode())
            self._file.flush()
            if self._events is not None:
                scalars = {name: value for name, value in metrics.items() if name not in ("step", "split")}
                with self._without_events_on_errors():
                    self._events.scalars(metrics["step"], metrics["split"], scalars)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self._file.name} or tensorboard beside it") from error

    @contextlib.contextmanager
    def _without_events_on_errors(self) -> Iterator[None]:
        """Write no more events if the block raises an error other than `OSError`, and log the error."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # tensorboardX and protobuf can raise anything
            events, self._events = self._events, None
            if events is not None:
                with contextlib.suppress(Exception):
                    events.close()
            processes.log(f"no TensorBoard events are written: {one_line(error)}", is_routine=True)

    def mark(self) -> dict[str, Any] | None:
        """Flush metrics.jsonl to disk and return its size and checksum, to be saved in the checkpoint of this step."""
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        self._file.seek(0)  # writes append all the same
        content = self._file.read()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _keep_until(path: Path, step: int, mark: Mapping[str, Any] | None) -> None:
    """Truncate metrics.jsonl to its size at `mark`, or to nothing without one.

    If this part has changed since, keep the valid lines up to `step` and log a warning.
    """
    content = path.read_bytes() if path.exists() else b""
    kept, lines = content[: mark["bytes"]] if mark else b"", content.splitlines(keepends=True)
    if mark and hashlib.sha256(kept).hexdigest() != mark["sha256"]:
        valid = [line for line in lines if _step_of(line) <= step]
        kept = b"".join(valid)
        found = f"keeping {len(valid)} of its {len(lines)} lines" if content else "it is missing"
        processes.log(f"{path} has changed since the checkpoint of step {step}: {found}")
    elif lines and not mark:
        processes.log(f"no checkpoint found: starting from step 0 and deleting {len(lines)} lines of {path}")
    if kept != content:
        files.replace(path, kept)


def _step_of(line: bytes) -> float:
    """Return the step of a line of metrics.jsonl, or infinity if the line is invalid."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and line.endswith(b"\n") else math.inf
