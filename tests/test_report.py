"""Test report.html: its numbers, charts and images equal the evaluation, the log and the data."""

import base64
import io
import json
import re

import made_up
import matplotlib
import numpy as np
import pages
import pytest
from matplotlib import image
from PIL import Image

from cifar_flax.report import confusion, examples
from cifar_flax.report.log import read_log
from cifar_flax.training import metrics


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_matrix_is_drawn(tmp_path, classes):
    result, _, _ = made_up.evaluation(classes)
    path = tmp_path / "matrix.png"
    confusion.plot(path, result)
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.01  # not an empty page


@pytest.mark.parametrize("names", [("dark", "bright"), ("$5", "$\\frac{$"), ("\u732b", "\u72ac\n")])
def test_any_class_names_and_settings_of_matplotlib_can_be_plotted(tmp_path, names):
    result = made_up.evaluation(2)[0]
    result["per_class"] = dict(zip(names, result["per_class"].values(), strict=True))
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "savefig.dpi": 50}):
        confusion.plot(tmp_path / "matrix.png", result)
    with Image.open(tmp_path / "matrix.png") as plot:
        assert plot.size == (420, 420)  # 3.5 inches at 120 dots per inch


def test_report_contains_the_results_of_the_evaluation(tmp_path):
    result, arrays, probabilities = made_up.evaluation(classes=7, count=70)
    page = pages.read(
        made_up.report(tmp_path / "a run", (result | {"tta": "mirror", "tta_fraction": 0.25}, arrays, probabilities))
    )
    head = page.one("header").text
    low, high = metrics.wilson_interval(round(result["accuracy"] * 70), 70)
    for part in (
        "a run",
        "set/1.0.0, test split, checkpoint of step 30",
        "test-time augmentation mirror of the 25% of the images ",
        f"{result['accuracy']:.2%}",
        f" {100 * low:.2f} to {high:.2%}",
        f"{result['accuracy'] * 70:.0f} of 70 ",
        f"top-5 accuracy{result['top5_accuracy']:.2%}",
        f"balanced accuracy{result['balanced_accuracy']:.2%}",
        f"macro F1{result['macro_f1']:.2%}",
        f"loss{result['loss']:.4f}",
        f"calibration error{result['expected_calibration_error']:.2%}",
    ):
        assert part in head.replace("\u202f%", "%").replace("95%", "95 %"), part
    _, *rows = pages.table(page, "Metrics per class")
    for row, (name, figures) in zip(rows, result["per_class"].items(), strict=True):
        fractions = [f"{figures[column]:.2%}" for column in ("precision", "recall", "f1")]
        assert [cell.replace("\u202f", "") for cell in row] == [name, "10", *fractions]
    text = page.text
    for part in ("seed", made_up.MADE_BY["command"], made_up.MADE_BY["hardware"], "jax", "0.10"):
        assert part in text


def test_heat_map_has_the_counts(tmp_path):
    result, *rest = made_up.evaluation(count=400)
    page = pages.read(made_up.report(tmp_path, (result, *rest)))
    section = next(each for each in page.all("section") if each.attributes["id"] == "confusions")
    cells = {}
    for rect in section.all("rect"):
        true, taken, count = re.fullmatch(r"class (\d) predicted as class (\d): (\d+) .*", rect.text).groups()
        cells[int(true), int(taken)] = int(count)
    counts = np.array(result["confusion_matrix"])
    assert cells == {place: count for place, count in np.ndenumerate(counts)}
    assert [int(text.text) for text in section.all("text", class_="count")] == [count for count in counts.flat if count]
    rows = pages.table(page, "Most frequent mistakes")
    mistakes = sorted((counts * (1 - np.eye(4, dtype=int))).flat, reverse=True)
    assert [int(count) for _, count, _ in rows[1:]] == mistakes[:12]


def test_curves_equal_the_log(tmp_path):
    page = pages.read(made_up.report(tmp_path))
    train, held_out = made_up.LINES[:6], made_up.LINES[6:]
    for title, column, drawn in (
        ("Loss", "loss", (train, held_out)),
        ("Accuracy", "accuracy", (train, held_out)),
        ("Learning rate", "learning_rate", (train,)),
        ("Images per second in training", "images_per_second", (train,)),
    ):
        lines_of_chart = pages.curves(pages.figure(page, title))
        assert len(lines_of_chart) == len(drawn)
        for (piece,), lines in zip(lines_of_chart, drawn, strict=True):
            np.testing.assert_allclose(piece[0], [line["epoch"] for line in lines], atol=1e-3)
            values = [line[column] for line in lines]
            np.testing.assert_allclose(piece[1], values, atol=2e-4 * max(values))


