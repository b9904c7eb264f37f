"""Exact evaluation: every example of a split counted once, whatever the batch size."""

import functools
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from cifar_flax import compilation, experiment, metrics, report, steps
from cifar_flax import config as configs
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.batches import InputTimer, batch_shapes, evaluation_batches, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.experiment import DatasetInfo
from cifar_flax.state import TrainState
from cifar_flax.writers import evaluation_table, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    summary: dict[str, Any]  # of `metrics.summarize`
    images_per_second: float
    input_wait_fraction: float


class Evaluator:
    """Evaluates states on `examples` of one split; compiles once, outside the time that its rate counts."""

    def __init__(self, task: steps.Task, arrays: Arrays, examples: Int32[np.ndarray, " n"], batch_size: int):
        self._arrays, self._examples = arrays, examples
        self._batch_size = min(batch_size, len(examples))
        self._eval_step = jax.jit(
            functools.partial(steps.eval_step, task), compiler_options=compilation.options(jax.default_backend())
        )
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, state: TrainState) -> Evaluation:
        """Raises `UserError` where the loss is not finite: the network gives no answer worth a number."""
        if self._compiled is None:
            batch_shape = batch_shapes(self._batch_size, self._arrays.images.shape[1:])
            self._compiled = self._eval_step.lower(state.params, state.batch_stats, batch_shape).compile()
        start = time.perf_counter()
        batches = InputTimer(to_device(evaluation_batches(self._arrays, self._examples, self._batch_size)))
        total: metrics.Sums | None = None
        before: metrics.Sums | None = None
        for batch in batches:
            sums = self._compiled(state.params, state.batch_stats, batch)
            if before is not None:  # read while the device works on the next batch
                total = metrics.add(total, jax.device_get(before))
            before = sums
        assert before is not None
        total = metrics.add(total, jax.device_get(before))
        summary = metrics.summarize(total, self._arrays.class_names)
        if not math.isfinite(summary["loss"]):
            raise UserError(f"the evaluation's loss at step {state.step} is {summary['loss']}: training has diverged")
        seconds = time.perf_counter() - start
        return Evaluation(
            summary=summary,
            images_per_second=summary["num_examples"] / seconds,
            input_wait_fraction=batches.seconds / seconds,
        )


def all_examples(arrays: Arrays) -> Int32[np.ndarray, " n"]:
    return np.arange(len(arrays.labels), dtype=np.int32)


def write_result(workdir: Path, result: dict[str, Any]) -> None:
    """Prints the result, so that a full disk loses none of it; writes eval.json and confusion_matrix.png."""
    print(evaluation_table(result))
    write_json(workdir / "eval.json", result)
    report.plot_confusion_matrix(workdir / "confusion_matrix.png", result)
    print(f"\nwritten: {workdir / 'eval.json'}, {workdir / 'confusion_matrix.png'}")


def saved_config(workdir: Path) -> Config:
    """The config saved with the newest checkpoint of `workdir`; raises `UserError` if there is none."""
    with closing(_open_checkpoints(workdir, Config())) as checkpoints:
        return configs.from_dict(checkpoints.metadata(_newest_step(checkpoints, workdir))["config"])


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Evaluates the checkpoint that `config.eval.checkpoint` names on `config.data.eval_split`; returns eval.json."""
    with closing(_open_checkpoints(workdir, config)) as checkpoints:
        step = _newest_step(checkpoints, workdir)
        if config.eval.checkpoint == "best":
            best = checkpoints.best_step()
            if best is None:
                raise UserError(f"--workdir={str(workdir)!r}: none of its checkpoints has a validation accuracy")
            step = best
        info = DatasetInfo.from_dict(checkpoints.metadata(step)["dataset"])
        arrays = sources.load(config.data, config.data.eval_split)
        info.check(arrays)
        task, template = experiment.build(config, info)
        state = checkpoints.restore(step, template)
    evaluation = Evaluator(task, arrays, all_examples(arrays), config.eval.batch_size)(state)
    result = {"dataset": arrays.dataset, "split": config.data.eval_split, "step": step} | evaluation.summary
    write_result(workdir, result)
    return result


def _open_checkpoints(workdir: Path, config: Config) -> Checkpoints:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"--workdir={str(workdir)!r}: holds no checkpoint; train one first")
    return Checkpoints(folder, config.checkpoint, read_only=True)


def _newest_step(checkpoints: Checkpoints, workdir: Path) -> int:
    step = checkpoints.newest_step()
    if step is None:
        raise UserError(f"--workdir={str(workdir)!r}: holds no finished checkpoint; train one first")
    return step
