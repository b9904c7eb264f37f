"""The training loop: run compiled calls of one or more steps, and evaluate, save and log between them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_flax import config as configs
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.checkpoints.metadata import CHECKPOINTS, DamagedError, Metadata
from cifar_flax.data.batches import InputTimer
from cifar_flax.runtime import environment, processes, signals
from cifar_flax.telemetry.metrics_log import Metrics, MetricsWriter
from cifar_flax.telemetry.progress import Progress
from cifar_flax.telemetry.scalars import scalars
from cifar_flax.training.early_stopping import EarlyStopping
from cifar_flax.training.guard import NonFiniteGuard
from cifar_flax.training.metrics import MetricsAccumulator, StepMetrics
from cifar_flax.training.profiling import Profiled
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import TrainCall
from cifar_flax.training.trainer import Trainer

# On accelerators, read the metrics of a call only after this many later calls are dispatched, so that the device does
# not wait for the host.
READ_LAG = 2


def read_lag(platform: str, steps_per_call: int) -> int:
    """Return how many calls are dispatched ahead of the one whose metrics are read.

    On a signal, the loop waits for all dispatched calls. Return 0 on a CPU and for calls of many steps, because the
    host's work between two calls is negligible there (0.4 % of the reference network's step on two cores).
    """
    return READ_LAG if steps_per_call == 1 and platform != "cpu" else 0


def run_calls(
    train_call: TrainCall,
    state: TrainState,
    inputs: Iterator[Any],
    calls: Iterable[int],
    read: Callable[[int, StepMetrics], None],
    stopping: Callable[[], int] = lambda: 0,
    lag: int = READ_LAG,
) -> TrainState:
    """Run one call for each entry of `calls`, the step that it ends with, and pass this step and the metrics to `read`.

    The metrics are read `lag` calls late. Stop early if `stopping` returns a nonzero number before a call.

    A transfer guard raises an error at any implicit transfer between host and device.
    """
    in_flight: deque[tuple[int, StepMetrics]] = deque()
    with jax.transfer_guard("disallow"):
        for step in calls:
            if stopping():
                break
            state, values = train_call(state, next(inputs))
            in_flight.append((step, values))
            if len(in_flight) > lag:
                read(*in_flight.popleft())
        while in_flight:
            read(*in_flight.popleft())
    return state


def run(trainer: Trainer, folder: Path, has_to_stop: Callable[[Metrics], bool] = lambda metrics: False) -> bool:
    """Train from the newest checkpoint in `folder`, or from the initial state, to the last step and its checkpoint.

    After each evaluation, `has_to_stop` is called with its line of metrics.jsonl. If it returns True, save and return
    False; the same call resumes the run. Otherwise, return True at the end.
    """
    with Checkpoints(folder / CHECKPOINTS, trainer.config.checkpoint) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with suppress(DamagedError):  # reported when it is restored
                # First, since other classes change the shapes of the state.
                trainer.require_same_data(checkpoints.metadata(step)["dataset"])
                break
        state, metadata = checkpoints.restore_newest(trainer.initial_state) or (trainer.initial_state, {})
        start, total = metadata.get("step", 0), trainer.total_steps
        if (start >= total or _early_stopping(trainer, metadata).is_due) and metadata["evaluated"]:
            early = "" if start >= total else f", stopped early (train.patience={trainer.config.train.patience})"
            processes.log(f"{folder} is finished: {start} steps of {total}{early}; evaluating its checkpoint")
            return True
        steps = f"resuming from step {start} of {total}" if start else f"{total} steps"
        images = f"{trainer.info.num_examples} images ({trainer.pipeline})"
        processes.log(f"{trainer.info.name}: {images}, {steps}, on {trainer.layout}", is_routine=not start)
        if trainer.no_tensorflow:
            processes.log(trainer.no_tensorflow, is_routine=True)
        return TrainingLoop(trainer, folder, checkpoints, state, metadata, has_to_stop).run()


def _early_stopping(trainer: Trainer, metadata: Metadata) -> EarlyStopping:
    return EarlyStopping(patience=trainer.config.train.patience, **metadata.get("early_stopping", {}))


class TrainingLoop:
    """Train from the initial state, or from the state and the `metadata` of a checkpoint."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        checkpoints: Checkpoints,
        state: TrainState,
        metadata: Metadata,
        has_to_stop: Callable[[Metrics], bool],
    ):
        self._has_to_stop, self._is_stopped = has_to_stop, False
        self._trainer, self._config, self._folder = trainer, trainer.config, folder
        self._checkpoints, self._state = checkpoints, state
        self._step = self._saved = metadata.get("step", 0)
        self._evaluated = metadata.get("evaluated", True)  # whether the evaluation that is due after this step is done
        self._made_by = environment.provenance(str(trainer.layout))
        before = metadata.get("made_by", self._made_by | {"settings": {}})  # of a new run: JAX's defaults
        if changed := environment.changes(before, self._made_by):
            processes.log(f"results may differ by rounding: {'; '.join(changed)}")
        self._mark = metadata.get("metrics")  # of metrics.jsonl at this step
        max_skipped = self._config.max_skipped if self._config.on_nonfinite == "skip" else 0
        self._guard = NonFiniteGuard(max_skipped, metadata.get("last_loss"), metadata.get("skipped_in_a_row", 0))
        self._early_stopping = _early_stopping(trainer, metadata)
        self._inputs = InputTimer(trainer.inputs(self._config.seed, self._step))
        self._blocked_seconds = 0.0
        unlogged = metadata.get("interval", {})
        self._accumulator = MetricsAccumulator(self._inputs, lambda: self._blocked_seconds, unlogged)
        self._lag = read_lag(trainer.layout.platform, trainer.timetable.steps_per_call)
        self._agreement, self._asked = processes.Agreement(trainer.layout, self._lag), 0

    def run(self) -> bool:
        """Train to the end; return False if `has_to_stop` ends the run. On a signal, save and raise `Stopped`."""
        trainer = self._trainer
        begin = time.perf_counter()
        train_call: TrainCall = trainer.compile(self._state, self._step)
        # Compile everything before the loop, since a signal has to wait for a compilation.
        trainer.evaluator.compile(self._state)
        processes.log(f"compiled training and evaluation in {time.perf_counter() - begin:.1f} s", is_routine=True)
        with ExitStack() as stack:
            writer = MetricsWriter(self._folder, self._step, self._mark, configs.shared(self._config))
            self._writer = stack.enter_context(closing(writer))
            profiled = Profiled(train_call, self._config.profile, self._folder, start=self._step)
            train_call = stack.enter_context(closing(profiled))
            progress = Progress(start=self._step, total=trainer.total_steps, epochs=self._config.train.epochs)
            self._progress = stack.enter_context(closing(progress))
            self._signal = stack.enter_context(signals.deferred())
            first = self._step + 1 if self._evaluated else self._step
            for stop in trainer.timetable.stops(first):
                self._stop = stop
                self._accumulator.resume()
                calls = trainer.timetable.calls(self._step, stop)
                self._state = run_calls(
                    train_call, self._state, self._inputs, calls, self._read, self._stopping, self._lag
                )
                if self._step == stop:
                    self._evaluate_and_save()
                if self._asked or self._is_stopped or self._early_stopping.is_due:
                    break
            if (self._asked or self._is_stopped) and self._step != self._saved:
                self._save()
            self._checkpoints.wait()
            if self._asked:
                if self._saved:
                    saved = f"saved step {self._saved} of {trainer.total_steps}"
                    processes.log(f"{saved}; run the same command to resume")
                raise signals.Stopped(self._asked)
        return not self._is_stopped

    def _stopping(self) -> int:
        """Return the number of the signal that any process has received, or 0."""
        self._asked = self._asked or self._agreement(self._signal())
        return self._asked

    def _read(self, step: int, values: StepMetrics) -> None:
        """Check, accumulate and log the metrics of the call that ends with `step`."""
        count = step - self._step  # entries after these belong to no step
        values = {name: np.atleast_1d(value)[:count] for name, value in jax.device_get(values).items()}
        self._checkpoints.check()
        self._guard.check(self._step + 1, values)
        self._accumulator.add(values)
        self._progress.advance(count)
        self._step = step
        if step % self._config.train.log_every == 0 or step == self._stop:
            self._progress.show_training(self._log("train", self._accumulator.summarize(self._config.train.batch_size)))

    def _evaluate_and_save(self) -> None:
        """Evaluate and save if either is due after this step. Return early if a signal arrives during evaluation."""
        trainer, accuracy = self._trainer, None
        if trainer.timetable.is_due(self._step, self._config.eval.every_epochs):
            evaluation = trainer.evaluator(self._state, self._stopping)
            self._evaluated = evaluation is not None
            if evaluation is None:
                return
            metrics = scalars(evaluation.summary) | {
                "learning_rate": float(trainer.task.learning_rates[0, self._step]),
                "images_per_second": evaluation.images_per_second,
                "input_wait_fraction": evaluation.input_wait_fraction,
            }
            line = self._log(trainer.monitored_split, metrics)
            self._progress.show_evaluation(line)
            self._is_stopped = self._step < trainer.total_steps and self._has_to_stop(line)
            if trainer.has_validation:
                accuracy = metrics["accuracy"]
                self._early_stopping.update(accuracy)
        if self._early_stopping.is_due and self._step < trainer.total_steps:
            steps = f"stopping early at step {self._step} of {trainer.total_steps}"
            processes.log(f"{steps}: {self._early_stopping.reason}", is_routine=True)
        if self._early_stopping.is_due or trainer.timetable.is_due(self._step, self._config.checkpoint.every_epochs):
            self._save(accuracy)

    def _log(self, split: str, metrics: Metrics) -> Metrics:
        line = {"step": self._step, "epoch": self._trainer.timetable.epoch(self._step), "split": split} | metrics
        self._writer.write(line)
        return line

    def _save(self, accuracy: float | None = None) -> None:
        begin = time.perf_counter()
        metadata = {
            "config": configs.to_dict(self._config),
            "dataset": self._trainer.info.to_dict(),
            "made_by": self._made_by,
            "evaluated": self._evaluated,
            "metrics": self._writer.mark(),
            "interval": self._accumulator.values(),
            "last_loss": self._guard.loss,
            "skipped_in_a_row": self._guard.skipped,
            "early_stopping": self._early_stopping.saved(),
        }
        is_due = self._trainer.timetable.is_due(self._step, self._config.checkpoint.every_epochs)
        self._checkpoints.save(self._state, metadata, accuracy, is_extra=not is_due)
        self._saved = self._step
        self._blocked_seconds += time.perf_counter() - begin
