"""What a run tells: metrics.jsonl, TensorBoard, a progress bar or plain lines, tables."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cifar_flax import distributed
from cifar_flax.imports import without

# Training does without these where they are not installed.
try:
    from tqdm import tqdm
except ImportError:
    tqdm = None
try:
    with without("torch"):  # seconds, and hundreds of megabytes, for tensors that are never met here
        from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None

Record = dict[str, Any]  # one line of metrics.jsonl


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` at once, so that no reader and no crash sees half of it."""
    _replace(path, json.dumps(value, indent=1))


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)  # temporary files are closed to others
    os.replace(file.name, path)


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard's event files; in the main process alone."""

    def __init__(self, workdir: Path, start_step: int):
        """Continues at `start_step`: what an interrupted run wrote of later steps is dropped, as they come again."""
        self._file = self._events = None
        if not distributed.is_main():
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= start_step]
            _replace(path, "".join(kept))
        self._file = path.open("a")
        if SummaryWriter is None:
            print("no TensorBoard events are written: tensorboardX is not installed")
        self._events = SummaryWriter and SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, record: Record) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if self._events is not None and name not in ("step", "split") and value is not None:
                self._events.add_scalar(f"{record['split']}/{name}", value, record["step"])


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for what a crash left unfinished."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


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
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.1%}, {rate}")

    def evaluation(self, record: Record) -> None:
        train, step = self._train, record["step"]
        left = (time.monotonic() - self._begin) * (self._total - step) / (step - self._start)
        columns = (
            f"epoch {record['epoch']:.1f}/{self._epochs:g}",
            f"train loss {train['loss']:.4f} accuracy {train['accuracy']:.2%}",
            f"{record['split']} loss {record['loss']:.4f} accuracy {record['accuracy']:.2%}",
            f"{train['images_per_second']:,.0f} images/s",
            f"{train['input_wait_fraction']:.2%} of the time waiting for input",
            f"{left:.0f} s left",
        )
        self._bar.write(" | ".join(columns))


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
