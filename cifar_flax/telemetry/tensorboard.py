"""TensorBoard's event files. The only file that imports tensorboardX, which may be missing."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_flax import packages
from cifar_flax.packages import without

_METRICS = ("train/loss", "validation/accuracy", "test/accuracy")  # beside the hyper-parameters
_EVALUATION_METRICS = ("accuracy", "top5_accuracy", "loss", "expected_calibration_error")


class Events:
    """An event file, written in the caller's thread: tensorboardX's own thread would hang the run on a full disk.

    Raises `UserError` if tensorboardX is missing, too old or broken, and `OSError` if the file cannot be written.
    """

    def __init__(self, folder: Path):
        with without("torch"):  # seconds, and hundreds of megabytes, for tensors that this project does not use
            packages.load("tensorboardX")
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2, summary_pb2
        self._summary, self._event, self._image = summary, event_pb2, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))

    def start(self, step: int, settings: Mapping[str, Any]) -> None:
        """Begin a session at `step`: hide later events of earlier sessions, and write the hyper-parameters."""
        session = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step + 1, session_log=session)
        values = {name: value if type(value) in (bool, int, float) else str(value) for name, value in settings.items()}
        for summary in self._summary.hparams(values, dict.fromkeys(_METRICS))[:2]:
            self._write(step, summary=summary)
        self._writer.flush()

    def scalars(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Write the `metrics` of a split that are not None."""
        for name, value in metrics.items():
            if value is not None:
                self._write(step, summary=self._summary.scalar(f"{split}/{name}", value))
        self._writer.flush()

    def image(self, step: int, name: str, png: bytes, size: tuple[int, int]) -> None:
        """Write a PNG of `size` (width, height)."""
        width, height = size
        image = self._image.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._write(step, summary=self._image(value=[self._image.Value(tag=name, image=image)]))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **what))


def write_evaluation_events(workdir: Path, result: Mapping[str, Any], picture: Path, size: tuple[int, int]) -> None:
    """Write the evaluation `result` and its confusion matrix, the PNG `picture` of `size`, in place of earlier ones.

    Raises `UserError` if tensorboardX is missing, too old or broken.
    """
    folder = workdir / "tensorboard" / "evaluation"
    shutil.rmtree(folder, ignore_errors=True)
    events = Events(folder)
    events.image(result["step"], "confusion_matrix", picture.read_bytes(), size)
    events.scalars(result["step"], result["split"], {name: result[name] for name in _EVALUATION_METRICS})
    events.close()
