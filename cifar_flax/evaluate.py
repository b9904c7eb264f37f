"""Exact evaluation: every example of a split counted once, whatever the batch size."""

import contextlib
import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, PyTree

from cifar_flax import averaging, distributed, experiment, metrics, report, steps
from cifar_flax import config as configs
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.data import resident, sources
from cifar_flax.data.batches import Batch, InputTimer, Positions, evaluation_positions, gather, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.experiment import DatasetInfo
from cifar_flax.files import write_json
from cifar_flax.imports import installed
from cifar_flax.parallel import ParallelConfig
from cifar_flax.records import read_record, saved_steps
from cifar_flax.state import TrainState
from cifar_flax.writers import evaluation_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    summary: dict[str, Any]  # of `metrics.summarize`
    images_per_second: float
    input_wait_fraction: float


class _Stopping(Exception):
    pass


class Evaluator:
    """Evaluates states on `examples` of one split; compiles once, outside the time that its rate counts.

    With `tta`, a name in `augment.VIEWS`, the logits of several views of each image are averaged; with `tta_below` too,
    only those of images whose top probability, from the image alone, is below that.
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
        distributed.require_agreement(data=arrays.digest())  # else their numbers of batches might not be the same
        self._task, self._arrays, self._examples = task, arrays, examples
        self._layout = task.layout
        self._batch_size = self._layout.round_up(min(batch_size, len(examples)))
        # A split that is on the device stays there: the compiled step gathers from it.
        self._resident = (arrays.images, arrays.labels) if isinstance(arrays.images, jax.Array) else ()
        self._steps: list[Callable[..., Any]] = [functools.partial(steps.eval_step, task, tta=tta)]
        if tta_below is not None:
            self._steps.insert(0, functools.partial(steps.sure_step, task, below=tta_below))
        self._compiled: list[Callable[..., Any]] = []

    def compile(self, state: TrainState) -> None:
        """Compiles for states like this one; the first evaluation does it where it has not been done."""
        inputs = self._layout.split(next(self._inputs(self._examples)))
        arguments = (self._weights(state), inputs, *self._resident)
        self._compiled = [self._layout.compile(on_inputs(step), *arguments) for step in self._steps]

    def __call__(self, state: TrainState, stopping: Callable[[], int] = lambda: 0) -> Evaluation | None:
        """None where `stopping`, which is asked before each batch, has ended it.

        Raises `UserError` where the loss is not finite: the network gives no answer worth a number.
        """
        if not self._compiled:
            self.compile(state)
        try:
            return self._evaluate(state, stopping)
        except _Stopping:
            return None

    def _evaluate(self, state: TrainState, stopping: Callable[[], int]) -> Evaluation:
        weights, examples = self._weights(state), self._examples
        *sure_step, eval_step = self._compiled
        start, waited = time.perf_counter(), 0.0
        total: metrics.Sums | None = None
        for step in sure_step:
            inputs = InputTimer(to_device(self._inputs(examples), self._layout.split))
            sums, unsure = zip(*self._outputs(step, weights, inputs, stopping), strict=True)
            total = functools.reduce(metrics.add, sums, total)
            examples, waited = examples[np.flatnonzero(np.concatenate(unsure))], inputs.seconds
        inputs = InputTimer(to_device(self._inputs(examples), self._layout.split))
        total = functools.reduce(metrics.add, self._outputs(eval_step, weights, inputs, stopping), total)
        assert total is not None
        summary = metrics.summarize(total, self._arrays.class_names)
        if not math.isfinite(summary["loss"]):
            raise UserError(f"the evaluation's loss at step {state.step} is {summary['loss']}: training has diverged")
        seconds = time.perf_counter() - start
        return Evaluation(
            summary=summary,
            images_per_second=summary["num_examples"] / seconds,
            input_wait_fraction=(waited + inputs.seconds) / seconds,
        )

    def _weights(self, state: TrainState) -> PyTree:
        return averaging.evaluated(self._task.averaging, (state.params, state.batch_stats), state.average)

    def _inputs(self, examples: Int32[np.ndarray, " n"]) -> Iterator[Batch | Positions]:
        """This process' rows of the batches."""
        rows = self._layout.rows(self._batch_size)
        for whole in evaluation_positions(examples, self._batch_size):
            positions = jax.tree.map(operator.itemgetter(rows), whole)
            yield positions if self._resident else gather(self._arrays.images, self._arrays.labels, positions)

    def _outputs(
        self,
        step: Callable[..., Any],
        weights: PyTree,
        inputs: Iterable[Batch | Positions],
        stopping: Callable[[], int],
    ) -> Iterator[Any]:
        """What `step` gives for each batch, read while the device works on the next."""
        before = None
        for batch in inputs:
            if stopping():
                raise _Stopping
            outputs = step(weights, batch, *self._resident)
            if before is not None:
                yield jax.device_get(before)
            before = outputs
        if before is not None:
            yield jax.device_get(before)


