"""The report of a run: report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cifar_flax.data.cache import Arrays
from cifar_flax.report import charts, confusion, pictures, reliability
from cifar_flax.report.charts import Line
from cifar_flax.report.log import Log, read_log
from cifar_flax.report.page import (
    Content,
    Markup,
    Section,
    definitions,
    element,
    figure,
    join,
    note,
    page,
    percent,
    table,
    write,
)
from cifar_flax.report.results import correct, epochs, interval, training_rate
from cifar_flax.report.settings import grouped

_CONFUSIONS = 12  # pairs of classes in the list of the most frequent


def write_report(
    workdir: Path,
    result: dict[str, Any],
    record: dict[str, Any],
    arrays: Arrays,
    probabilities: Float[np.ndarray, "n classes"],
) -> None:
    """Writes report.html, a page that asks for nothing from anywhere else; raises `OSError`.

    `result` is what eval.json holds, `record` the checkpoint's, `arrays` the split in the order of `probabilities`.
    """
    log = read_log(workdir / "metrics.jsonl")
    name = workdir.resolve().name
    title = f"{name}: {percent(result['accuracy'])} of {result['dataset']} {result['split']}"
    sections = [
        Section("training", "Training", _curves(log)),
        Section("confusions", "Confusions", _confusions(result)),
        Section("classes", "Classes", _classes(result)),
        Section("calibration", "Calibration", _calibration(result)),
        Section("mistakes", "Most confident mistakes", pictures.mistakes(arrays, probabilities)),
        Section("hardest", "Hardest examples", pictures.hardest(arrays, probabilities)),
        Section("config", "Config", _config(record["config"])),
        Section("origin", "How it was made", _origin(record.get("made_by"))),
    ]
    write(workdir / "report.html", page(title, _headline(name, result, log), sections))


def _headline(name: str, result: dict[str, Any], log: Log) -> Markup:
    lead = f"{result['dataset']}, {result['split']} split, checkpoint of step {result['step']:,}"
    if "tta" in result:
        lead += f", test-time augmentation {result['tta']}"
    if result.get("tta_below") is not None:
        lead += f" where the top probability is below {result['tta_below']}"
    figures = {
        "top-5 accuracy": percent(result["top5_accuracy"]),
        "loss": figure(result["loss"]),
        "calibration error": percent(result["expected_calibration_error"]),
        "classes": f"{len(result['per_class']):,}",
        "epochs": epochs(log),
        "images per second in training": training_rate(log),
    }
    if len(result["per_class"]) <= 5:
        del figures["top-5 accuracy"]  # it is 100 %
    accuracy = element(
        "div",
        element("div", percent(result["accuracy"]), class_="hero"),
        element("p", "accuracy", class_="hero-name"),
        element("p", f"95\u202f% interval {interval(result)}", class_="lead"),
        element("p", f"{correct(result):,} of {result['num_examples']:,} right", class_="lead"),
    )
    headline = element("div", accuracy, definitions(figures), class_="headline")
    return join([element("h1", name), element("p", lead, class_="lead"), headline])


def _curves(log: Log) -> Markup:
    if not log.splits:
        return note("There is no metrics.jsonl, so there are no curves.")
    styles = {split: style for style, split in enumerate(sorted(log.splits, key="train".__eq__))}

    def lines(column: str, splits: Sequence[str] = tuple(log.splits)) -> list[Line]:
        chosen = [(split, log.splits[split]) for split in splits]
        return [
            Line(name=split, x=of.epoch, y=of[column], style=styles[split], marks=split != "train")
            for split, of in chosen
        ]

    train = [split for split in log.splits if split == "train"]
    charted = [
        charts.line_chart("Loss", lines("loss"), may_be_logarithmic=True, skipped=lines("skipped_steps", train)),
        charts.line_chart("Accuracy", lines("accuracy"), show=charts.share),
        charts.line_chart("Learning rate", lines("learning_rate", train), from_zero=True),
        charts.line_chart("Images per second in training", lines("images_per_second", train), from_zero=True),
    ]
    key = charts.legend([(split, style, split != "train") for split, style in styles.items()])
    return join([key, element("div", *charted, class_="pair"), note(" ".join(_about_curves(log)))])


def _about_curves(log: Log) -> list[str]:
    about = (
        "Training figures are as the network saw the images: augmented, with dropout, with label smoothing; so their "
        "loss may well lie above that of images it has never seen. Nothing is smoothed."
    )
    sentences = [about]
    if log.train is None:
        return sentences
    skipped, unknown = log.train["skipped_steps"], np.isnan(log.train["loss"])
    if np.nansum(skipped) > 0:
        sentences.append(
            f"{np.nansum(skipped):,.0f} steps were left out, as their loss or gradient was not finite: triangles on "
            "the axis of the loss."
        )
    if unknown.any():
        sentences.append(f"{unknown.sum():,} of {len(unknown):,} lines of the log have no train loss: gaps.")
    waited = log.train.median("input_wait_fraction")
    if waited is not None:
        sentences.append(f"Training waited for its input {percent(waited)} of the time (median).")
    return sentences


def _confusions(result: dict[str, Any]) -> Markup:
    names, counts = list(result["per_class"]), np.asarray(result["confusion_matrix"])
    sizes, mistakes = counts.sum(axis=1), counts * (1 - np.eye(len(counts), dtype=int))
    largest = np.argsort(-mistakes, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(index), len(names)) for index in largest if mistakes.flat[index]]
    rows = [
        (f"{names[true]} → {names[taken]}", f"{counts[true, taken]:,}", percent(counts[true, taken] / sizes[true], 1))
        for true, taken in pairs
    ]
    frequent: Markup = note("There are no mistakes.")
    if rows:
        frequent = table(("true → predicted", "images", "of the class"), rows, label="Most frequent mistakes")
    about = (
        "Rows are true classes, columns predicted ones. Blue: the share of a class that was recognised. Orange: the "
        f"share taken for another, the strongest {percent(_worst(counts), 1)}."
    )
    if len(names) > confusion.FEW_CLASSES:
        about += " The classes are in the order of the table below."
    if np.count_nonzero(counts) > confusion.CELLS:
        about += f" The {confusion.CELLS:,} largest of {np.count_nonzero(counts):,} counts are drawn."
    matrix = element("div", confusion.heat_map(counts, names), note(about))
    list_of_pairs = element("div", element("h3", "Most frequent mistakes"), frequent)
    return element("div", matrix, list_of_pairs, class_="pair" if len(names) <= confusion.NARROW else "stack")


def _worst(counts: np.ndarray) -> float:
    """The largest share of a class that was taken for one other."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return float((shares * (1 - np.eye(len(counts)))).max())


