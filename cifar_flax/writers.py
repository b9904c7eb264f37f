"""What a run tells: metrics.jsonl, TensorBoard, a progress bar or plain lines, tables."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_flax import distributed, files
from cifar_flax.imports import without

# Training does without these where they are not installed.
try:
    from tqdm import tqdm
except ImportError:
    tqdm = None
try:
    with without("torch"):  # seconds, and hundreds of megabytes, for tensors that are never met here
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams, scalar
except ImportError:
    EventsWriter = None

Record = dict[str, Any]  # one line of metrics.jsonl

_METRICS = ("train/loss", "validation/accuracy", "test/accuracy")  # beside the hyper-parameters in TensorBoard


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard's event files; in the main process alone.

    Raises `OSError`, with the file's name, from the call that could not write: tensorboardX's own thread would die of a
    full disk, and the run would wait for it for ever.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        mark: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Goes on at `start_step`, where `mark` was taken: what was written after it is dropped, as it comes again.

        `settings` are TensorBoard's hyper-parameters of the run.
        """
        self._file = self._events = None
        if not distributed.is_main():
            return
        path = workdir / "metrics.jsonl"
        kept = _written_until(path, start_step, mark)
        self._hash, self._size = hashlib.sha256(kept), len(kept)
        self._file = path.open("ab")
        if EventsWriter is None:
            distributed.say("no TensorBoard events are written: tensorboardX is not installed")
            return
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._add_event(start_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides what comes again
        values = {
            name: value if type(value) in (bool, int, float) else str(value) for name, value in (settings or {}).items()
        }
        for summary in hparams(values, dict.fromkeys(_METRICS))[:2]:
            self._add_event(start_step, summary=summary)
        self._events.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, record: Record) -> None:
        if self._file is None:
            return
        line = f"{json.dumps(record)}\n".encode()
        try:
            self._file.write(line)
            self._file.flush()
            self._hash.update(line)
            self._size += len(line)
            if self._events is None:
                return
            for name, value in record.items():
                if name not in ("step", "split") and value is not None:
                    self._add_event(record["step"], summary=scalar(f"{record['split']}/{name}", value))
            self._events.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self._file.name} or tensorboard beside it") from error

    def mark(self) -> Record | None:
        """What metrics.jsonl is up to here, once that is on the disk; for the checkpoint of this step."""
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def _add_event(self, step: int, **what: Any) -> None:
        assert self._events is not None
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))


def write_evaluation_events(workdir: Path, result: Record, picture: Path) -> None:
    """Has TensorBoard show the evaluation `result`, and its confusion matrix from `picture`, a PNG; instead of others.

    Does nothing where tensorboardX is not installed.
    """
    if EventsWriter is None:
        return
    folder = workdir / "tensorboard" / "evaluation"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    events, png = EventsWriter(str(folder / "events")), picture.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    summaries = [Summary(value=[Summary.Value(tag="confusion_matrix", image=image)])]
    names = ("accuracy", "top5_accuracy", "loss", "expected_calibration_error")
    summaries += [scalar(f"{result['split']}/{name}", result[name]) for name in names]
    for summary in summaries:
        events.write_event(Event(wall_time=time.time(), step=result["step"], summary=summary))
    events.close()


def _written_until(path: Path, step: int, mark: Mapping[str, Any] | None) -> bytes:
    """Leaves of metrics.jsonl what was written up to `mark`; returns that.

    Where that has been changed meanwhile, lines up to `step` stay if they can be read; a line on the screen says so.
    """
    content = path.read_bytes() if path.exists() else b""
    kept, lines = content[: mark["bytes"]] if mark else b"", content.splitlines(keepends=True)
    if mark and hashlib.sha256(kept).hexdigest() != mark["sha256"]:
        kept = b"".join(line for line in lines if _step_of(line) <= step)
        left = len(kept.splitlines())
        found = f"{left} of its {len(lines)} lines are kept" if content else "it is not there"
        distributed.say(f"{path} is not what the run had written at step {step}: {found}")
    elif lines and not mark:
        distributed.say(f"there is no checkpoint: begun anew, {len(lines)} lines of {path} are dropped")
    if kept != content:
        files.replace(path, kept)
    return kept


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite for what is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and line.endswith(b"\n") else math.inf


class Lines:
    """In place of tqdm's bar: of all that it shows, only the lines that stay."""

    write = staticmethod(distributed.say)

    def _nothing(self, *values: object, **settings: object) -> None:
        pass

    update = set_description = set_postfix_str = close = _nothing


class Progress:
    """A bar on a terminal; elsewhere a line per evaluation; of the main process alone."""

    def __init__(self, *, start: int, total: int, epochs: float):
        self._start, self._total, self._epochs = start, total, epochs
        self._begin = time.monotonic()
        bar = tqdm is not None and sys.stderr.isatty() and distributed.is_main()
        self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True) if bar else Lines()
        self._train: Record = {}

    def close(self) -> None:
        self._bar.close()

    def step(self, count: int) -> None:
        self._bar.update(count)

    def train(self, record: Record) -> None:
        self._train = record
        self._bar.set_description(f"epoch {record['epoch']:.1f}/{self._epochs:g}", refresh=False)
        rate = f"{record['images_per_second']:,.0f} images/s"
        self._bar.set_postfix_str(f"{_training(record)}, {rate}")

    def evaluation(self, record: Record) -> None:
        train, step = self._train, record["step"]
        columns = [
            f"epoch {record['epoch']:.1f}/{self._epochs:g}",
            f"{record['split']} loss {record['loss']:.4f} accuracy {record['accuracy']:.2%}",
        ]
        if train:  # not where a run goes on with an evaluation
            left = (time.monotonic() - self._begin) * (self._total - step) / (step - self._start)
            columns.insert(1, _training(train))
            columns += [
                f"{train['images_per_second']:,.0f} images/s",
                f"{train['input_wait_fraction']:.2%} of the time waiting for input",
                f"{left:.0f} s left",
            ]
        self._bar.write(" | ".join(columns))


def _training(record: Record) -> str:
    skipped = f", {record['skipped_steps']} steps skipped" if record["skipped_steps"] else ""
    if record["loss"] is None:
        return f"train{skipped}"
    return f"train loss {record['loss']:.4f} accuracy {record['accuracy']:.2%}{skipped}"


def show(text: str) -> None:
    """Prints what its user asked for; that nobody reads it any more is no error."""
    with contextlib.suppress(OSError):
        print(text)


def printable(text: str) -> str:
    """The name of a file, or of what else comes from outside, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def evaluation_table(result: Record) -> str:
    """The figures of eval.json for people."""
    name_width = max(len("class"), *(len(name) for name in result["per_class"]))
    correct = round(result["accuracy"] * result["num_examples"])
    below = f" where the top probability is below {result['tta_below']}" if result.get("tta_below") else ""
    views = f", test-time augmentation {result['tta']}{below}" if "tta" in result else ""
    lines = [
        f"{result['dataset']}, {result['split']} split, checkpoint of step {result['step']}{views}",
        f"  accuracy                    {result['accuracy']:.2%} ({correct} of {result['num_examples']})",
        f"  top-5 accuracy              {result['top5_accuracy']:.2%}",
        f"  loss                        {result['loss']!r}",
        f"  expected calibration error  {result['expected_calibration_error']!r}",
        "",
        f"  {'class':{name_width}}  precision  recall      F1",
    ]
    for name, row in result["per_class"].items():
        lines.append(f"  {name:{name_width}}  {row['precision']:9.2%}  {row['recall']:6.2%}  {row['f1']:6.2%}")
    return "\n".join(lines)
