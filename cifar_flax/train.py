"""The training loop."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_flax import config as configs
from cifar_flax import distributed, environment, evaluate, experiment, lifecycle, records, steps, transfer, workdir
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.data import order, resident, sources
from cifar_flax.data.batches import GROUP, InputTimer, empty_batch, empty_positions, to_device
from cifar_flax.errors import UserError, require
from cifar_flax.evaluate import Evaluator
from cifar_flax.experiment import DatasetInfo
from cifar_flax.imports import installed
from cifar_flax.loop import Divergence, Inputs, Interval, TrainCall, Values, read_lag, run_calls
from cifar_flax.models import sample_size
from cifar_flax.models.summary import summarize
from cifar_flax.profiling import Profiled
from cifar_flax.state import TrainState
from cifar_flax.writers import MetricsWriter, Progress, Record


def train(config: Config, folder: Path, *, summary: bool = False) -> None:
    """Trains to the end, from the newest checkpoint in `folder` where there is one, then evaluates.

    Nothing in `folder` is touched before config and data have proved fit for each other. With `summary`, the network's
    layers are printed first.

    Raises `lifecycle.Stopped` where a signal has ended it; what was done is saved.
    """
    trainer = Trainer(config)
    if config.train.init_from and not records.saved_steps(folder / workdir.CHECKPOINTS):
        trainer.initial_state = transfer.begin(config, trainer.info, trainer.task, trainer.initial_state)
    with workdir.opened(folder, config):
        if summary:
            distributed.say(summarize(config.model, trainer.info.image_shape, len(trainer.info.class_names)))
        trainer.run(folder)
        evaluate.evaluate(config, folder)


class Trainer:
    """A config with its data loaded and its network built."""

    def __init__(self, config: Config):
        """Raises `ConfigError` where config and data do not fit, `UserError` where the data cannot be had."""
        self.config = config
        streams = config.data.pipeline == "streaming"
        missing = "needs TensorFlow, which is not installed; resident does without"
        require(not streams or installed("tensorflow"), "data.pipeline", config.data.pipeline, missing)
        self.arrays = sources.load(config.data, "train")
        eval_arrays = sources.load(config.data, config.data.eval_split)
        fraction = config.data.validation_fraction
        self.examples, held_out = order.split_validation(len(self.arrays.labels), fraction)
        fits = len(self.examples) > 0 and (fraction == 0 or len(held_out) > 0)
        require(fits, "data.validation_fraction", fraction, "leaves the train or the validation part empty")
        if self.arrays.dataset != eval_arrays.dataset:
            raise UserError(f"data.name: train split is {self.arrays.dataset}, the other {eval_arrays.dataset}")
        self.info = DatasetInfo.of(self.arrays, self.examples, config.augment.normalization)
        self.info.check(eval_arrays)
        self.task, init = experiment.build(config, self.info)
        self.layout = self.task.layout
        self.layout.require_divides("train.batch_size", config.train.batch_size)
        distributed.require_agreement(data=self.arrays.digest())
        sample = self.arrays.images[self.examples[: sample_size(config.model)]]
        self.init = lambda seed: init(seed, sample if len(sample) else None)
        if config.data.pipeline == "resident":
            self.arrays, eval_arrays = (resident.put(arrays, self.layout) for arrays in (self.arrays, eval_arrays))
        self.eval_arrays = eval_arrays
        self.initial_state = self.init(config.seed)
        self.total_steps = self.task.total_steps
        self._check_calls()
        # Curves show the validation split or, where none is held out and so nothing is chosen, the one reported.
        if len(held_out):
            self.monitored_split = "validation"
            self.evaluator = Evaluator(self.task, self.arrays, held_out, config.eval.batch_size)
        else:
            self.monitored_split = config.data.eval_split
            everything = evaluate.all_examples(eval_arrays)
            self.evaluator = Evaluator(self.task, eval_arrays, everything, config.eval.batch_size)

    def run(self, folder: Path) -> None:
        """Trains from the newest checkpoint, or from the start, to the last step and its checkpoint."""
        with Checkpoints(folder / workdir.CHECKPOINTS, self.config.checkpoint) as checkpoints:
            restored = checkpoints.restore_newest(self.initial_state)
            state, record = restored or (self.initial_state, {})
            start = record.get("step", 0)
            if restored:
                self._check_data(record["dataset"])
            if start >= self.total_steps and record["evaluated"]:
                distributed.say(f"{folder} is finished: {start} steps of {self.total_steps}; evaluating its checkpoint")
                return
            where = f"resuming at step {start} of {self.total_steps}" if start else f"{self.total_steps} steps"
            distributed.say(f"{self.info.name}: {self.info.num_examples} images, {where}, on {self.layout}")
            Run(self, folder, checkpoints, state, record).go()

    def _check_data(self, saved: dict[str, Any]) -> None:
        """Raises `UserError` unless the run was begun on this very data: positions would mean other examples."""
        was = DatasetInfo.from_dict(saved)
        for field in dataclasses.fields(was):
            before, now = getattr(was, field.name), getattr(self.info, field.name)
            if before != now:
                change = f"{field.name}: {before} in the checkpoint, {now} in the data of today"
                raise UserError(f"the run was begun on other data ({change}); choose another --workdir")

    def inputs(self, seed: int, start: int) -> Iterator[Inputs]:
        """What the calls of a run take, from the step `start` on, on the device."""
        per_call = self.config.train.steps_per_call
        settings: dict[str, Any] = {
            "batch_size": self.config.train.batch_size,
            "drop_last": self.config.data.drop_last,
            "seed": seed,
            "start": start,
            "stop": self.total_steps,
            "rows": self.layout.rows(self.config.train.batch_size),
        }
        if self.config.data.pipeline == "resident":
            positions = resident.training_positions(self.examples, steps_per_call=per_call, **settings)
            put = functools.partial(self.layout.split, batch_axis=1)
            return to_device(positions, put, GROUP if per_call == 1 else 1)  # one call has as much as many batches
        # Imported where it is used: TensorFlow takes seconds and hundreds of megabytes.
        from cifar_flax.data.streaming import training_batches

        return to_device(training_batches(self.arrays, self.examples, **settings), self.layout.split)

    def compile(self, state: TrainState) -> TrainCall:
        """The program of one call, for states like this one."""
        rows = self.layout.rows(self.config.train.batch_size)
        places = rows.stop - rows.start
        if self.config.data.pipeline == "resident":
            positions = self.layout.split(empty_positions(self.config.train.steps_per_call, places), batch_axis=1)
            split = self.arrays.images, self.arrays.labels
            train_steps = functools.partial(steps.train_steps, self.task)
            program = self.layout.compile(train_steps, state, positions, *split, batch_axis=1, donate=True)
            return lambda state, positions: program(state, positions, *split)
        batch = self.layout.split(empty_batch(places, self.info.image_shape))
        return self.layout.compile(functools.partial(steps.train_step, self.task), state, batch, donate=True)

    def calls(self, start: int, stop: int) -> range:
        """How many steps are done after each call from `start` to `stop`."""
        per_call = self.config.train.steps_per_call
        return range(start + per_call, stop + 1, per_call)

    def _check_calls(self) -> None:
        per_call = self.config.train.steps_per_call
        for stop in self.stops(1) if per_call > 1 else ():
            allowed = f"must divide the steps done at each evaluation and checkpoint; there is one after {stop}"
            require(stop % per_call == 0, "train.steps_per_call", per_call, allowed)

    def epoch(self, step: int) -> float:
        batch_size = self.config.train.batch_size
        return step * batch_size / order.epoch_images(self.info.num_examples, batch_size, self.config.data.drop_last)

    def is_due(self, step: int, every_epochs: int) -> bool:
        """Whether `step` is the last one or the first to complete a multiple of `every_epochs` epochs."""
        completed = math.floor(self.epoch(step)) // every_epochs
        return step == self.total_steps or completed > math.floor(self.epoch(step - 1)) // every_epochs

    def stops(self, first: int) -> Iterator[int]:
        """The steps from `first` on at which the loop evaluates or saves."""
        due = (self.config.eval.every_epochs, self.config.checkpoint.every_epochs)
        for step in range(max(first, 1), self.total_steps + 1):
            if any(self.is_due(step, every) for every in due):
                yield step


class Run:
    """One start of a training, from the first step or from the state and the `record` of a checkpoint."""

    def __init__(
        self, trainer: Trainer, folder: Path, checkpoints: Checkpoints, state: TrainState, record: records.Record
    ):
        self._trainer, self._config, self._folder = trainer, trainer.config, folder
        self._checkpoints, self._state = checkpoints, state
        self._step = self._saved = record.get("step", 0)
        self._evaluated = record.get("evaluated", True)  # whether all that is due after this step is done
        self._mark = record.get("metrics")  # of metrics.jsonl at this step
        max_skipped = self._config.max_skipped if self._config.on_nonfinite == "skip" else 0
        self._divergence = Divergence(max_skipped, record.get("last_loss"), record.get("skipped_in_a_row", 0))
        self._inputs = InputTimer(trainer.inputs(self._config.seed, self._step))
        self._blocked_seconds = 0.0
        self._interval = Interval(self._inputs, lambda: self._blocked_seconds, record.get("interval", {}))
        self._lag = read_lag(trainer.layout.platform, self._config.train.steps_per_call)
        self._agreement, self._asked = distributed.Agreement(trainer.layout, self._lag), 0

    def go(self) -> None:
        """Trains to the end, or until a signal asks it to stop: saves what is done, and raises `lifecycle.Stopped`."""
        trainer = self._trainer
        begin = time.perf_counter()
        train_call = trainer.compile(self._state)
        # Nothing is left for the loop to compile: a signal would have to wait for it.
        trainer.evaluator.compile(self._state)
        self._learning_rate = jax.jit(trainer.task.schedule).lower(0).compile()
        distributed.say(f"compiled training and evaluation in {time.perf_counter() - begin:.1f} s")
        with ExitStack() as stack:
            self._writer = stack.enter_context(
                closing(MetricsWriter(self._folder, self._step, self._mark, configs.shared(self._config)))
            )
            profile, per_call = self._config.profile, self._config.train.steps_per_call
            profiled = Profiled(train_call, profile, self._folder, start=self._step, per_call=per_call)
            train_call = stack.enter_context(closing(profiled))
            progress = Progress(start=self._step, total=trainer.total_steps, epochs=self._config.train.epochs)
            self._progress = stack.enter_context(closing(progress))
            self._signal = stack.enter_context(lifecycle.deferred())
            for stop in trainer.stops(self._step + self._evaluated):
                self._stop = stop
                self._interval.resume()
                calls = trainer.calls(self._step, stop)
                self._state = run_calls(
                    train_call, self._state, self._inputs, calls, self._read, self._stopping, self._lag
                )
                if self._step == stop:
                    self._do_what_is_due()
                if self._asked:
                    break
            if self._asked and self._step != self._saved:
                self._save()
            self._checkpoints.wait()
            if self._asked:
                if self._saved:
                    distributed.say(
                        f"saved step {self._saved} of {trainer.total_steps}; the same command goes on from there"
                    )
                raise lifecycle.Stopped(self._asked)

    def _stopping(self) -> int:
        """The number of the signal that has asked one of the processes to stop, or 0."""
        self._asked = self._asked or self._agreement(self._signal())
        return self._asked

    def _read(self, step: int, values: Values) -> None:
        """Takes in the metrics of the call that ends with `step`."""
        values = {name: np.atleast_1d(value) for name, value in jax.device_get(values).items()}
        self._checkpoints.check()
        self._divergence.check(step + 1 - len(values["loss"]), values)
        self._interval.add(values)
        self._progress.step(len(values["loss"]))
        self._step = step
        if step % self._config.train.log_every == 0 or step == self._stop:
            self._progress.train(self._log("train", self._interval.close(self._config.train.batch_size)))

    def _do_what_is_due(self) -> None:
        """Evaluates and saves, unless it is asked to stop meanwhile."""
        trainer, accuracy = self._trainer, None
        if trainer.is_due(self._step, self._config.eval.every_epochs):
            evaluation = trainer.evaluator(self._state, self._stopping)
            self._evaluated = evaluation is not None
            if evaluation is None:
                return
            figures = {
                "loss": evaluation.summary["loss"],
                "accuracy": evaluation.summary["accuracy"],
                "learning_rate": float(jax.device_get(self._learning_rate(self._step))),
                "images_per_second": evaluation.images_per_second,
                "input_wait_fraction": evaluation.input_wait_fraction,
            }
            self._progress.evaluation(self._log(trainer.monitored_split, figures))
            accuracy = figures["accuracy"] if trainer.monitored_split == "validation" else None
        if trainer.is_due(self._step, self._config.checkpoint.every_epochs):
            self._save(accuracy)

    def _log(self, split: str, figures: Record) -> Record:
        record = {"step": self._step, "epoch": self._trainer.epoch(self._step), "split": split} | figures
        self._writer.write(record)
        return record

    def _save(self, accuracy: float | None = None) -> None:
        begin = time.perf_counter()
        content = {
            "config": configs.to_dict(self._config),
            "dataset": self._trainer.info.to_dict(),
            "made_by": environment.made_by(str(self._trainer.layout)),
            "evaluated": self._evaluated,
            "metrics": self._writer.mark(),
            "interval": self._interval.values(),
            "last_loss": self._divergence.loss,
            "skipped_in_a_row": self._divergence.skipped,
        }
        is_due = self._trainer.is_due(self._step, self._config.checkpoint.every_epochs)
        self._checkpoints.save(self._state, content, accuracy, is_extra=not is_due)
        self._saved = self._step
        self._blocked_seconds += time.perf_counter() - begin