def test_long_tails_are_drawn_on_a_logarithmic_scale(tmp_path):
    lines = [made_up.line(step, loss=5 * 0.7**step) for step in range(1, 31)]
    ((piece,),) = pages.curves(pages.figure(pages.read(made_up.report(tmp_path, lines=lines)), "Loss"))
    np.testing.assert_allclose(piece[1], [line["loss"] for line in lines], rtol=2e-3)


def test_skipped_or_missing_values_are_gaps(tmp_path):
    lines = [made_up.line(step) for step in range(1, 11)]
    lines[3] |= {"loss": None, "accuracy": None, "skipped_steps": 5}
    lines[5] |= {"loss": None}
    lines[8] |= {"skipped_steps": 1}
    page = pages.read(made_up.report(tmp_path, lines=lines))
    chart = pages.figure(page, "Loss")
    (pieces,) = pages.curves(chart)
    epochs = [np.round(10 * x).astype(int).tolist() for x, _ in pieces]
    assert epochs == [[1, 2, 3], [5], [7, 8, 9, 10]]
    assert [path.text for path in chart.all("path", class_="skipped")] == ["skipped steps: 5", "skipped steps: 1"]
    assert "6 steps " in page.text
    assert "2 of 10 " in page.text


def test_invalid_lines_of_the_log_are_skipped(tmp_path):
    strange = [None, [], "x", {}, {"epoch": 1}, {"epoch": "1", "split": "train"}, {"epoch": 1, "split": 3}, 10**400]
    strange += [made_up.line(1, loss="high"), made_up.line(2, loss=10**400), made_up.line(3, loss=float("nan"))]
    strange += [
        made_up.line(4, loss=True),
        made_up.line(5),
        made_up.line(6, epoch=float("inf")),
        made_up.line(7, epoch=-1),
    ]
    path = tmp_path / "metrics.jsonl"
    made_up.write_log(tmp_path, strange)
    with path.open("ab") as file:
        file.write(b'\xff\n{"epoch": 1, "spl\n' + b"[" * 100_000 + b"\n" + json.dumps(made_up.line(9)).encode()[:-3])
    log = read_log(path)
    assert list(log.splits) == ["train"]
    np.testing.assert_array_equal(log.train.epoch, [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_array_equal(log.train["loss"], [np.nan] * 4 + [0.6])
    pages.read(made_up.report(tmp_path, lines=None))


def test_reliability_diagram_has_the_bins(tmp_path):
    result, *rest = made_up.evaluation(count=300)
    page = pages.read(made_up.report(tmp_path, (result, *rest)))
    section = next(each for each in page.all("section") if each.attributes["id"] == "calibration")
    ticks = [float(text.attributes["y"]) for text in section.all("text", class_="y")]
    filled = [entry for entry in result["calibration"] if entry["count"]]
    lines, examples = list(section.all("rect", class_="right")), list(section.all("rect", class_="examples"))
    for entry, line, bar in zip(filled, lines, examples, strict=True):
        height = (float(line.attributes["y"]) + 1 - ticks[0]) / (ticks[-1] - ticks[0])
        assert height == pytest.approx(entry["accuracy"], abs=1e-4)
        assert float(bar.attributes["height"]) == pytest.approx(
            44 * entry["count"] / max(other["count"] for other in filled), abs=0.02
        )
    rows = pages.table(page, "Calibration by confidence")[1:]
    assert [int(row[1]) for row in rows] == [entry["count"] for entry in filled]


@pytest.mark.parametrize("channels", [1, 3])
def test_embedded_images_equal_the_data(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 33, channels), np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(examples.png(pixels))))
    np.testing.assert_array_equal(decoded.reshape(pixels.shape), pixels)


@pytest.mark.parametrize(("shape", "small"), [((224, 224), (56, 56)), ((65, 10), (32, 5)), ((1, 200), (1, 50))])
def test_large_images_are_shrunk(shape, small):
    pixels = np.full((*shape, 3), (10, 20, 250), np.uint8)
    small_image = examples.shrink(pixels)
    assert small_image.shape == (*small, 3)
    assert (small_image == (10, 20, 250)).all()
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 1), np.uint8)
    np.testing.assert_allclose(examples.shrink(pixels)[0, 0], pixels[:2, :2].mean(axis=(0, 1)), atol=0.5)