def on_inputs(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` for a batch, or for the positions of one with the split to gather it from."""

    def run(weights: PyTree, inputs: Any, images: Array | None = None, labels: Array | None = None) -> Any:
        return step(weights, inputs if images is None else gather(images, labels, inputs))

    return run


def all_examples(arrays: Arrays) -> Int32[np.ndarray, " n"]:
    return np.arange(len(arrays.labels), dtype=np.int32)


def final_evaluator(config: Config, task: steps.Task, arrays: Arrays) -> Evaluator:
    """As the config has the evaluation that counts: with test-time augmentation if wanted."""
    settings = config.eval
    return Evaluator(
        task, arrays, all_examples(arrays), settings.batch_size, tta=settings.tta, tta_below=settings.tta_below
    )


def write_result(workdir: Path, result: dict[str, Any]) -> None:
    """Prints the result, so that a full disk loses none of it; writes eval.json and confusion_matrix.png."""
    if not distributed.is_main():
        return
    _show(evaluation_table(result))
    write_json(workdir / "eval.json", result)
    written = [workdir / "eval.json"]
    if installed("matplotlib"):
        written.append(workdir / "confusion_matrix.png")
        report.plot_confusion_matrix(written[-1], result)
    else:
        _show("\nno picture of the confusion matrix is drawn: matplotlib is not installed")
    _show(f"\nwritten: {', '.join(map(str, written))}")


def _show(text: str) -> None:
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print(text)


def saved_config(workdir: Path) -> Config:
    """The config saved with the newest checkpoint of `workdir`; raises `UserError` if there is none.

    But for `parallel`: an evaluation takes place where it is started. It may be of several processes, so nothing here
    makes JAX look for devices.
    """
    folder = _checkpoint_folder(workdir)
    steps = saved_steps(folder)
    if not steps:
        raise _no_checkpoint(workdir)
    config = configs.from_dict(read_record(folder, steps[-1])["config"])
    config.parallel = ParallelConfig()
    return config


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Evaluates the checkpoint that `config.eval.checkpoint` names on `config.data.eval_split`; returns eval.json."""
    with Checkpoints(_checkpoint_folder(workdir), config.checkpoint, read_only=True) as checkpoints:
        step = checkpoints.newest_step()
        if step is None:
            raise _no_checkpoint(workdir)
        if config.eval.checkpoint == "best":
            best = checkpoints.best_step()
            if best is None:
                raise UserError(f"--workdir={str(workdir)!r}: none of its checkpoints has a validation accuracy")
            step = best
        info = DatasetInfo.from_dict(checkpoints.record(step)["dataset"])
        arrays = sources.load(config.data, config.data.eval_split)
        info.check(arrays)
        task, init = experiment.build(config, info)
        state = checkpoints.restore(step, init(config.seed, None))
    result = {"dataset": arrays.dataset, "split": config.data.eval_split, "step": step}
    if config.eval.tta != "none":
        result |= {"tta": config.eval.tta, "tta_below": config.eval.tta_below}
    arrays = resident.put(arrays, task.layout) if config.data.pipeline == "resident" else arrays
    evaluation = final_evaluator(config, task, arrays)(state)
    assert evaluation is not None
    result |= evaluation.summary
    write_result(workdir, result)
    return result


def _checkpoint_folder(workdir: Path) -> Path:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"--workdir={str(workdir)!r}: holds no checkpoint; train one first")
    return folder


def _no_checkpoint(workdir: Path) -> UserError:
    return UserError(f"--workdir={str(workdir)!r}: holds no finished checkpoint; train one first")
