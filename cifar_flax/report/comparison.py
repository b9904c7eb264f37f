"""The sections of the page that compares runs, or means over seeds."""

import os
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cifar_flax.report import charts, groups, page, results
from cifar_flax.report.groups import Group, Run
from cifar_flax.report.log import Log
from cifar_flax.report.page import NOTHING, Content, Markup, Section, element, join, note, percent
from cifar_flax.report.statistics import MOST_SEEDS, RESOLUTION, Difference, Mean
from cifar_flax.telemetry.scalars import is_fraction, other_scalars, title
from cifar_flax.training.operations import pflop

DRAWN = 8  # most groups with curves and metrics per class, if there are several seeds
_PAIRED = 10  # most groups of which all pairs are listed


def sections(compared: Sequence[Group], pairs: Sequence[Difference], output: Path) -> list[Section]:
    """Return the sections of the page `output`, which compares the groups; `pairs` are their differences."""
    has_seeds = groups.have_seeds(compared)
    drawn = compared[:DRAWN] if has_seeds else compared
    found = [Section("figures", "Metrics", _metrics(compared))]
    if has_seeds:
        found.append(Section("differences", "Differences", _differences(compared, pairs)))
    found.append(Section("curves", "Curves", _curves(drawn, len(compared))))
    found.append(Section("classes", "Per-class metrics", _classes(drawn)))
    found.append(Section("config", "Config differences", _config(compared)))
    if groups.have_trials(compared):
        found.append(Section("runs", "Runs", _runs(compared, output)))
    return found


def titled(group: Group) -> Markup:
    """Return key and name of a group; narrow columns may break the name after "_"."""
    pieces = [part for piece in group.name.split("_") for part in ("_", element("wbr"), piece)][2:]
    return join([element("b", group.key), "\u2002", *pieces])


def _metrics(compared: Sequence[Group]) -> Markup:
    has_seeds, key = groups.have_seeds(compared), compared[0].key
    own = [list(other_scalars(group.result or {})) for group in compared]
    others = list(dict.fromkeys(name for names in own for name in names))
    seeds = ("seeds", "accuracy", "std") if has_seeds else ("accuracy",)
    minus = () if has_seeds else (f"minus {key}",)
    metrics = ("top-5", "loss", "calibration error", *map(title, others))
    costs = ("operations", "training time", "epochs", "images/s")
    header = ("setting" if has_seeds else "run", *seeds, "95\u202f% interval", *minus, *metrics, *costs)
    names = ("top5_accuracy", "loss", "expected_calibration_error", *others)
    rows: list[tuple[Content, ...]] = []
    for group in compared:
        accuracy: tuple[Content, ...] = single_accuracy(group, compared[0])
        if has_seeds:
            accuracy = (str(len(group.finished)), *mean_accuracy(group.metric("accuracy")))
        values = [_shown(name, group.metric(name)) for name in names]
        epochs, rate = _progress(group)
        rows.append((titled(group), *accuracy, *values, operations(group), training_time(group), epochs, rate))
    table = page.table(header, rows, label="Metrics of the runs")
    return join([table, note(" ".join([*remarks(compared), _about_metrics(compared, has_seeds)]))])


def _about_metrics(compared: Sequence[Group], has_seeds: bool) -> str:
    if has_seeds:
        return (
            "Metrics are means over the seeds. std: sample standard deviation of the accuracy over the seeds; 95 % "
            "interval: of the mean accuracy, by Student's t-distribution. Neither includes that another sample of "
            "images would have another accuracy. Operations: those of the convolutions and matrix products of a run. "
            "Training time: mean duration of the training steps of a run."
        )
    return (
        f"Minus {compared[0].key}: accuracy minus that of run {compared[0].key}, in percentage points, ± the standard "
        "error for independent test images. If both runs are evaluated on the same images, the actual standard error "
        "is usually smaller. It does not include the variation between seeds."
    )