def _classes(result: dict[str, Any]) -> Markup:
    sizes = [sum(row) for row in result["confusion_matrix"]]
    rows: list[tuple[Content, ...]] = []
    for size, (name, figures) in zip(sizes, result["per_class"].items(), strict=True):
        bar = element("span", class_="bar", style=f"--share: {100 * figures['f1']:.1f}%")
        f1 = join([bar, element("span", percent(figures["f1"]), class_="share")])
        rows.append((name, f"{size:,}", percent(figures["precision"]), percent(figures["recall"]), f1))
    return table(("class", "images", "precision", "recall", "F1"), rows, label="Figures of each class")


def _calibration(result: dict[str, Any]) -> Markup:
    bins = result["calibration"]
    rows = [
        (
            f"{100 * i / len(bins):.0f} to {percent((i + 1) / len(bins), 0)}",
            f"{entry['count']:,}",
            percent(entry["confidence"], 1),
            percent(entry["accuracy"], 1),
        )
        for i, entry in enumerate(bins)
        if entry["count"]
    ]
    error = result["expected_calibration_error"]
    about = (
        f"The expected calibration error is {percent(error)}: how far the share that was right lies from the top "
        f"probability, on average over the examples in {len(bins)} bins (Guo et al. 2017). The "
        "line across a bar is the share that was right, orange its distance from the probability."
    )
    diagram = element("div", reliability.diagram(bins), note(about))
    numbers = table(("top probability", "images", "mean", "right"), rows, label="Calibration by top probability")
    return element("div", diagram, numbers, class_="pair")


def _config(config: Mapping[str, Any]) -> Markup:
    parts = (element("div", element("h3", part), definitions(values)) for part, values in grouped(config).items())
    return element("div", *parts, class_="settings")


def _origin(made_by: Mapping[str, Any] | None) -> Markup:
    if made_by is None:
        return note("The version that trained this checkpoint did not note it.")
    command = element("pre", element("code", made_by["command"]), aria_label="Command", tabindex=0)
    versions = element("div", definitions(made_by["versions"]), class_="settings")
    return join([command, element("p", made_by["hardware"]), versions])
