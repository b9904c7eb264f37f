"""--mode=compare: write an HTML page that compares several runs."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_flax import files
from cifar_flax.errors import require
from cifar_flax.report import charts, page, results
from cifar_flax.report.log import Lines, Log, read_log
from cifar_flax.report.page import NOTHING, Content, Markup, Section, element, join, note, percent
from cifar_flax.runtime.streams import printable, show


@dataclass(frozen=True, slots=True)
class _Run:
    key: str  # letter or number that identifies the run on the page
    name: str
    settings: dict[str, str]
    log: Log
    result: results.Result | None  # content of eval.json; None until the run is finished


def compare(workdirs: Sequence[Path], output: Path) -> None:
    """Write an HTML page that compares the runs in `workdirs`, and print their accuracies.

    Raise `ConfigError` if there are fewer than two folders, if one holds no run or is listed twice, or if `output` is
    not an HTML file; raise `OSError` if `output` cannot be written.
    """
    require(not output.is_dir(), "--output", str(output), "is a folder; name a file")
    require(output.suffix in (".html", ".htm"), "--output", str(output), "must end with .html")
    runs = _read(workdirs)
    title = f"Comparison of {len(runs)} runs"
    splits = dict.fromkeys(f"{run.result['dataset']}, {run.result['split']} split" for run in runs if run.result)
    lead = element("p", "; ".join(splits) or "No run is finished.", class_="lead")
    sections = [
        Section("figures", "Metrics", _metrics(runs)),
        Section("curves", "Curves", _curves(runs)),
        Section("classes", "Per-class metrics", _classes(runs)),
        Section("config", "Config differences", _config(runs)),
    ]
    page.write(output, title, join([element("h1", title), lead]), sections)
    show("\n".join([*_lines(runs), "", f"written: {printable(str(output))}"]))


def _read(workdirs: Sequence[Path]) -> list[_Run]:
    require(len(workdirs) >= 2, "PATH", " ".join(map(str, workdirs)), "must be at least two folders of runs")
    folders = [workdir.resolve() for workdir in workdirs]
    keys = string.ascii_uppercase if len(folders) <= 26 else [str(i + 1) for i in range(len(folders))]
    for i, workdir in enumerate(workdirs):
        require(folders[i] not in folders[:i], "PATH", str(workdir), "is listed twice")
        require((workdir / "config.json").exists(), "PATH", str(workdir), "holds no run")
    runs = []
    for key, workdir, folder in zip(keys, workdirs, folders, strict=False):
        log, result = read_log(workdir / "metrics.jsonl"), results.read_result(workdir)
        runs.append(_Run(key, _name(folder, folders), _settings(workdir), log, result))
    return runs


def _settings(workdir: Path) -> dict[str, str]:
    try:
        config = files.read_json(workdir / "config.json")
    except ValueError:
        config = None
    require(isinstance(config, dict), "PATH", str(workdir), "its config.json is damaged")
    return results.settings(config)


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """Return the shortest trailing part of the path `folder` that is unique among `folders`."""
    parts = folder.parts
    ends = (parts[-length:] for length in range(1, len(parts) + 1))
    return str(Path(*next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1)))


def _titled(run: _Run) -> Markup:
    return join([element("b", run.key), f"\u2002{run.name}"])


def _metrics(runs: Sequence[_Run]) -> Markup:
    key = runs[0].key
    header = ("run", "accuracy", "95\u202f% interval", f"minus {key}", "top-5", "loss", "calibration error")
    metrics = [results.other_metrics(run.result or {}) for run in runs]
    titles = tuple(dict.fromkeys(title for own in metrics for title in own))
    rows = []
    for run, own in zip(runs, metrics, strict=True):
        others: tuple[str, ...] = (NOTHING, NOTHING, NOTHING)
        if run.result:
            top5, error = run.result["top5_accuracy"], run.result["expected_calibration_error"]
            others = (percent(top5), f"{run.result['loss']:.4f}", percent(error))
        others += tuple(own.get(title, NOTHING) for title in titles)
        progress = (results.epochs(run.log), results.training_rate(run.log))
        rows.append((_titled(run), *_accuracy(run, runs[0]), *others, *progress))
    about = (
        f"Minus {key}: accuracy minus that of run {key}, in percentage points, ± the standard error for independent "
        "test images. If both runs are evaluated on the same images, the actual standard error is usually smaller. It "
        "does not include the variation between seeds."
    )
    table = page.table((*header, *titles, "epochs", "images/s"), rows, label="Metrics of the runs")
    return join([table, note(" ".join([*_about_results(runs), about]))])


def _accuracy(run: _Run, reference: _Run) -> tuple[str, str, str]:
    """Return the accuracy of `run`, its interval, and the difference from `reference`."""
    if run.result is None:
        return NOTHING, NOTHING, NOTHING
    minus = NOTHING
    if run is not reference and reference.result and results.comparable(run.result, reference.result):
        minus = results.difference(run.result, reference.result)
    return percent(run.result["accuracy"]), results.interval(run.result), minus


def _about_results(runs: Sequence[_Run]) -> list[str]:
    sentences, first = [], runs[0].result
    unfinished = [run.key for run in runs if run.result is None]
    if unfinished:
        sentences.append(f"Unfinished runs without eval.json: {', '.join(unfinished)}.")
    others = [run.key for run in runs if run.result and first and not results.comparable(run.result, first)]
    if others:
        sentences.append(f"Not evaluated on the same images as {runs[0].key}: {', '.join(others)}.")
    return sentences


def _curves(runs: Sequence[_Run]) -> Markup:
    def lines(logged: Sequence[Lines | None], column: str) -> list[charts.Line]:
        pairs = enumerate(zip(runs, logged, strict=True))
        found = [(i, run.key, of) for i, (run, of) in pairs if of is not None and column in (of.dtype.names or ())]
        return [charts.Line(key, of.epoch, of[column], style) for style, key, of in found]

    splits = {run.key: run.log.monitored for run in runs if run.log.monitored}
    monitored = next(iter(splits.values())) if len(set(splits.values())) == 1 else "held out"
    train = [run.log.train for run in runs]
    evaluated = [run.log.splits.get(run.log.monitored or "") for run in runs]
    charted = [
        charts.line_chart(f"Accuracy, {monitored}", lines(evaluated, "accuracy"), show=charts.percentage),
        charts.line_chart(f"Loss, {monitored}", lines(evaluated, "loss"), may_be_logarithmic=True),
        charts.line_chart("Accuracy, train", lines(train, "accuracy"), show=charts.percentage),
        charts.line_chart("Loss, train", lines(train, "loss"), may_be_logarithmic=True),
        charts.line_chart("Learning rate", lines(train, "learning_rate"), from_zero=True),
        charts.line_chart("Images per second in training", lines(train, "images_per_second"), from_zero=True),
    ]
    for name in dict.fromkeys(name for run in runs for name in run.log.others):
        for split, logged in ((monitored, evaluated), ("train", train)):
            drawn = [line for line in lines(logged, name) if len(line.known)]
            charted += [results.metric_chart(name, drawn, split)] if drawn else []
    about = [
        "Training metrics are computed during the steps, with augmentation, dropout, label smoothing and class weights."
    ]
    if len(set(splits.values())) > 1:
        about.append(f"The held-out splits differ ({'; '.join(f'{key}: {split}' for key, split in splits.items())}).")
    for run in runs:
        skipped = 0 if run.log.train is None else np.nansum(run.log.train.skipped_steps)
        if skipped:
            about.append(f"{run.key} skipped {skipped:,.0f} steps because their loss or gradient was not finite.")
    key = charts.legend([_titled(run) for run in runs])
    return join([key, element("div", *charted, class_="pair"), note(" ".join(about))])


def _classes(runs: Sequence[_Run]) -> Markup:
    finished = [(run.key, run.result["per_class"]) for run in runs if run.result]
    if not finished:
        return note("No run is finished.")
    names = dict.fromkeys(name for _, classes in finished for name in classes)
    tables = []
    for title, column in (("Recall", "recall"), ("F1", "f1")):
        rows = [(name, *_best_bold([classes.get(name, {}).get(column) for _, classes in finished])) for name in names]
        whole = page.table(("class", *(key for key, _ in finished)), rows, label=f"{title} of each class")
        tables.append(element("div", element("h3", title), whole))
    return element("div", *tables, class_="pair")


def _best_bold(values: Sequence[float | None]) -> list[Content]:
    best = max(value for value in values if value is not None)
    return [element("b", percent(value)) if value == best else percent(value) for value in values]


def _config(runs: Sequence[_Run]) -> Markup:
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    rows = [(path, *(run.settings.get(path, NOTHING) for run in runs)) for path in paths]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return note("The configs do not differ.")
    return page.table(("field", *(run.key for run in runs)), rows, label="Fields that differ", kind="text")


def _lines(runs: Sequence[_Run]) -> list[str]:
    """Return the lines of the accuracy table for the terminal."""
    width = max(len("run"), *(len(printable(run.name)) for run in runs))
    lines = [f"     {'run':{width}}  accuracy  95 % interval     minus {runs[0].key}"]
    for run in runs:
        accuracy, between, minus = _accuracy(run, runs[0])
        line = f"  {run.key:2} {printable(run.name):{width}}  {accuracy:>8}  {between:16}  {minus}"
        lines.append(line.replace("\u202f", " ").replace("\u2212", "-").rstrip())
    return [*lines, *_about_results(runs)]
