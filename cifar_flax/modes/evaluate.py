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
from cifar_flax.restore import restore
from cifar_flax.runtime import processes
from cifar_flax.runtime.streams import show
from cifar_flax.telemetry.console import evaluation_table
from cifar_flax.telemetry.tensorboard import write_evaluation_events
from cifar_flax.training.evaluator import final_evaluator


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
    evaluation = final_evaluator(config, run.task, on_device)(run.state)
    assert evaluation is not None
    result = {"dataset": arrays.dataset, "split": config.data.eval_split, "step": run.step}
    if config.eval.tta != "none":
        result |= {"tta": config.eval.tta, "tta_fraction": config.eval.tta_fraction}
    result |= evaluation.summary
    if processes.is_main():
        show(evaluation_table(result))  # first, so that it is not lost if the disk is full
        _write(workdir, result, run.metadata, arrays, evaluation.probabilities)
    return result


def _write(workdir: Path, result: dict[str, Any], *evaluated: Any) -> None:
    """Write the files of an evaluation and print their paths. If one cannot be written, write the others.

    Print the reason or, if it is an `OSError`, raise `UserError` at the end.
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
    show(f"\nwritten: {', '.join(map(str, written))}")
    if failed:
        raise UserError("; ".join(failed))
