"""--mode=eval: evaluate a checkpoint of a run, and write eval.json and the report."""

from pathlib import Path
from typing import Any

from cifar_flax import packages
from cifar_flax.config import Config
from cifar_flax.data import pipelines, resident, sources
from cifar_flax.errors import UserError, one_line
from cifar_flax.files import write_json
from cifar_flax.report import confusion
from cifar_flax.report.run import write_report
from cifar_flax.restore import RestoredRun, restore
from cifar_flax.runtime import processes
from cifar_flax.runtime.streams import show
from cifar_flax.telemetry.console import evaluation_table
from cifar_flax.telemetry.tensorboard import write_evaluation_events
from cifar_flax.training.evaluator import Evaluation, Evaluator, final_evaluator


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Evaluate the checkpoint `config.eval.checkpoint` on `config.data.eval_split`; return the content of eval.json."""
    run = restore(config, workdir)
    arrays = sources.load(config.data, config.data.eval_split)
    run.info.check(arrays)
    if run.info.eval_checksum not in ("", arrays.checksum()):
        changed = f"the {config.data.eval_split} split has changed since the checkpoint was saved"
        processes.log(f"{changed}: other images, or another order")
    is_resident = pipelines.resolve(config.data.wanted_pipeline, run.task.layout, arrays.nbytes) == "resident"
    on_device = resident.put(arrays, run.task.layout) if is_resident else arrays
    evaluator, split = final_evaluator(config, run.task, on_device), config.data.eval_split
    result, evaluation = evaluated(run, evaluator, dataset=arrays.dataset, split=split)
    if processes.is_main():
        show(evaluation_table(result))  # first, so that it is not lost if the disk is full
        written, failed = write(workdir, result, run.metadata, arrays, evaluation.probabilities)
        show(f"\nwritten: {', '.join(map(str, written))}")
        if failed:
            raise UserError("; ".join(failed))
    return result


def evaluated(run: RestoredRun, evaluator: Evaluator, **data: str) -> tuple[dict[str, Any], Evaluation]:
    """Return the evaluation of `run`, as the content of eval.json and as it is; `data` are its dataset and split."""
    evaluation, settings = evaluator(run.state), run.config.eval
    assert evaluation is not None
    result: dict[str, Any] = {**data, "step": run.step}
    if settings.tta != "none":
        result |= {"tta": settings.tta, "tta_fraction": settings.tta_fraction}
    return result | evaluation.summary, evaluation


def write(workdir: Path, result: dict[str, Any], *evaluated: Any) -> tuple[list[Path], list[str]]:
    """Write the files of an evaluation. If one cannot be written, write the others.

    Return the paths of those written, and the reasons for each `OSError`; print those of other errors.
    """
    plot, events = workdir / "confusion_matrix.png", workdir / "tensorboard" / "evaluation"
    written, failed = [], []
    for path, write in (
        (workdir / "eval.json", lambda: write_json(workdir / "eval.json", result)),
        (workdir / "report.html", lambda: write_report(workdir, result, *evaluated)),
        (plot, lambda: confusion.plot(plot, result)),
        (events, lambda: write_evaluation_events(events, result, plot if plot in written else None)),
    ):
        if path == events and packages.fault("tensorboardX"):  # reported by training
            continue
        try:
            write()
        except OSError as error:
            failed.append(f"{path} is not written: {error}")
        except Exception as error:  # plotting libraries can raise anything
            show(f"\n{path} is not written: {one_line(error)}")
        else:
            written.append(path)
    return written, failed
