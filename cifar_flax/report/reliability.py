"""The reliability diagram as SVG."""

from collections.abc import Sequence
from typing import Any

from cifar_flax.report.charts import Scale, axes, percentage, rectangle, svg, text
from cifar_flax.report.page import Markup, element, percent


def diagram(calibration: Sequence[dict[str, Any]]) -> Markup:
    """Return a reliability diagram with, below it, a histogram of the images per confidence bin.

    The bar of each bin has a line at the accuracy and is orange between the accuracy and the mean confidence.
    """
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    x, y = Scale(0.0, 1.0, 54, 384, ticks, percentage), Scale(0.0, 1.0, 262, 10, ticks, percentage)
    counts = [entry["count"] for entry in calibration]
    strip = Scale(0.0, max([1, *counts]), 350, 306)
    parts, histogram = axes(x, y), axes(Scale(x.low, x.high, x.start, x.end), strip)
    for i, entry in enumerate(calibration):
        if not entry["count"]:
            continue
        left, width = x(i / len(calibration)) + 0.75, (x.end - x.start) / len(calibration) - 1.5
        accuracy, confidence = y(entry["accuracy"]), y(entry["confidence"])
        words = (
            f"mean confidence {percent(entry['confidence'])}, accuracy {percent(entry['accuracy'])}; "
            f"{entry['count']:,} images ({percent(entry['count'] / sum(counts))})"
        )
        title = element("title", words)
        highest, lowest = min(accuracy, confidence), max(accuracy, confidence)  # the y axis of SVG points down
        parts.append(rectangle(title, left, lowest, width, y.start - lowest, class_="sure"))
        parts.append(rectangle(title, left, highest, width, lowest - highest, class_="gap"))
        parts.append(rectangle(title, left, accuracy - 1, width, 2, class_="right"))
        height = strip.start - strip(entry["count"])
        histogram.append(rectangle(title, left, strip.start - height, width, height, class_="examples"))
    parts.append(element("path", d=f"M{x.start} {y.start}L{x.end} {y.end}", class_="ideal"))
    parts.append(text("confidence", (x.start + x.end) / 2, 296, text_anchor="middle"))
    for words, scale in (("accuracy", y), ("images", strip)):
        turned = f"translate(10 {(scale.start + scale.end) / 2:g}) rotate(-90)"
        parts.append(text(words, 0, 0, transform=turned, text_anchor="middle"))
    words = "Reliability diagram: accuracy by confidence; the table lists the values"
    return svg([*parts, *histogram], 400, 354, words)
