"""Load the data, build the network, and provide the inputs and the compiled calls of the training loop."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cifar_flax import models
from cifar_flax.config import Config
from cifar_flax.data import order, pipelines, resident, sources, streaming
from cifar_flax.data.batches import GROUP, empty_batch, empty_indices, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import PUBLIC
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import UserError, require
from cifar_flax.runtime import processes
from cifar_flax.training import averaging, evaluator, steps
from cifar_flax.training.evaluator import Evaluator
from cifar_flax.training.metrics import StepMetrics
from cifar_flax.training.setup import checked_layout, require_resolutions, setup
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import Call, Task
from cifar_flax.training.timetable import Timetable


def require_startable(config: Config, devices: Sequence[jax.Device] | None = None) -> None:
    """Raise `UserError` if a run of `config` on `devices` (default: all) would fail whatever its data."""
    checked_layout(config, devices).require_divides("train.batch_size", config.train.batch_size)


def training_program(step: Callable[..., Any], task: Task, **settings: Any) -> Callable[..., Any]:
    """Return `step` of `task` as a function (state, inputs, learning rates, *split) -> (state, metrics).

    `step` is `train_step` or `train_steps` of steps.py, `settings` are keyword arguments of it. The learning rates, a
    table as `Task.learning_rates`, are an argument: runs that differ only in their schedules share a compiled program.
    """

    def run(state: TrainState, inputs: Any, rates: Any, *split: Any) -> tuple[TrainState, StepMetrics]:
        return step(dataclasses.replace(task, rates=rates), state, inputs, *split, **settings)

    run.__name__ = step.__name__  # which profiles show
    return run


class Trainer:
    """Everything that the training loop needs for a config: its data, network, initial state and evaluator."""

    def __init__(
        self,
        config: Config,
        devices: Sequence[jax.Device] | None = None,
        splits: Sequence[Arrays] | None = None,
    ):
        """Train on `devices` (default: all) and `splits`, the return value of `sources.load_both` (default: load them).

        Raise `ConfigError` if the config does not fit the data, `UserError` if the data cannot be loaded.
        """
        self.config = config
        require_startable(config, devices)
        self.arrays, eval_arrays = splits or sources.load_both(config.data)
        fraction = config.data.validation_fraction
        self.examples, self.held_out = order.split_validation(len(self.arrays.labels), fraction)
        fits = len(self.examples) > 0 and (fraction == 0 or len(self.held_out) > 0)
        allowed = "must leave at least one training and one validation example"
        require(fits, "data.validation_fraction", fraction, allowed)
        if self.arrays.dataset != eval_arrays.dataset:
            both = f"{self.arrays.dataset} and {eval_arrays.dataset}"
            raise UserError(f"data.name={config.data.name!r}: the train and the evaluation split are of {both}")
        self.info = dataclasses.replace(
            DatasetInfo.of(self.arrays, self.examples, config.augment.normalization),
            checksum=self.arrays.checksum(),
            eval_checksum=eval_arrays.checksum(),
        )
        self.info.check(eval_arrays)
        if config.data.is_folder:
            allowed = "must leave at least one training image of each class"
            require(min(self.info.class_counts) > 0, "data.validation_fraction", fraction, allowed)
        require_resolutions(config, self.info.image_shape, len(self.info.class_names))
        task, init = setup(config, self.info, devices)
        self.task = dataclasses.replace(task, rates=task.learning_rates)  # computed once
        self.layout = self.task.layout
        self.pipeline = pipelines.resolve(
            config.data.wanted_pipeline, self.layout, self.arrays.nbytes + eval_arrays.nbytes
        )
        self.no_tensorflow = ""  # a line that reports why tf.data cannot be used
        is_array = isinstance(self.arrays.images, np.ndarray)
        if self.pipeline == "streaming" and is_array and (fault := streaming.tensorflow_fault()):
            self.no_tensorflow = f"data.pipeline: batches are gathered with NumPy, not tf.data: {fault}"
        processes.require_agreement(data=self.arrays.digest(), pipeline=self.pipeline)
        self._classes = self.arrays.labels[self.examples] if config.data.sampling == "balanced" else None
        # Copied to the devices once, for all seeds. A folder is sorted by class, so take images from all of it.
        size = models.network_class(config.model).sample_size
        spread = max(len(self.examples) // size, 1) if size and config.data.is_folder else 1
        sample = self.layout.replicate(self.arrays.images[self.examples[::spread][:size]]) if size else None
        self.init = lambda seed: init(seed, sample)
        if self.pipeline == "resident":
            self.arrays, eval_arrays = (resident.put(arrays, self.layout) for arrays in (self.arrays, eval_arrays))
        self.eval_arrays = eval_arrays
        # Compiled once for all seeds: (params, batch_stats) -> (opt_state, average)
        self.initialize_optimizer = jax.jit(
            lambda weights: (task.optimizer.init(weights[0]), averaging.init(config.averaging, weights)),
            out_shardings=task.layout.replicated,
        )
        self.programs: dict[Any, jax.stages.Compiled] = {}  # the compiled calls, by phase
        self.total_steps = self.task.total_steps
        self.timetable = Timetable(config, len(self.examples), self.task, self.pipeline)
        # Evaluate on the validation split during training. Without one, evaluate on eval_split, for the curves only.
        self.has_validation = len(self.held_out) > 0
        self.monitored_split, monitored = "validation", (self.arrays, self.held_out)
        if not self.has_validation:  # the log uses "train" for the training metrics
            self.monitored_split = config.data.eval_split if config.data.eval_split != "train" else "evaluation"
            monitored = eval_arrays, evaluator.all_examples(eval_arrays)
        self.evaluator = Evaluator(self.task, *monitored, config.eval.batch_size)

    @functools.cached_property
    def initial_state(self) -> TrainState:
        return self.init(self.config.seed)

    def for_config(self, config: Config) -> "Trainer":
        """Return the trainer for `config`, whose `config.program_settings` are equal; it shares data and programs.

        Raise `ConfigError` if its schedule does not fit the run.
        """
        other = copy.copy(self)
        other.config = config
        task = dataclasses.replace(self.task, optim=config.optim, rates=None)
        other.task = dataclasses.replace(task, rates=task.learning_rates)
        other.__dict__.pop("initial_state", None)
        return other

    def require_same_data(self, saved: dict[str, Any]) -> None:
        """Raise `UserError` unless `saved`, the metadata of a checkpoint, describes the same data."""
        was, now, data = DatasetInfo.from_dict(saved), self.info, self.config.data
        is_known = was.checksum != ""
        others = ("image_shape", "mean", "std", "class_counts")
        changes = {
            f"{was.name} before, {now.name} now": was.name != now.name and not is_known,  # a folder may be renamed
            f"{len(was.class_names)} classes before, {len(now.class_names)} now": was.class_names != now.class_names,
            f"{was.num_examples} training images before, {now.num_examples} now": was.num_examples != now.num_examples,
            f"images or labels of the {data.train_split} split": is_known and was.checksum != now.checksum,
            f"images or labels of the {data.eval_split} split": is_known and was.eval_checksum != now.eval_checksum,
        } | {name: getattr(was, name) != getattr(now, name) for name in others if name in saved}
        if changed := [change for change, is_changed in changes.items() if is_changed]:
            # Files from different sources may have another order.
            source = f" (it was {was.name}; see data.source, data.archive)" if data.name in PUBLIC else ""
            raise UserError(
                f"the data has changed since the checkpoint was saved ({changed[0]}): restore the data{source}, or "
                "choose another --workdir; train.init_from starts from the weights of this run"
            )

    def inputs(self, seed: int, start: int) -> Iterator[Call]:
        """Yield the calls from step `start` on, with their inputs in device memory."""
        settings: dict[str, Any] = {
            "batch_size": self.config.train.batch_size,
            "drop_last": self.config.data.drop_last,
            "seed": seed,
            "start": start,
            "stop": self.total_steps,
            "classes": self._classes,
            "rows": self.layout.local_slice(self.config.train.batch_size),
        }
        ends, calls = itertools.tee(self.timetable.calls(start, self.total_steps))
        batch_axis, per_call = 0, self.timetable.steps_per_call
        inputs: Iterator[Any]
        if self.pipeline == "resident":
            batch_axis = 1
            inputs = resident.training_indices(self.examples, ends=ends, steps_per_call=per_call, **settings)
        else:
            inputs = streaming.training_batches(self.arrays, self.examples, **settings)
        spans = itertools.pairwise(itertools.chain([start], calls))
        paired: Iterator[tuple[tuple[int, int], Any]] = zip(spans, inputs, strict=True)
        on_host = (Call(*span, one) for span, one in paired)

        def put(call: Call) -> Call:
            return dataclasses.replace(call, inputs=self.layout.shard_batch(call.inputs, batch_axis))

        return to_device(on_host, put, GROUP if per_call == 1 else 1)  # a call of many steps is a group in itself

    def compile(self, state: TrainState, start: int = 0) -> "TrainCalls":
        """Compile the calls from step `start` on that are not in `programs`, for states of the shapes of `state`."""
        rows = self.layout.local_slice(self.config.train.batch_size)
        local_size, lengths = rows.stop - rows.start, self.timetable.lengths(start)
        step: Callable[..., Any] = steps.train_step
        inputs: Any = empty_batch(local_size, self.info.image_shape)
        settings: dict[str, Any] = {}
        shared: tuple[Any, ...] = (self.layout.replicate(self.task.learning_rates),)
        counts: dict[int, tuple[Any, ...]] = dict.fromkeys(lengths, ())
        batch_axis = 0
        if self.pipeline == "resident":
            step, inputs, batch_axis = steps.train_steps, empty_indices(self.timetable.steps_per_call, local_size), 1
            shared = *shared, self.arrays.images, self.arrays.labels
            if len(lengths) == 1:
                settings = {"count": max(lengths)}
            else:
                counts = {length: (self.layout.replicate(np.int32(length)),) for length in lengths}
        arguments = state, self.layout.shard_batch(inputs, batch_axis), *shared, *counts[max(lengths)]
        found = []
        for first, task in steps.phases(self.task, start):
            key = task.frozen, task.side, *settings.values()
            if key not in self.programs:
                program = training_program(step, task, **settings)
                self.programs[key] = self.layout.compile(program, *arguments, batch_axis=batch_axis, donate=True)
            found.append((first, self.programs[key]))
        return TrainCalls(found, {length: (*shared, *count) for length, count in counts.items()})


class TrainCalls:
    """The compiled calls of a run, a `TrainCall`."""

    def __init__(self, programs: list[tuple[int, jax.stages.Compiled]], shared: Mapping[int, tuple[jax.Array, ...]]):
        """`programs` are in order, each with its first step; `shared` has their last arguments by the call's length."""
        self._programs, self._shared = programs, shared

    def __call__(self, state: TrainState, call: Call) -> tuple[TrainState, StepMetrics]:
        new_state, values = self.program(call.start)(state, call.inputs, *self._shared[call.stop - call.start])
        return new_state, values

    def program(self, start: int) -> jax.stages.Compiled:
        """Return the program of the calls that begin after `start` steps."""
        return [program for first, program in self._programs if first <= start][-1]
