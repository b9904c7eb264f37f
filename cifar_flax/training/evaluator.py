"""Exact evaluation: every example of a split counts once, for any batch size."""

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PyTree

from cifar_flax.config import Config
from cifar_flax.data import resident
from cifar_flax.data.batches import Batch, Indices, InputTimer, evaluation_indices, gather, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import DivergedError
from cifar_flax.runtime import processes
from cifar_flax.runtime.devices import Layout
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

    `tta`, a key of `augment.VIEWS`, averages the logits of several TTA views of each image. With a `tta_fraction` below
    1, a first pass evaluates all images without TTA. A second pass then evaluates this fraction of them with TTA: those
    of lowest confidence in the first pass and, of equal ones, the first in `examples`.
    """

    def __init__(
        self,
        task: steps.Task,
        arrays: Arrays,
        examples: Int32[np.ndarray, " n"],
        batch_size: int,
        *,
        tta: str = "none",
        tta_fraction: float = 1.0,
    ):
        processes.require_agreement(data=arrays.digest())  # else they might run different numbers of batches
        self._task, self._arrays, self._examples = task, arrays, examples
        self._layout = task.layout
        self._passes = evaluation_passes(len(examples), tta, tta_fraction)
        self._batch_sizes = batch_sizes(self._passes, batch_size, self._layout)
        # If the split is in device memory, the compiled step gathers the batches from it.
        self._resident = (arrays.images, arrays.labels) if isinstance(arrays.images, jax.Array) else ()
        self._compiled: list[Callable[..., Any]] = []

    def compile(self, state: TrainState) -> None:
        """Compile once, for states of the shapes of `state`. Otherwise, the first evaluation compiles."""
        if self._compiled:
            return
        weights = state.evaluated(self._task.averaging)
        compiled: list[Callable[..., Any]] = []
        for step, batch_size in zip(pass_steps(self._task, self._passes), self._batch_sizes, strict=True):
            inputs = self._layout.shard_batch(next(self._inputs(self._examples, batch_size)))
            compiled.append(self._layout.compile(step, weights, inputs, *self._resident))
        if len(self._passes) > 1:
            self._labels = np.asarray(jax.device_get(self._arrays.labels), np.int32)[self._examples]
            count = len(self._labels)
            logits = jax.ShapeDtypeStruct((count, len(self._arrays.class_names)), np.float32)
            lowered = jax.jit(_from_logits).lower(logits, jax.ShapeDtypeStruct((count,), np.int32))
            self._from_logits = lowered.compile(compiler_options=self._layout.compiler_options)
        self._compiled = compiled

    def __call__(self, state: TrainState, stopping: Callable[[], int] = lambda: 0) -> Evaluation | None:
        """Return the evaluation of `state`, or None if `stopping` returned a nonzero number before a batch.

        Raise `DivergedError` if the loss is not finite.
        """
        self.compile(state)
        weights, count = state.evaluated(self._task.averaging), len(self._examples)
        chosen = np.arange(count)
        rows = np.empty((count, len(self._arrays.class_names)), np.float32)
        start, waited = time.perf_counter(), 0.0
        per_batch: tuple[Any, ...] = ()
        for (size, _), batch_size, step in zip(self._passes, self._batch_sizes, self._compiled, strict=True):
            if size < count:
                # The steps return the confidences to all processes, so that all choose the same images.
                chosen = np.argsort(np.concatenate(per_batch)[:count], kind="stable")[:size]
            batches = self._inputs(self._examples[chosen], batch_size)
            inputs = InputTimer(to_device(batches, self._layout.shard_batch))
            outputs: list[Any] = []
            for batch in inputs:
                if stopping():
                    return None
                outputs.append(step(weights, batch, *self._resident))
                if len(outputs) > 1:  # read the one before, while the device computes this one
                    outputs[-2] = jax.device_get(outputs[-2])
            # Sums and probabilities or, if there are two passes, confidences and logits.
            per_batch, found = zip(*jax.device_get(outputs), strict=True)
            rows[chosen] = np.concatenate(found)[:size]
            waited += inputs.seconds
        if len(self._passes) > 1:
            sums, rows = jax.device_get(self._from_logits(*jax.device_put((rows, self._labels))))
            per_batch = (sums,)
        total = functools.reduce(metrics.add, per_batch, None)
        assert total is not None
        summary = metrics.summarize(total, self._arrays.class_names)
        _require_finite(summary["loss"], state)
        seconds = time.perf_counter() - start
        return Evaluation(
            summary=summary,
            probabilities=rows,
            images_per_second=summary["num_examples"] / seconds,
            input_wait_fraction=waited / seconds,
        )

    def accuracy(self, state: TrainState) -> float:
        """Return only the accuracy of `state`, for benchmarks, after `compile`.

        If all images get the same TTA, only the sums of the loss and the confusion matrices are read from the devices.
        Raise `DivergedError` if the loss is not finite.
        """
        if len(self._passes) > 1:
            evaluation = self(state)
            assert evaluation is not None
            return evaluation.summary["accuracy"]
        (step,), weights = self._compiled, state.evaluated(self._task.averaging)
        inputs = to_device(self._inputs(self._examples, self._batch_sizes[0]), self._layout.shard_batch)
        sums = [step(weights, batch, *self._resident)[0] for batch in inputs]
        loss, confusion = (sum(jax.device_get([one[name] for one in sums])) for name in ("loss", "confusion"))
        _require_finite(float(loss), state)
        return int(np.trace(confusion)) / int(np.sum(confusion))

    def _inputs(self, examples: Int32[np.ndarray, " n"], batch_size: int) -> Iterator[Batch | Indices]:
        """Yield this process's rows of the batches."""
        rows = self._layout.local_slice(batch_size)
        for whole in evaluation_indices(examples, batch_size):
            indices = jax.tree.map(operator.itemgetter(rows), whole)
            yield indices if self._resident else gather(self._arrays.images, self._arrays.labels, indices)


