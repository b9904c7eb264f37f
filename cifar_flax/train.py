"""The training loop."""

import dataclasses
import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from cifar_flax import compilation, evaluate, experiment, models, steps
from cifar_flax import config as configs
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.data import order, sources
from cifar_flax.data.batches import Batch, InputTimer, batch_shapes, to_device
from cifar_flax.errors import ConfigError, UserError, require
from cifar_flax.evaluate import Evaluator
from cifar_flax.experiment import DatasetInfo
from cifar_flax.state import TrainState
from cifar_flax.writers import MetricsWriter, Progress, Record, write_json

# A step's metrics are read when this many later steps have been given to the device, so it never waits for the host.
READ_LAG = 2

Values = dict[str, Any]  # what `train_step` reports of one step
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Values]]


def train(config: Config, workdir: Path) -> None:
    """Trains to the end, from the newest checkpoint in `workdir` where there is one, then evaluates.

    Nothing in `workdir` is touched before config and data have proved fit for each other.
    """
    trainer = Trainer(config)
    _open_workdir(workdir, config)
    trainer.run(workdir)
    evaluate.evaluate(config, workdir)


class Trainer:
    """A config with its data loaded and its network built."""

    def __init__(self, config: Config):
        """Raises `ConfigError` where config and data do not fit, `UserError` where the data cannot be had."""
        self.config = config
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
        sample = self.arrays.images[self.examples[: models.sample_size(config.model)]]
        self.task, self.initial_state = experiment.build(config, self.info, sample if len(sample) else None)
        self.total_steps = experiment.total_steps(config, self.info)
        # Curves show the validation split or, where none is held out and so nothing is chosen, the one reported.
        if len(held_out):
            self.monitored_split = "validation"
            self.evaluator = Evaluator(self.task, self.arrays, held_out, config.eval.batch_size)
        else:
            self.monitored_split = config.data.eval_split
            everything = evaluate.all_examples(eval_arrays)
            self.evaluator = Evaluator(self.task, eval_arrays, everything, config.eval.batch_size)

    def run(self, workdir: Path) -> None:
        """Trains from the newest checkpoint, or from the start, to the last step and its checkpoint."""
        metadata = {"config": configs.to_dict(self.config), "dataset": self.info.to_dict()}
        with closing(Checkpoints(workdir / "checkpoints", self.config.checkpoint)) as checkpoints:
            state = self.initial_state
            start = checkpoints.newest_step() or 0
            if start:
                self._check_data(checkpoints.metadata(start)["dataset"])
                state = checkpoints.restore(start, state)
            if start >= self.total_steps:
                print(f"{workdir} is finished: {start} steps of {self.total_steps}; evaluating its checkpoint")
                return
            where = f"resuming at step {start} of {self.total_steps}" if start else f"{self.total_steps} steps"
            print(f"{self.info.name}: {self.info.num_examples} images, {where}, on {jax.devices()[0].device_kind}")
            batches = InputTimer(to_device(self._training_batches(start)))
            train_step = self._compile(state)
            with (
                closing(MetricsWriter(workdir, start)) as writer,
                closing(Progress(start=start, total=self.total_steps, epochs=self.config.train.epochs)) as progress,
            ):
                interval = Interval(batches)

                def read(step: int, values: Values) -> None:
                    values = jax.device_get(values)
                    if not math.isfinite(values["loss"]):
                        raise UserError(
                            f"the loss of step {step} is {values['loss']} at a learning rate of "
                            f"{values['learning_rate']:g}; no later checkpoint was saved"
                        )
                    interval.add(values)
                    progress.step()
                    if step % self.config.train.log_every == 0 or step == stop:
                        record = self._record(step, "train", interval.close(self.config.train.batch_size))
                        writer.write(record)
                        progress.train(record)

                for stop in self._stops(start):
                    interval.open()
                    state = run_steps(train_step, state, batches, start, stop, read)
                    start = stop
                    accuracy = self._evaluate(state, stop, writer, progress)
                    if self._is_due(stop, self.config.checkpoint.every_epochs):
                        checkpoints.save(state, metadata, accuracy if self.monitored_split == "validation" else None)
                checkpoints.wait()

    def _check_data(self, saved: dict[str, Any]) -> None:
        """Raises `UserError` unless the run was begun on this very data: positions would mean other examples."""
        was = DatasetInfo.from_dict(saved)
        for field in dataclasses.fields(was):
            before, now = getattr(was, field.name), getattr(self.info, field.name)
            if before != now:
                raise UserError(f"the run was begun on data whose {field.name} is {before}, not {now}")

    def _evaluate(self, state: TrainState, step: int, writer: MetricsWriter, progress: Progress) -> float | None:
        """Evaluates and records where it is due; returns the accuracy."""
        if not self._is_due(step, self.config.eval.every_epochs):
            return None
        evaluation = self.evaluator(state)
        figures = {
            "loss": evaluation.summary["loss"],
            "accuracy": evaluation.summary["accuracy"],
            "learning_rate": float(jax.device_get(self.task.schedule(step))),
            "images_per_second": evaluation.images_per_second,
            "input_wait_fraction": evaluation.input_wait_fraction,
        }
        record = self._record(step, self.monitored_split, figures)
        writer.write(record)
        progress.evaluation(record)
        return figures["accuracy"]

    def _compile(self, state: TrainState) -> TrainStep:
        begin = time.perf_counter()
        step = compile_step(self.task, state, self.config.train.batch_size, self.info.image_shape)
        print(f"compiled the training step in {time.perf_counter() - begin:.1f} s")
        return step

    def _training_batches(self, start: int) -> Iterator[Batch]:
        # Each pipeline is imported where it is used: TensorFlow takes seconds and hundreds of megabytes.
        if self.config.data.pipeline == "streaming":
            from cifar_flax.data.streaming import training_batches
        else:
            from cifar_flax.data.resident import training_batches
        return training_batches(
            self.arrays,
            self.examples,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start=start,
            stop=self.total_steps,
        )

    def _epoch(self, step: int) -> float:
        return step * self.config.train.batch_size / self.info.num_examples

    def _is_due(self, step: int, every_epochs: int) -> bool:
        """Whether `step` is the last one or the first to complete a multiple of `every_epochs` epochs."""
        completed = math.floor(self._epoch(step)) // every_epochs
        return step == self.total_steps or completed > math.floor(self._epoch(step - 1)) // every_epochs

    def _stops(self, start: int) -> Iterator[int]:
        """The steps after `start` at which the loop evaluates or saves."""
        due = (self.config.eval.every_epochs, self.config.checkpoint.every_epochs)
        for step in range(start + 1, self.total_steps + 1):
            if any(self._is_due(step, every) for every in due):
                yield step

    def _record(self, step: int, split: str, figures: Record) -> Record:
        return {"step": step, "epoch": self._epoch(step), "split": split} | figures