def test_worst_images_are_shown(tmp_path):
    result, arrays, probabilities = made_up.evaluation(count=400)
    page = pages.read(made_up.report(tmp_path, (result, arrays, probabilities)))
    predicted, labels = probabilities.argmax(axis=1), arrays.labels
    wrong = sorted(np.flatnonzero(predicted != labels), key=lambda i: -probabilities[i].max())
    section = {each.attributes["id"]: each for each in page.all("section")}
    shown = list(section["mistakes"].all("li"))
    assert f" {len(wrong)} mistakes" in section["mistakes"].text
    for i, item in zip(wrong[:24], shown, strict=True):
        _assert_image(item, arrays, i, predicted[i])
        assert f"{probabilities[i].max():.1%}" in item.text.replace("\u202f", "")
    groups = list(section["hardest"].all("div", class_="by-class"))
    for label, group in enumerate(groups):
        assert group.one("h3").text.startswith(f"class {label}recall")
        hardest = sorted(np.flatnonzero(labels == label), key=lambda i: probabilities[i, label])[:8]
        for i, item in zip(hardest, group.all("li"), strict=True):
            _assert_image(item, arrays, i, predicted[i])
            assert item.text.replace("\u202f", "").startswith(f"{probabilities[i, label]:.1%}")


def _assert_image(item, arrays, i, predicted):
    img = item.one("img")
    names = arrays.class_names[arrays.labels[i]], arrays.class_names[predicted]
    assert img.attributes["alt"] == f"{names[0]} predicted as {names[1]}"
    decoded = Image.open(io.BytesIO(base64.b64decode(img.attributes["src"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(arrays.images[i]))


def test_report_without_mistakes_log_and_origin(tmp_path):
    result, arrays, _ = made_up.evaluation()
    perfect = np.eye(4, dtype=np.float32)[arrays.labels]
    result |= {"accuracy": 1.0, "confusion_matrix": (10 * np.eye(4, dtype=int)).tolist()}
    page = pages.read(made_up.report(tmp_path, (result, arrays, perfect), lines=None, made_by=None))
    assert page.text.count("There are no mistakes.") == 2
    for part in ("metrics.jsonl is missing", "does not record", "correct"):
        assert part in page.text


def test_names_are_escaped(tmp_path):
    name, quoted = made_up.HOSTILE[3], made_up.HOSTILE[0]
    config = {"data": {quoted: quoted, "lone": "\ud800"}, "<i>": {"<b>": "</dl>"}}
    made_by = {"command": quoted, "hardware": quoted, "versions": {quoted: quoted}}
    lines = [made_up.line(step, split) for step in range(1, 4) for split in ("train", quoted)]
    evaluated = made_up.evaluation(count=200, names=made_up.HOSTILE)
    evaluated[0].update(dataset=quoted, split=quoted)
    page = pages.read(made_up.report(tmp_path / name, evaluated, lines, config, made_by))
    assert page.one("h1").text == name
    assert [row[0] for row in pages.table(page, "Metrics per class")[1:]] == list(made_up.HOSTILE)
    assert not list(page.all("i"))
    known = pages.read(made_up.report(tmp_path / "plain", made_up.evaluation(count=200), lines, config, made_by))
    kinds = [[each.tag for each in of.all() if each.tag in ("b", "img", "svg", "title")] for of in (page, known)]
    assert kinds[0] == kinds[1]


def test_a_thousand_classes_and_a_long_log_fit(tmp_path):
    lines = [made_up.line(step, loss=3.0 + step % 7, skipped_steps=step % 2) for step in range(1, 20_001)]
    evaluated = made_up.evaluation(classes=1000, count=2000, side=128)
    path = made_up.report(tmp_path, evaluated, lines)
    assert path.stat().st_size < 4_000_000
    page = pages.read(path)
    section = {each.attributes["id"]: each for each in page.all("section")}
    assert not list(section["confusions"].one("svg").all("text"))
    drawn = "".join(
        each.attributes["d"]
        for each in section["confusions"].one("svg").all("path")
        if each.attributes["class"] != "frame"
    )
    assert drawn.count("M") == np.count_nonzero(evaluated[0]["confusion_matrix"])
    assert len(pages.table(page, "Metrics per class")) == 1001
    assert "20 of 1000 classes" in section["hardest"].text
    assert len(list(section["hardest"].all("div", class_="by-class"))) == 20
