"""Compile the training and evaluation programs of a config, for devices that may be absent."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from cifar_flax.config import Config
from cifar_flax.data import pipelines
from cifar_flax.data.batches import empty_batch, empty_indices
from cifar_flax.data.info import DatasetInfo
from cifar_flax.data.resident import row_bytes
from cifar_flax.models.flops import matrix_flops
from cifar_flax.training import evaluator, steps
from cifar_flax.training.setup import setup
from cifar_flax.training.timetable import Timetable
from cifar_flax.training.trainer import training_program

# CIFAR-10 without its images; the statistics are constants of the programs, whose values do not matter.
DATASET = DatasetInfo(
    name="cifar10",
    image_shape=(32, 32, 3),
    class_names=tuple("0123456789"),
    num_examples=50_000,
    mean=(0.0,) * 3,
    std=(255.0,) * 3,
)
TEST_EXAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled program of a config."""

    name: str  # train, or frozen with frozen groups, and the side in pixels | eval | final, final_2 (its TTA)
    steps: int  # training steps (the most, if calls differ) or evaluation batches that one call runs
    flops: float  # of convolutions and matrix products, per step and device
    seconds: float  # to compile
    compiled: jax.stages.Compiled


def programs(config: Config, devices: Sequence[jax.Device], options: dict[str, Any]) -> Iterator[Program]:
    """Yield the programs that a run with `config` on `devices` calls, compiled with XLA's compiler `options`.

    Raise `ConfigError` if the config does not fit the devices.
    """
    task, init = setup(config, DATASET, devices)
    layout, shape = task.layout, DATASET.image_shape
    layout.require_divides("train.batch_size", config.train.batch_size)
    options = layout.compiler_options | options
    state = jax.eval_shape(lambda: init(0, None))
    num_bytes = (DATASET.num_examples + TEST_EXAMPLES) * math.prod(shape)
    pipeline = pipelines.resolve(config.data.pipeline, layout, num_bytes)
    resident = pipeline == "resident"

    def split(size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return the arguments of a program that are in device memory: a split, or nothing."""
        arrays = jax.ShapeDtypeStruct((size, row_bytes(shape)), "uint8"), jax.ShapeDtypeStruct((size,), "int32")
        return arrays if resident else ()

    def build(
        name: str, count: int, step: Callable[..., Any], state: Any, inputs: Any, *shared: Any, **settings: Any
    ) -> Program:
        function = layout.parallelize(step, shared=len(shared), **settings)
        traced = function.trace(state, inputs, *shared)
        flops = matrix_flops(traced.jaxpr, unknown=count) / count
        start = time.perf_counter()
        compiled = traced.lower().compile(compiler_options=options)
        return Program(name, count, flops, time.perf_counter() - start, compiled)

    size, timetable = config.train.batch_size, Timetable(config, DATASET.num_examples, task, pipeline)
    lengths = timetable.lengths()
    step, inputs, batch_axis, settings = steps.train_step, empty_batch(size, shape), 0, {}
    shared = jax.ShapeDtypeStruct(task.learning_rates.shape, "float32"), *split(DATASET.num_examples)
    if resident:
        step, inputs, batch_axis = steps.train_steps, empty_indices(timetable.steps_per_call, size), 1
        if len(lengths) == 1:
            settings = {"count": max(lengths)}
        else:
            shared = (*shared, jax.ShapeDtypeStruct((), "int32"))
    names: list[str] = []
    for first, phase in steps.phases(task):
        name = ("frozen" if phase.frozen else "train") + (f"_{phase.side}" if phase.side else "")
        names.append(f"{name}_from_{first}" if name in names else name)
        arguments = state, inputs, *shared
        program = training_program(step, phase, **settings)
        yield build(names[-1], max(lengths), program, *arguments, batch_axis=batch_axis, donate=True)
    weights = state.evaluated(task.averaging)
    evaluations = {"eval": [(TEST_EXAMPLES, "none")]}
    if config.eval.tta != "none":
        evaluations["final"] = evaluator.evaluation_passes(TEST_EXAMPLES, config.eval.tta, config.eval.tta_fraction)
    for name, passes in evaluations.items():
        sizes = evaluator.batch_sizes(passes, config.eval.batch_size, layout)
        for number, (step, size) in enumerate(zip(evaluator.pass_steps(task, passes), sizes, strict=True), 1):
            inputs = empty_indices(size) if resident else empty_batch(size, shape)
            full_name = name if number == 1 else f"{name}_{number}"
            yield build(full_name, 1, step, weights, inputs, *split(TEST_EXAMPLES))