def evaluation_passes(num_images: int, tta: str, fraction: float) -> list[tuple[int, str]]:
    """Return, for each pass of an evaluation with this `fraction` of TTA, its number of images and its TTA.

    The TTA is a key of `VIEWS`, so a pass evaluates its number of images times `len(VIEWS[tta])` TTA views.
    """
    size = max(round(fraction * num_images), 1)
    if tta == "none" or size == num_images:
        return [(num_images, tta)]
    return [(num_images, "none"), (size, tta)]


def batch_sizes(passes: list[tuple[int, str]], batch_size: int, layout: Layout) -> list[int]:
    """Return the batch size of each of the `evaluation_passes`, in batches of at most `batch_size` images."""
    sizes = [min(batch_size, passes[0][0])]
    for count, _ in passes[1:]:  # batches of equal size, because padding would cost TTA views
        sizes.append(math.ceil(count / math.ceil(count / batch_size)))
    return [layout.round_up(size) for size in sizes]


def pass_steps(task: steps.Task, passes: list[tuple[int, str]]) -> list[Callable[..., Any]]:
    """Return the function that each of the `evaluation_passes` compiles, as `on_inputs` returns it."""
    step = steps.eval_step if len(passes) == 1 else steps.logits_step
    return [on_inputs(task, functools.partial(step, task, tta=tta)) for _, tta in passes]


def _from_logits(
    logits: Float[Array, "n classes"], label: Int32[Array, " n"]
) -> tuple[metrics.Sums, Float[Array, "n classes"]]:
    """Return the sums of the metrics over all rows, and the probabilities."""
    return metrics.evaluation_sums(logits, label, jnp.ones(label.shape, bool)), jax.nn.softmax(logits)


def _require_finite(loss: float, state: TrainState) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"the evaluation loss at step {state.step} is {loss}: training has diverged")


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


def final_evaluator(
    config: Config, task: steps.Task, arrays: Arrays, examples: Int32[np.ndarray, " n"] | None = None
) -> Evaluator:
    """Return the evaluator for the final evaluation of `examples` (default: all), with the TTA of `config.eval`."""
    settings = config.eval
    examples = all_examples(arrays) if examples is None else examples
    return Evaluator(task, arrays, examples, settings.batch_size, tta=settings.tta, tta_fraction=settings.tta_fraction)
