"""The training loop."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_flax import config as configs
from cifar_flax import distributed, evaluate, experiment, models, steps
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.data import order, resident, sources
from cifar_flax.data.batches import GROUP, InputTimer, empty_batch, empty_positions, to_device
from cifar_flax.errors import ConfigError, UserError, require
from cifar_flax.evaluate import Evaluator
from cifar_flax.experiment import DatasetInfo
from cifar_flax.imports import installed
from cifar_flax.loop import Inputs, Interval, TrainCall, Values, run_calls
from cifar_flax.state import TrainState
from cifar_flax.writers import MetricsWriter, Progress, Record, write_json


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
        sample = self.arrays.images[self.examples[: models.sample_size(config.model)]]
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

    def run(self, workdir: Path) -> None:
        """Trains from the newest checkpoint, or from the start, to the last step and its checkpoint."""
        metadata = {"config": configs.to_dict(self.config), "dataset": self.info.to_dict()}
        with Checkpoints(workdir / "checkpoints", self.config.checkpoint) as checkpoints:
            state = self.initial_state
            start = checkpoints.newest_step() or 0
            if start:
                self._check_data(checkpoints.metadata(start)["dataset"])
                state = checkpoints.restore(start, state)
            if start >= self.total_steps:
                distributed.say(
                    f"{workdir} is finished: {start} steps of {self.total_steps}; evaluating its checkpoint"
                )
                return
            where = f"resuming at step {start} of {self.total_steps}" if start else f"{self.total_steps} steps"
            distributed.say(f"{self.info.name}: {self.info.num_examples} images, {where}, on {self.layout}")
            inputs = InputTimer(self.inputs(self.config.seed, start))
            begin = time.perf_counter()
            train_call = self.compile(state)
            distributed.say(f"compiled the training step in {time.perf_counter() - begin:.1f} s")
            with (
                closing(MetricsWriter(workdir, start)) as writer,
                closing(Progress(start=start, total=self.total_steps, epochs=self.config.train.epochs)) as progress,
            ):
                interval = Interval(inputs)

                def read(step: int, values: Values) -> None:
                    values = {name: np.atleast_1d(value) for name, value in jax.device_get(values).items()}
                    for number, loss in enumerate(values["loss"], start=step + 1 - len(values["loss"])):
                        if not math.isfinite(loss):
                            raise UserError(
                                f"the loss of step {number} is {loss} at a learning rate of "
                                f"{values['learning_rate'][number - step - 1]:g}; no later checkpoint was saved"
                            )
                    interval.add(values)
                    progress.step(len(values["loss"]))
                    if step % self.config.train.log_every == 0 or step == stop:
                        record = self._record(step, "train", interval.close(self.config.train.batch_size))
                        writer.write(record)
                        progress.train(record)

                for stop in self._stops(start):
                    interval.open()
                    state = run_calls(train_call, state, inputs, self.calls(start, stop), read)
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
        for stop in self._stops(0) if per_call > 1 else ():
            allowed = f"must divide the steps done at each evaluation and checkpoint; there is one after {stop}"
            require(stop % per_call == 0, "train.steps_per_call", per_call, allowed)

    def _epoch(self, step: int) -> float:
        batch_size = self.config.train.batch_size
        return step * batch_size / order.epoch_images(self.info.num_examples, batch_size, self.config.data.drop_last)

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


def _open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir, or checks that it belongs to a run of the same config."""
    field = f"--workdir={str(workdir)!r}"
    path = workdir / "config.json"
    try:
        if distributed.is_main() and not path.exists():
            if (workdir / "checkpoints").exists():
                raise UserError(f"{field}: has checkpoints but no config.json; choose another --workdir")
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, configs.to_dict(config))
        distributed.wait_for_all()
        if not path.exists():
            raise UserError(f"{field}: must be one folder for all processes; process 0 has made another")
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{field}: its config.json is damaged ({error}); choose another --workdir") from error
    except OSError as error:
        raise UserError(f"{field}: cannot be used as a folder: {error.strerror}") from error
    changed = configs.differences(configs.from_dict(saved), config)
    if changed:
        raise ConfigError(f"{field}: holds a run of another config ({'; '.join(changed)}); choose another --workdir")