def compile_step(task: steps.Task, state: TrainState, batch_size: int, image_shape: tuple[int, int, int]) -> TrainStep:
    """The training step, compiled before the first batch so that no rate counts the compilation."""
    step = jax.jit(
        functools.partial(steps.train_step, task),
        donate_argnums=0,
        compiler_options=compilation.options(jax.default_backend()),
    )
    return step.lower(state, batch_shapes(batch_size, image_shape)).compile()


def run_steps(
    train_step: TrainStep,
    state: TrainState,
    batches: Iterator[Batch],
    start: int,
    stop: int,
    read: Callable[[int, Values], None],
) -> TrainState:
    """Runs the steps from `start` to `stop` and calls `read` with the number and the metrics of each.

    They are read `READ_LAG` steps late, the last ones when there is nothing more to run.

    Nothing but batches and metrics crosses between host and device: the transfer guard stops what does by accident.
    """
    in_flight: deque[tuple[int, Values]] = deque()
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, stop + 1):
            state, values = train_step(state, next(batches))
            in_flight.append((step, values))
            if len(in_flight) > READ_LAG:
                read(*in_flight.popleft())
        while in_flight:
            read(*in_flight.popleft())
    return state


class Interval:
    """Means and rates of the steps since the last line of the log."""

    def __init__(self, batches: InputTimer):
        self._batches = batches
        self.open()

    def open(self) -> None:
        self._values: list[Values] = []
        self._begin, self._waited = time.perf_counter(), self._batches.seconds

    def add(self, values: Values) -> None:
        self._values.append(values)

    def close(self, batch_size: int) -> Record:
        """The means over the steps added; opens the next interval."""
        count = len(self._values)
        seconds = time.perf_counter() - self._begin
        figures = {
            "loss": sum(float(values["loss"]) for values in self._values) / count,
            "accuracy": sum(float(values["accuracy"]) for values in self._values) / count,
            "learning_rate": float(self._values[-1]["learning_rate"]),
            "images_per_second": count * batch_size / seconds,
            "input_wait_fraction": (self._batches.seconds - self._waited) / seconds,
        }
        self.open()
        return figures


def _open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir, or checks that it belongs to a run of the same config."""
    field = f"--workdir={str(workdir)!r}"
    path = workdir / "config.json"
    try:
        if not path.exists():
            if (workdir / "checkpoints").exists():
                raise UserError(f"{field}: has checkpoints but no config.json; choose another --workdir")
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, configs.to_dict(config))
            return
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{field}: its config.json is damaged ({error}); choose another --workdir") from error
    except OSError as error:
        raise UserError(f"{field}: cannot be used as a folder: {error.strerror}") from error
    changed = configs.differences(configs.from_dict(saved), config)
    if changed:
        raise ConfigError(f"{field}: holds a run of another config ({'; '.join(changed)}); choose another --workdir")
