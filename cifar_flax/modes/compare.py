"""Several runs on one page."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_flax import files
from cifar_flax.errors import require
from cifar_flax.report import charts
from cifar_flax.report.charts import Line
from cifar_flax.report.log import Lines, Log, read_log
from cifar_flax.report.page import (
    NOTHING,
    Content,
    Markup,
    Section,
    element,
    figure,
    join,
    note,
    page,
    percent,
    table,
    write,
)
from cifar_flax.report.results import Result, comparable, difference, epochs, interval, read_result, training_rate
from cifar_flax.report.settings import flat
from cifar_flax.telemetry.console import printable, show


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    key: str  # a letter that stands for it
    name: str
    settings: dict[str, str]
    log: Log
    result: Result | None  # None where it is not finished


def compare(workdirs: Sequence[Path], output: Path) -> None:
    """Writes a page that shows the runs in `workdirs` side by side, and prints their figures.

    Raises `ConfigError` where there are fewer than two, or one is no run or given twice, or `output` is no page, and
    `OSError` where it cannot be written.
    """
    require(not output.is_dir(), "--output", str(output), "is a folder; name a file")
    require(output.suffix in (".html", ".htm"), "--output", str(output), "must end with .html")
    runs = _read(workdirs)
    title = f"Comparison of {len(runs)} runs"
    head = [element("h1", title), element("p", _evaluated_on(runs), class_="lead")]
    sections = [
        Section("figures", "Figures", _figures(runs)),
        Section("curves", "Curves", _curves(runs)),
        Section("classes", "Classes", _classes(runs)),
        Section("config", "What differs in their configs", _config(runs)),
    ]
    write(output, page(title, join(head), sections))
    show("\n".join([*_lines(runs), "", f"written: {printable(str(output))}"]))


def _read(workdirs: Sequence[Path]) -> list[_Run]:
    require(len(workdirs) >= 2, "PATH", " ".join(map(str, workdirs)), "must be at least two folders of runs")
    folders = [workdir.resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        require(folders[i] not in folders[:i], "PATH", str(workdir), "is given twice")
        require((workdir / "config.json").exists(), "PATH", str(workdir), "holds no run")
    keys = string.ascii_uppercase if len(folders) <= 26 else [str(i + 1) for i in range(len(folders))]
    return [
        _Run(
            key=keys[i],
            name=_name(folders[i], folders),
            settings=_settings(workdir),
            log=read_log(workdir / "metrics.jsonl"),
            result=read_result(workdir),
        )
        for i, workdir in enumerate(workdirs)
    ]


def _settings(workdir: Path) -> dict[str, str]:
    try:
        config = files.read_json(workdir / "config.json")
    except ValueError:
        config = None
    require(isinstance(config, dict), "PATH", str(workdir), "its config.json is damaged")
    return dict(flat(config))


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """As much of the end of its path as no other has."""
    parts = folder.parts
    ends = (parts[-length:] for length in range(1, len(parts) + 1))
    return str(Path(*next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1)))


def _evaluated_on(runs: Sequence[_Run]) -> str:
    found = dict.fromkeys(f"{run.result['dataset']}, {run.result['split']} split" for run in runs if run.result)
    return "; ".join(found) or "None of them is finished."


def _titled(run: _Run) -> Markup:
    return join([element("b", run.key), f"\u2002{run.name}"])


def _figures(runs: Sequence[_Run]) -> Markup:
    reference = runs[0]
    header = ("run", "accuracy", "95\u202f% interval", f"minus {reference.key}", "top-5", "loss", "calibration error")
    rows = [
        (_titled(run), *_accuracy(run, reference), *_others(run.result), epochs(run.log), training_rate(run.log))
        for run in runs
    ]
    about = (
        f"Minus {reference.key}: the difference of the accuracies in percentage points ± its standard error, as if the "
        "runs had been evaluated on different images. On the same images the true one is mostly smaller. What runs of "
        "one config with several seeds differ by is another matter."
    )
    notes = [*_about_results(runs), about]
    figures = table((*header, "epochs", "images/s"), rows, label="Figures of the runs")
    return join([figures, note(" ".join(notes))])


def _accuracy(run: _Run, reference: _Run) -> tuple[str, str, str]:
    if run.result is None:
        return NOTHING, NOTHING, NOTHING
    minus = NOTHING
    if run is not reference and reference.result and comparable(run.result, reference.result):
        minus = difference(run.result, reference.result)
    return percent(run.result["accuracy"]), interval(run.result), minus


def _others(result: Result | None) -> tuple[str, str, str]:
    if result is None:
        return NOTHING, NOTHING, NOTHING
    error = percent(result["expected_calibration_error"])
    return percent(result["top5_accuracy"]), figure(result["loss"]), error


def _about_results(runs: Sequence[_Run]) -> list[str]:
    reference, sentences = runs[0], []
    unfinished = [run.key for run in runs if run.result is None]
    if unfinished:
        sentences.append(f"Not finished, as there is no eval.json: {', '.join(unfinished)}.")
    others = [
        run.key for run in runs if run.result and reference.result and not comparable(run.result, reference.result)
    ]
    if others:
        sentences.append(f"Evaluated on other images than {reference.key}: {', '.join(others)}.")
    return sentences


def _curves(runs: Sequence[_Run]) -> Markup:
    def lines(of_run: Callable[[Log], Lines | None], column: str) -> list[Line]:
        found = ((i, run.key, of_run(run.log)) for i, run in enumerate(runs))
        return [Line(name=key, x=of.epoch, y=of[column], style=i) for i, key, of in found if of is not None]

    splits = {run.key: run.log.monitored for run in runs if run.log.monitored}
    names = list(dict.fromkeys(splits.values()))
    monitored = names[0] if len(names) == 1 else "held out"

    def evaluated(log: Log) -> Lines | None:
        return log.splits[log.monitored] if log.monitored else None

    def trained(log: Log) -> Lines | None:
        return log.train

    charted = [
        charts.line_chart(f"Accuracy, {monitored}", lines(evaluated, "accuracy"), show=charts.share),
        charts.line_chart(f"Loss, {monitored}", lines(evaluated, "loss"), may_be_logarithmic=True),
        charts.line_chart("Accuracy, train", lines(trained, "accuracy"), show=charts.share),
        charts.line_chart("Loss, train", lines(trained, "loss"), may_be_logarithmic=True),
        charts.line_chart("Learning rate", lines(trained, "learning_rate"), from_zero=True),
        charts.line_chart("Images per second in training", lines(trained, "images_per_second"), from_zero=True),
    ]
    key = charts.legend([(_titled(run), i, True) for i, run in enumerate(runs)])
    about = ["Training figures are as the networks saw the images: augmented, with dropout, with label smoothing."]
    if len(names) > 1:
        about.append(f"Held out are, {'; '.join(f'{key}: {split}' for key, split in splits.items())}.")
    for run in runs:
        skipped = run.log.train and np.nansum(run.log.train["skipped_steps"])
        if skipped:
            about.append(f"{run.key} left out {skipped:,.0f} steps, whose loss or gradient was not finite.")
    return join([key, element("div", *charted, class_="pair"), note(" ".join(about))])


def _classes(runs: Sequence[_Run]) -> Markup:
    finished = [(run.key, run.result["per_class"]) for run in runs if run.result]
    if not finished:
        return note("None of the runs is finished.")
    names = list(dict.fromkeys(name for _, classes in finished for name in classes))
    tables = []
    for title, column in (("Recall", "recall"), ("F1", "f1")):
        rows = [(name, *_best_bold([classes.get(name, {}).get(column) for _, classes in finished])) for name in names]
        whole = table(("class", *(key for key, _ in finished)), rows, label=f"{title} of each class")
        tables.append(element("div", element("h3", title), whole))
    return element("div", *tables, class_="pair")


def _best_bold(shares: Sequence[float | None]) -> list[Content]:
    best = max(share for share in shares if share is not None)
    return [element("b", percent(share)) if share == best else percent(share) for share in shares]


def _config(runs: Sequence[_Run]) -> Markup:
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    rows = []
    for path in paths:
        values = [run.settings.get(path, NOTHING) for run in runs]
        if len(set(values)) > 1:
            rows.append((path, *values))
    if not rows:
        return note("Nothing: every field has the same value.")
    return table(("field", *(run.key for run in runs)), rows, label="Fields that differ", kind="text")


def _lines(runs: Sequence[_Run]) -> list[str]:
    """For a terminal."""
    width = max(len("run"), *(len(printable(run.name)) for run in runs))
    lines = [f"     {'run':{width}}  accuracy  95 % interval     minus {runs[0].key}"]
    for run in runs:
        accuracy, between, minus = _accuracy(run, runs[0])
        line = f"  {run.key:2} {printable(run.name):{width}}  {accuracy:>8}  {between:16}  {minus}"
        lines.append(line.replace("\u202f", " ").replace("\u2212", "-").rstrip())
    return [*lines, *_about_results(runs)]
