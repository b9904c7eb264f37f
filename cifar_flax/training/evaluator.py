"""Exact evaluation: every example of a split counts once, for any batch size."""

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32, PyTree

from cifar_flax.config import Config
from cifar_flax.data import resident
from cifar_flax.data.batches import Batch, Indices, InputTimer, evaluation_indices, gather, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError
from cifar_flax.runtime import processes
from cifar_flax.training import metrics, steps
from cifar_flax.training.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    summary: dict[str, Any]  # the result of `metrics.summarize`
    probabilities: Float[np.ndarray, "n classes"]  # one row per example
    images_per_second: float
    input_wait_fraction: float


class Evaluator:
    """Evaluate states on `examples` of one split. Compilation happens once, and is not part of the measured time.

    `tta`, a key of `augment.VIEWS`, averages the logits of several TTA views of each image; with `tta_below`, only of
    images whose confidence without TTA is below this value.
    """

    def __init__(
        self,
        task: steps.Task,
        arrays: Arrays,
        examples: Int32[np.ndarray, " n"],
        batch_size: int,
        *,
        tta: str = "none",
        tta_below: float | None = None,
    ):
        processes.require_agreement(data=arrays.digest())  # else they might run different numbers of batches
        self._task, self._arrays, self._examples = task, arrays, examples
        self._layout = task.layout
        self._batch_size = self._layout.round_up(min(batch_size, len(examples)))
        # If the split is in device memory, the compiled step gathers the batches from it.
        self._resident = (arrays.images, arrays.labels) if isinstance(arrays.images, jax.Array) else ()
        self._steps: list[Callable[..., Any]] = [functools.partial(steps.eval_step, task, tta=tta)]
        if tta_below is not None:
            self._steps.insert(0, functools.partial(steps.eval_step, task, at_least=tta_below))
        self._compiled: list[Callable[..., Any]] = []

    def compile(self, state: TrainState) -> None:
        """Compile for states of the shapes of `state`. Otherwise, the first evaluation compiles."""
        inputs = self._layout.shard_batch(next(self._inputs(self._examples)))
        arguments = (state.evaluated(self._task.averaging), inputs, *self._resident)
        self._compiled = [self._layout.compile(on_inputs(self._task, step), *arguments) for step in self._steps]

    def __call__(self, state: TrainState, stopping: Callable[[], int] = lambda: 0) -> Evaluation | None:
        """Return the evaluation of `state`, or None if `stopping` returned a nonzero number before a batch.

        Raise `UserError` if the loss is not finite.
        """
        if not self._compiled:
            self.compile(state)
        weights, left = state.evaluated(self._task.averaging), np.arange(len(self._examples))
        probabilities = np.empty((len(left), len(self._arrays.class_names)), np.float32)
        start, waited = time.perf_counter(), 0.0
        total: metrics.Sums | None = None
        for step in self._compiled:
            if not len(left):
                break
            inputs = InputTimer(to_device(self._inputs(self._examples[left]), self._layout.shard_batch))
            outputs: list[Any] = []
            for batch in inputs:
                if stopping():
                    return None
                outputs.append(step(weights, batch, *self._resident))
                if len(outputs) > 1:  # read the one before, while the device computes this one
                    outputs[-2] = jax.device_get(outputs[-2])
            sums, rows, counted = zip(*jax.device_get(outputs), strict=True)
            total = functools.reduce(metrics.add, sums, total)
            probabilities[left] = np.concatenate(rows)[: len(left)]
            waited += inputs.seconds
            left = left[~np.concatenate(counted)[: len(left)]]
        assert total is not None
        summary = metrics.summarize(total, self._arrays.class_names)
        _require_finite(summary["loss"], state)
        seconds = time.perf_counter() - start
        return Evaluation(
            summary=summary,
            probabilities=probabilities,
            images_per_second=summary["num_examples"] / seconds,
            input_wait_fraction=waited / seconds,
        )

    def accuracy(self, state: TrainState) -> float:
        """Return only the accuracy of `state`, for benchmarks, after `compile`.

        Without `tta_below`, only the sums of the loss and the confusion matrices are read from the devices.
        Raise `UserError` if the loss is not finite.
        """
        if len(self._compiled) > 1:  # which images get TTA depends on results on the host
            evaluation = self(state)
            assert evaluation is not None
            return evaluation.summary["accuracy"]
        (step,), weights = self._compiled, state.evaluated(self._task.averaging)
        inputs = to_device(self._inputs(self._examples), self._layout.shard_batch)
        sums = [step(weights, batch, *self._resident)[0] for batch in inputs]
        loss, confusion = (sum(jax.device_get([one[name] for one in sums])) for name in ("loss", "confusion"))
        _require_finite(float(loss), state)
        return int(np.trace(confusion)) / int(np.sum(confusion))

    def _inputs(self, examples: Int32[np.ndarray, " n"]) -> Iterator[Batch | Indices]:
        """Yield this process's rows of the batches."""
        rows = self._layout.local_slice(self._batch_size)
        for whole in evaluation_indices(examples, self._batch_size):
            indices = jax.tree.map(operator.itemgetter(rows), whole)
            yield indices if self._resident else gather(self._arrays.images, self._arrays.labels, indices)


def _require_finite(loss: float, state: TrainState) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the evaluation loss at step {state.step} is {loss}: training has diverged")


def on_inputs(task: steps.Task, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs `step` on a batch, or on the batch that it gathers from a split by indices."""

    def run(weights: PyTree, inputs: Any, *split: Any) -> Any:
        if split:
            images, labels = split
            inputs = resident.gather(images, labels, inputs, task.image_shape)
        return step(weights, inputs)

    return run


def all_examples(arrays: Arrays) -> Int32[np.ndarray, " n"]:
    """Return the indices of all examples of a split."""
    return np.arange(len(arrays.labels), dtype=np.int32)


def final_evaluator(config: Config, task: steps.Task, arrays: Arrays) -> Evaluator:
    """Return the evaluator for the final evaluation, with the test-time augmentation of `config.eval`."""
    settings = config.eval
    return Evaluator(
        task, arrays, all_examples(arrays), settings.batch_size, tta=settings.tta, tta_below=settings.tta_below
    )