def _shown(name: str, mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    if is_fraction(name) or name == "expected_calibration_error":
        return percent(mean.mean)
    return f"{mean.mean:.4f}" if name == "loss" else f"{mean.mean:.4g}"


def single_accuracy(group: Group, reference: Group) -> tuple[str, str, str]:
    """Return the accuracy of a single run, its interval, and the difference from `reference`."""
    if group.result is None:
        return NOTHING, NOTHING, NOTHING
    minus = NOTHING
    if group is not reference and reference.result and results.comparable(group.result, reference.result):
        minus = results.difference(group.result, reference.result)
    return percent(group.result["accuracy"]), results.interval(group.result), minus


def mean_accuracy(mean: Mean | None) -> tuple[str, str, str]:
    """Return the mean accuracy of a group, its standard deviation, and its interval."""
    if mean is None:
        return NOTHING, NOTHING, NOTHING
    if mean.std is None:
        return percent(mean.mean), NOTHING, NOTHING
    return percent(mean.mean), f"{100 * mean.std:.2f}", _between(mean.low, mean.high)


def operations(group: Group) -> str:
    counts = group.values(lambda run: run.operations)
    return pflop(float(np.mean(counts))) if counts else NOTHING


def training_time(group: Group) -> str:
    """Return the mean time of training, such as "7 min 31 s"."""
    found = group.values(lambda run: run.seconds)
    if not found:
        return NOTHING
    seconds = float(np.mean(found))
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"


def _progress(group: Group) -> tuple[str, str]:
    """Return the last epoch and the training rate of the first run, of a finished one if there is any."""
    first = (group.finished or group.runs)[0]
    return results.epochs(first.log), results.training_rate(first.log)


def remarks(compared: Sequence[Group]) -> list[str]:
    """Return sentences on runs without result, and on those evaluated on other images."""
    sentences, first = [], compared[0].result
    unfinished = [group.key for group in compared if group.result is None]
    have_trials = groups.have_trials(compared)
    if unfinished and not have_trials:
        sentences.append(f"Unfinished runs without eval.json: {', '.join(unfinished)}.")
    for status, word in (
        ("diverged", "diverged"),
        ("pruned", "were pruned"),
        ("failed", "failed"),
        (groups.UNFINISHED, "are not finished"),
    ):
        counts = [(group.key, sum(run.status == status for run in group.runs)) for group in compared]
        found = [f"{count} of {key}" for key, count in counts if count]
        if found and have_trials:
            sentences.append(f"Runs that {word}: {', '.join(found)}.")
    others = [group.key for group in compared if group.result and first and not results.comparable(group.result, first)]
    if others:
        sentences.append(f"Not evaluated on the same images as {compared[0].key}: {', '.join(others)}.")
    return sentences


def listed(compared: Sequence[Group], pairs: Sequence[Difference]) -> list[Difference]:
    """Return the pairs to list: all of few groups, otherwise those with the first group."""
    if len(compared) <= _PAIRED:
        return list(pairs)
    return [pair for pair in pairs if compared[0].key in (pair.first, pair.second)]


def difference_cells(pair: Difference) -> tuple[str, ...]:
    """Return the names of a pair, the difference in points, its interval, the p-value, the method and the seeds."""
    names = f"{pair.first} \u2212 {pair.second}"
    if pair.low is None or pair.high is None:
        return names, _signed(pair.mean), NOTHING, NOTHING, NOTHING, NOTHING
    between = f"{_signed(pair.low)} to {_signed(pair.high)}"
    p = NOTHING if pair.p is None else "< 0.001" if pair.p < 0.001 else f"{pair.p:.3f}"
    more = pair.more_seeds or 0
    method = pair.method if pair.count is None else f"{pair.method}, {pair.count} seeds"
    return names, _signed(pair.mean), between, p, method, f"{'over ' * (more >= MOST_SEEDS)}{more:,}"


def _signed(value: float) -> str:
    sign = "\u2212" if value < 0 else "+"
    return f"{sign}{abs(100 * value):.2f}"


def _between(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{100 * max(low, 0):.2f} to {percent(min(high, 1))}"


def _differences(compared: Sequence[Group], pairs: Sequence[Difference]) -> Markup:
    if not pairs:
        return note("There is only one setting with a finished run.")
    header = ("settings", "points", "95\u202f% interval", "p", "method", "more seeds")
    table = page.table(header, map(difference_cells, listed(compared, pairs)), label="Differences of accuracy")
    settle = f"{100 * RESOLUTION:g} points"
    about = (
        "Points: the difference of the mean accuracies, in percentage points. Paired: at the seeds that both settings "
        "have, by Student's t-test of the differences. Welch: by Welch's t-test, if they share fewer than two seeds. "
        f"Intervals and p-values are corrected for the number of pairs, {len(pairs):,} (Bonferroni), so that all "
        f"intervals hold together with a probability of 95 %. More seeds: how many to add to each setting until the "
        f"interval is ± {settle} or narrower, which settles a difference of {settle}, if the standard deviations stay "
        "as they are."
    )
    if len(compared) > _PAIRED:
        about += f" Only the pairs with {compared[0].key}, the best setting, are listed; study.json has all of them."
    return join([table, note(about)])


def _curves(compared: Sequence[Group], count: int) -> Markup:
    def lines(split: Callable[[Log], str | None], column: str) -> list[charts.Line]:
        found = [groups.line(group, split, column, style) for style, group in enumerate(compared)]
        return [one for one in found if one is not None]

    logs = {group.key: (group.finished or group.runs)[0].log for group in compared}
    splits = {key: log.monitored for key, log in logs.items() if log.monitored}
    monitored = next(iter(splits.values())) if len(set(splits.values())) == 1 else "held out"

    def held_out(log: Log) -> str | None:
        return log.monitored

    def train(log: Log) -> str | None:
        return "train"

    charted = [
        charts.line_chart(f"Accuracy, {monitored}", lines(held_out, "accuracy"), show=charts.percentage),
        charts.line_chart(f"Loss, {monitored}", lines(held_out, "loss"), may_be_logarithmic=True),
        charts.line_chart("Accuracy, train", lines(train, "accuracy"), show=charts.percentage),
        charts.line_chart("Loss, train", lines(train, "loss"), may_be_logarithmic=True),
        charts.line_chart("Learning rate", lines(train, "learning_rate"), from_zero=True),
        charts.line_chart("Images per second in training", lines(train, "images_per_second"), from_zero=True),
    ]
    for name in dict.fromkeys(name for log in logs.values() for name in log.others):
        for split, words in ((held_out, monitored), (train, "train")):
            drawn = [one for one in lines(split, name) if len(one.known)]
            charted += [results.metric_chart(name, drawn, words)] if drawn else []
    key = charts.legend([titled(group) for group in compared])
    return join([key, element("div", *charted, class_="pair"), note(" ".join(_about_curves(compared, count, splits)))])


def _about_curves(compared: Sequence[Group], count: int, splits: dict[str, str]) -> list[str]:
    about = [
        "Training metrics are computed during the steps, with augmentation, dropout, label smoothing and class weights."
    ]
    if groups.have_seeds(compared):
        about.append("Lines are means over the seeds; bands are ± one standard deviation.")
    if len(compared) < count:
        about.append(f"Only the {len(compared)} best of {count:,} settings are drawn.")
    if len(set(splits.values())) > 1:
        about.append(f"The held-out splits differ ({'; '.join(f'{key}: {split}' for key, split in splits.items())}).")
    for group in compared:
        skipped = sum(np.nansum(run.log.train.skipped_steps) for run in group.runs if run.log.train is not None)
        if skipped:
            about.append(f"{group.key} skipped {skipped:,.0f} steps because their loss or gradient was not finite.")
    return about


def _classes(compared: Sequence[Group]) -> Markup:
    finished = [group for group in compared if group.result]
    if not finished:
        return note("No run is finished.")
    names = dict.fromkeys(name for group in finished for name in (group.result or {})["per_class"])
    tables = []
    for heading, column in (("Recall", "recall"), ("F1", "f1")):
        rows = [(name, *_best_bold([of_class(group, name, column) for group in finished])) for name in names]
        whole = page.table(("class", *(group.key for group in finished)), rows, label=f"{heading} of each class")
        tables.append(element("div", element("h3", heading), whole))
    return element("div", *tables, class_="pair")


def of_class(group: Group, name: str, column: str) -> float | None:
    """Return the mean of a metric of a class, "recall" or "f1"."""
    found = group.values(lambda run: (run.result or {})["per_class"].get(name, {}).get(column))
    return float(np.mean(found)) if found else None


def _best_bold(values: Sequence[float | None]) -> list[Content]:
    best = max(value for value in values if value is not None)
    return [element("b", percent(value)) if value == best else percent(value) for value in values]


def _config(compared: Sequence[Group]) -> Markup:
    paths = dict.fromkeys(path for group in compared for path in group.runs[0].settings)

    def shown(group: Group, path: str) -> str:
        if path == "seed":
            return ", ".join(run.seed for run in group.runs)
        return group.runs[0].settings.get(path, NOTHING)

    rows = [(path, *(shown(group, path) for group in compared)) for path in paths]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return note("The configs do not differ.")
    return page.table(("field", *(group.key for group in compared)), rows, label="Fields that differ", kind="text")


def _runs(compared: Sequence[Group], output: Path) -> Markup:
    rows = []
    for group in compared:
        for run in group.runs:
            accuracy = percent(run.result["accuracy"]) if run.result else NOTHING
            rows.append((group.key, run.seed, _link(run, output), run.status or NOTHING, accuracy))
    header = ("setting", "seed", "run, with its report", "status", "accuracy")
    return page.table(header, rows, label="Runs", kind="text")


def _link(run: Run, output: Path) -> Content:
    """Return the name of a run, as a link to its report if there is one."""
    report = run.folder / "report.html"
    if not report.exists():
        return run.name
    path = os.path.relpath(report.resolve(), output.resolve().parent)
    return element("a", run.name, href=urllib.parse.quote(Path(path).as_posix()))
