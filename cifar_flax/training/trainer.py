"""Load the data, build the network, and provide the inputs and the compiled calls of the training loop."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from cifar_flax import models, packages
from cifar_flax.config import Config
from cifar_flax.data import order, resident, sources
from cifar_flax.data.batches import GROUP, empty_batch, empty_indices, to_device
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import UserError, require
from cifar_flax.runtime import processes
from cifar_flax.training import evaluator, steps
from cifar_flax.training.evaluator import Evaluator
from cifar_flax.training.setup import setup
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import Inputs, TrainCall


class Trainer:
    """Everything that the training loop needs for a config: its data, network, initial state and evaluator."""

    def __init__(self, config: Config, devices: Sequence[jax.Device] | None = None):
        """Train on `devices` (default: all).

        Raise `ConfigError` if the config does not fit the data, `UserError` if the data cannot be loaded.
        """
        self.config = config
        if config.data.pipeline == "streaming":
            packages.require(["tensorflow"], "data.pipeline='streaming' needs TensorFlow (resident does not)")
        self.arrays = sources.load(config.data, config.data.train_split)
        eval_arrays = sources.load(config.data, config.data.eval_split)
        fraction = config.data.validation_fraction
        self.examples, held_out = order.split_validation(len(self.arrays.labels), fraction)
        fits = len(self.examples) > 0 and (fraction == 0 or len(held_out) > 0)
        allowed = "must leave at least one training and one validation example"
        require(fits, "data.validation_fraction", fraction, allowed)
        if self.arrays.dataset != eval_arrays.dataset:
            both = f"{self.arrays.dataset} and {eval_arrays.dataset}"
            raise UserError(f"data.name={config.data.name!r}: the train and the evaluation split are of {both}")
        self.info = DatasetInfo.of(self.arrays, self.examples, config.augment.normalization)
        self.info.check(eval_arrays)
        self.task, init = setup(config, self.info, devices)
        self.layout = self.task.layout
        self.layout.require_divides("train.batch_size", config.train.batch_size)
        processes.require_agreement(data=self.arrays.digest())
        # Copied to the devices once, for all seeds.
        size = models.network_class(config.model).sample_size
        sample = self.layout.replicate(self.arrays.images[self.examples[:size]]) if size else None
        self.init = lambda seed: init(seed, sample)
        if config.data.pipeline == "resident":
            self.arrays, eval_arrays = (resident.put(arrays, self.layout) for arrays in (self.arrays, eval_arrays))
        self.eval_arrays = eval_arrays
        self.initial_state = self.init(config.seed)
        self.total_steps = self.task.total_steps
        self._check_calls()
        # Evaluate on the validation split during training. Without one, evaluate on eval_split, for the curves only.
        self.has_validation = len(held_out) > 0
        if self.has_validation:
            self.monitored_split = "validation"
            self.evaluator = Evaluator(self.task, self.arrays, held_out, config.eval.batch_size)
        else:
            # The log uses "train" for the training metrics.
            self.monitored_split = config.data.eval_split if config.data.eval_split != "train" else "evaluation"
            everything = evaluator.all_examples(eval_arrays)
            self.evaluator = Evaluator(self.task, eval_arrays, everything, config.eval.batch_size)

    def require_same_data(self, saved: dict[str, Any]) -> None:
        """Raise `UserError` unless `saved`, the metadata of a checkpoint, describes the same data."""
        was = DatasetInfo.from_dict(saved)
        for field in dataclasses.fields(was):
            before, now = getattr(was, field.name), getattr(self.info, field.name)
            if before != now:
                change = f"{field.name}: {before} in the checkpoint, {now} in the data"
                raise UserError(f"the checkpoint was trained on other data ({change}); choose another --workdir")

    def inputs(self, seed: int, start: int) -> Iterator[Inputs]:
        """Yield the inputs of the calls from step `start` on, in device memory."""
        per_call = self.config.train.steps_per_call
        settings: dict[str, Any] = {
            "batch_size": self.config.train.batch_size,
            "drop_last": self.config.data.drop_last,
            "seed": seed,
            "start": start,
            "stop": self.total_steps,
            "rows": self.layout.local_slice(self.config.train.batch_size),
        }
        if self.config.data.pipeline == "resident":
            indices = resident.training_indices(self.examples, steps_per_call=per_call, **settings)
            put = functools.partial(self.layout.shard_batch, batch_axis=1)
            return to_device(indices, put, GROUP if per_call == 1 else 1)  # a call of many steps is a group in itself
        # Imported late, since TensorFlow takes seconds and hundreds of megabytes.
        from cifar_flax.data.streaming import training_batches

        return to_device(training_batches(self.arrays, self.examples, **settings), self.layout.shard_batch)

    def compile(self, state: TrainState) -> TrainCall:
        """Compile a call for states of the shapes of `state`."""
        program, split = self.program(state)
        return lambda state, inputs: program(state, inputs, *split)

    def program(self, state: TrainState) -> tuple[jax.stages.Compiled, tuple[jax.Array, ...]]:
        """Return the compiled program of a call, and its arguments after the state and the inputs."""
        rows = self.layout.local_slice(self.config.train.batch_size)
        local_size = rows.stop - rows.start
        if self.config.data.pipeline == "resident":
            indices = self.layout.shard_batch(empty_indices(self.config.train.steps_per_call, local_size), batch_axis=1)
            split = self.arrays.images, self.arrays.labels
            train_steps = functools.partial(steps.train_steps, self.task)
            return self.layout.compile(train_steps, state, indices, *split, batch_axis=1, donate=True), split
        batch = self.layout.shard_batch(empty_batch(local_size, self.info.image_shape))
        return self.layout.compile(functools.partial(steps.train_step, self.task), state, batch, donate=True), ()

    def calls(self, start: int, stop: int) -> range:
        """Return the number of finished steps after each call from step `start` to step `stop`."""
        per_call = self.config.train.steps_per_call
        return range(start + per_call, stop + 1, per_call)

    def _check_calls(self) -> None:
        per_call = self.config.train.steps_per_call
        for stop in self.stops(1) if per_call > 1 else ():
            allowed = f"must divide the number of steps before each evaluation and checkpoint, such as {stop}"
            require(stop % per_call == 0, "train.steps_per_call", per_call, allowed)

    def epoch(self, step: int) -> float:
        """Return the number of finished epochs after `step` steps."""
        batch_size = self.config.train.batch_size
        return step * batch_size / order.epoch_images(self.info.num_examples, batch_size, self.config.data.drop_last)

    def is_due(self, step: int, every_epochs: int) -> bool:
        """Return whether `step` is the last step or the first that completes a multiple of `every_epochs` epochs."""
        completed = math.floor(self.epoch(step)) // every_epochs
        return step == self.total_steps or completed > math.floor(self.epoch(step - 1)) // every_epochs

    def stops(self, first: int) -> Iterator[int]:
        """Yield the steps from `first` on after which the loop evaluates or saves."""
        due = (self.config.eval.every_epochs, self.config.checkpoint.every_epochs)
        for step in range(max(first, 1), self.total_steps + 1):
            if any(self.is_due(step, every) for every in due):
                yield step
