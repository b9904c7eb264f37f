"""--mode=eval: evaluate a checkpoint of a run, and write eval.json and the report."""

import contextlib
from pathlib import Path
from typing import Any

from cifar_flax.config import Config
from cifar_flax.data import pipelines, resident, sources
from cifar_flax.errors import UserError
from cifar_flax.files import write_json
from cifar_flax.report import confusion
from cifar_flax.report.run import write_report
from cifar_flax.restore import restore
from cifar_flax.runtime import processes
from cifar_flax.telemetry.console import evaluation_table, show
from cifar_flax.telemetry.tensorboard import write_evaluation_events
from cifar_flax.training.evaluator import final_evaluator


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Evaluate the checkpoint `config.eval.checkpoint` on `config.data.eval_split`; return the content of eval.json."""
    run = restore(config, workdir)
    arrays = sources.load(config.data, config.data.eval_split)
    run.info.check(arrays)
    is_resident = pipelines.resolve(config.data.pipeline, run.task.layout, arrays.nbytes) == "resident"
    on_device = resident.put(arrays, run.task.layout) if is_resident else arrays
    evaluation = final_evaluator(config, run.task, on_device)(run.state)
    assert evaluation is not None
    result = {"dataset": arrays.dataset, "split": config.data.eval_split, "step": run.step}
    if config.eval.tta != "none":
        result |= {"tta": config.eval.tta, "tta_below": config.eval.tta_below}
    result |= evaluation.summary
    if processes.is_main():
        show(evaluation_table(result))  # first, so that it is not lost if the disk is full
        write_json(workdir / "eval.json", result)
        write_report(workdir, result, run.metadata, arrays, evaluation.probabilities)
        written = [workdir / "eval.json", workdir / "report.html", *_plot(workdir, result)]
        show(f"\nwritten: {', '.join(map(str, written))}")
    return result


def _plot(workdir: Path, result: dict[str, Any]) -> list[Path]:
    """Write the confusion matrix as a PNG and to TensorBoard, unless a package is missing; return the PNG's path."""
    path = workdir / "confusion_matrix.png"
    try:
        size = confusion.plot(path, result)
    except UserError as error:
        show(f"\n{path.name} is not written: {error}")
        return []
    with contextlib.suppress(UserError):  # training reports a missing tensorboardX
        write_evaluation_events(workdir, result, path, size)
    return [path]
