"""TensorBoard event files. Only this module imports tensorboardX, which is optional."""

import shutil
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_flax import packages
from cifar_flax.packages import without
from cifar_flax.telemetry.scalars import scalars


class Events:
    """Write an event file in the caller's thread: tensorboardX's own thread would hang the run on a full disk.

    Raise `UserError` if tensorboardX is missing, too old or broken, and `OSError` if the file cannot be written.
    """

    def __init__(self, folder: Path):
        with without("torch"):  # its import takes seconds and hundreds of megabytes, and is not needed
            writer, self._summary, self._event, summary = (
                packages.load("tensorboardX", f"tensorboardX.{module}")
                for module in ("event_file_writer", "summary", "proto.event_pb2", "proto.summary_pb2")
            )
        self._image = summary.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = writer.EventsWriter(str(folder / "events"))

    def start(self, step: int, settings: Mapping[str, Any]) -> None:
        """Start a session at `step`: hide later events of earlier sessions and write the hyperparameters."""
        session = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step + 1, session_log=session)
        values = {name: value if type(value) in (bool, int, float) else str(value) for name, value in settings.items()}
        splits = ("validation", settings.get("data.eval_split", "test"))
        metrics = dict.fromkeys(("train/loss", *(f"{split}/accuracy" for split in splits)))  # beside the settings
        for summary in self._summary.hparams(values, metrics)[:2]:
            self._write(step, summary=summary)
        self._writer.flush()

    def scalars(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Write those `metrics` of a split that are not None."""
        for name, value in metrics.items():
            if value is not None:
                self._write(step, summary=self._summary.scalar(f"{split}/{name}", value))
        self._writer.flush()

    def image(self, step: int, name: str, png: bytes) -> None:
        """Write a PNG."""
        width, height = struct.unpack(">II", png[16:24])
        image = self._image.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._write(step, summary=self._image(value=[self._image.Value(tag=name, image=image)]))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **content))


def write_evaluation_events(folder: Path, result: Mapping[str, Any], plot: Path | None) -> None:
    """Write the evaluation `result` and `plot`, a PNG of the confusion matrix, and delete earlier events in `folder`.

    Raise `UserError` if tensorboardX is missing, too old or broken.
    """
    shutil.rmtree(folder, ignore_errors=True)
    events = Events(folder)
    if plot is not None:
        events.image(result["step"], "confusion_matrix", plot.read_bytes())
    events.scalars(result["step"], result["split"], scalars(result))
    events.close()
