"""Write the report of a run: report.html."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cifar_flax.data.cache import Arrays
from cifar_flax.report import charts, confusion, examples, page, reliability, results
from cifar_flax.report.log import Log, read_log
from cifar_flax.report.page import Content, Markup, Section, element, join, note, percent
from cifar_flax.telemetry.scalars import augmentation

_CONFUSIONS = 12  # pairs of classes in the list of the most frequent mistakes


def write_report(
    workdir: Path,
    result: dict[str, Any],
    metadata: dict[str, Any],
    arrays: Arrays,
    probabilities: Float[np.ndarray, "n classes"],
) -> None:
    """Write report.html to `workdir`: a page without external resources.

    `result` is the content of eval.json, `metadata` is the checkpoint's metadata, and `arrays` is the evaluated split,
    in the order of `probabilities`. Raise `OSError` if the page cannot be written.
    """
    log = read_log(workdir / "metrics.jsonl")
    name = workdir.resolve().name
    title = f"{name}: {percent(result['accuracy'])} of {result['dataset']} {result['split']}"
    sections = [
        Section("training", "Training", _curves(log)),
        Section("confusions", "Confusion matrix", _confusions(result)),
        Section("classes", "Metrics per class", _classes(result)),
        Section("calibration", "Calibration", _calibration(result)),
        Section("mistakes", "Most confident mistakes", examples.mistakes(arrays, probabilities)),
        Section("hardest", "Hardest examples", examples.hardest(arrays, probabilities)),
        Section("config", "Config", _config(metadata["config"])),
        Section("origin", "Environment", _origin(metadata.get("made_by"))),
    ]
    page.write(workdir / "report.html", title, _headline(name, result, log), sections)


def _headline(name: str, result: dict[str, Any], log: Log) -> Markup:
    lead = f"{result['dataset']}, {result['split']} split, checkpoint of step {result['step']:,}{augmentation(result)}"
    metrics = {"top-5 accuracy": percent(result["top5_accuracy"])} if len(result["per_class"]) > 5 else {}  # not 100 %
    metrics |= {
        "loss": f"{result['loss']:.4f}",
        "calibration error": percent(result["expected_calibration_error"]),
        "classes": f"{len(result['per_class']):,}",
        "epochs": results.epochs(log),
        "images per second in training": results.training_rate(log),
    }
    metrics |= results.other_metrics(result)
    accuracy = element(
        "div",
        element("div", percent(result["accuracy"]), class_="hero"),
        element("p", "accuracy", class_="hero-name"),
        element("p", f"95\u202f% confidence interval {results.interval(result)}", class_="lead"),
        element("p", f"{results.correct(result):,} of {result['num_examples']:,} correct", class_="lead"),
    )
    headline = element("div", accuracy, page.definitions(metrics), class_="headline")
    return join([element("h1", name), element("p", lead, class_="lead"), headline])


def _curves(log: Log) -> Markup:
    if not log.splits:
        return note("There are no curves, as metrics.jsonl is missing or empty.")
    styles = sorted(log.splits, key="train".__eq__)  # train last: the evaluated split has the same style in all reports

    def lines(column: str, splits: Iterable[str] = log.splits) -> list[charts.Line]:
        chosen = [(split, log.splits[split]) for split in splits]
        return [charts.Line(split, of.epoch, of[column], styles.index(split)) for split, of in chosen]

    train = ["train"] if log.train is not None else []
    charted = [
        charts.line_chart("Loss", lines("loss"), may_be_logarithmic=True, skipped=lines("skipped_steps", train)),
        charts.line_chart("Accuracy", lines("accuracy"), show=charts.percentage),
        charts.line_chart("Learning rate", lines("learning_rate", train), from_zero=True),
        charts.line_chart("Images per second in training", lines("images_per_second", train), from_zero=True),
        *(results.metric_chart(name, lines(name)) for name in log.others),
    ]
    about = (
        "Training loss and accuracy are measured on augmented images, with dropout, label smoothing and class weights, "
        "so the loss can be higher than on held-out images. The curves are not smoothed."
    )
    notes = note(" ".join([about, *_about_training(log)]))
    return join([charts.legend(styles), element("div", *charted, class_="pair"), notes])


def _about_training(log: Log) -> list[str]:
    if log.train is None:
        return []
    sentences = []
    skipped, unknown = np.nansum(log.train.skipped_steps), np.isnan(log.train.loss)
    if skipped > 0:
        sentences.append(
            f"{skipped:,.0f} steps were skipped because their loss or gradient was not finite (triangles on the x axis "
            "of the loss)."
        )
    if unknown.any():
        sentences.append(f"{unknown.sum():,} of {len(unknown):,} log lines have no train loss (gaps in the curve).")
    waited = log.training_median("input_wait_fraction")
    if waited is not None:
        sentences.append(f"Training waited for input data {percent(waited)} of the time (median over the log).")
    return sentences


def _confusions(result: dict[str, Any]) -> Markup:
    names, counts = list(result["per_class"]), np.asarray(result["confusion_matrix"])
    is_mistake = ~np.eye(len(counts), dtype=bool)
    mistakes, normalized = counts * is_mistake, confusion.fractions(counts)
    largest = np.argsort(-mistakes, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(index), len(names)) for index in largest if mistakes.flat[index]]
    rows = [
        (f"{names[true]} → {names[predicted]}", f"{counts[true, predicted]:,}", percent(normalized[true, predicted], 1))
        for true, predicted in pairs
    ]
    frequent = note("There are no mistakes.")
    if rows:
        frequent = page.table(("true → predicted", "images", "of the true class"), rows, label="Most frequent mistakes")
    about = (
        "Rows are true classes, columns are predicted classes. Blue: fraction of a class that was classified correctly "
        "(recall). Orange: fraction that was misclassified as another class, at most "
        f"{percent((normalized * is_mistake).max(), 1)}."
    )
    if len(names) > confusion.FEW_CLASSES:
        about += " The classes are in the order of the table below."
    if np.count_nonzero(counts) > confusion.CELLS:
        about += f" Only the {confusion.CELLS:,} largest of {np.count_nonzero(counts):,} nonzero counts are drawn."
    matrix = element("div", confusion.heat_map(counts, names), note(about))
    list_of_pairs = element("div", element("h3", "Most frequent mistakes"), frequent)
    return element("div", matrix, list_of_pairs, class_="pair" if len(names) <= confusion.NARROW else "stack")


def _classes(result: dict[str, Any]) -> Markup:
    sizes = [sum(row) for row in result["confusion_matrix"]]
    rows: list[tuple[Content, ...]] = []
    for size, (name, metrics) in zip(sizes, result["per_class"].items(), strict=True):
        bar = element("span", class_="bar", style=f"--fraction: {100 * metrics['f1']:.1f}%")
        f1 = join([bar, element("span", percent(metrics["f1"]), class_="percentage")])
        rows.append((name, f"{size:,}", percent(metrics["precision"]), percent(metrics["recall"]), f1))
    return page.table(("class", "images", "precision", "recall", "F1"), rows, label="Metrics per class")


def _calibration(result: dict[str, Any]) -> Markup:
    bins, rows = result["calibration"], []
    for i, entry in enumerate(bins):
        if entry["count"]:
            between = f"{100 * i / len(bins):.0f} to {percent((i + 1) / len(bins), 0)}"
            means = percent(entry["confidence"], 1), percent(entry["accuracy"], 1)
            rows.append((between, f"{entry['count']:,}", *means))
    about = (
        f"The expected calibration error is {percent(result['expected_calibration_error'])}: the absolute difference "
        f"between accuracy and mean confidence, averaged over {len(bins)} bins, weighted by the number of images "
        "per bin (Guo et al. 2017). The line across a bar is the accuracy; orange is the gap to the mean confidence."
    )
    diagram = element("div", reliability.diagram(bins), note(about))
    header = ("confidence bin", "images", "mean confidence", "accuracy")
    numbers = page.table(header, rows, label="Calibration by confidence")
    return element("div", diagram, numbers, class_="pair")


def _config(config: dict[str, Any]) -> Markup:
    """Return the settings by section; top-level settings are in the section "run"."""
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    sections = {"run": {name: config[name] for name in config if name not in sections}} | sections
    settings = {name: results.settings(part) for name, part in sections.items() if part}
    parts = [element("div", element("h3", name), page.definitions(values)) for name, values in settings.items()]
    return element("div", *parts, class_="settings")


def _origin(made_by: Mapping[str, Any] | None) -> Markup:
    if made_by is None:
        return note("The checkpoint does not record its command and environment.")
    command = element("pre", element("code", made_by["command"]), aria_label="Command", tabindex=0)
    versions = element("div", page.definitions(made_by["versions"] | made_by.get("settings", {})), class_="settings")
    return join([command, element("p", made_by["hardware"]), versions])
