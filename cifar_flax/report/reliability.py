"""The reliability diagram as SVG."""

from collections.abc import Sequence
from typing import Any

from cifar_flax.report.charts import Scale, axes, coordinate, share, svg
from cifar_flax.report.page import Markup, element, percent


def diagram(calibration: Sequence[dict[str, Any]]) -> Markup:
    """A bar for the examples whose top probability lies in that bin: a line at the share of them that was right, and
    how far that is from their mean probability; below, how many they are."""
    x = Scale(0.0, 1.0, 54, 384)
    y = Scale(0.0, 1.0, 262, 10)
    total = max(sum(entry["count"] for entry in calibration), 1)
    most = max([entry["count"] for entry in calibration] + [1])
    strip = Scale(0.0, most, 350, 306)
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts, histogram = axes(x, y, ticks, ticks, share, share), axes(x, strip, (), (), share, share)
    for i, entry in enumerate(calibration):
        if not entry["count"]:
            continue
        left, right = x(i / len(calibration)) + 0.75, x((i + 1) / len(calibration)) - 0.75
        accuracy, confidence = entry["accuracy"], entry["confidence"]
        title = element(
            "title",
            f"top probability {percent(confidence)} on average, {percent(accuracy)} right; "
            f"{entry['count']:,} examples ({percent(entry['count'] / total)})",
        )
        highest, lowest = y(max(accuracy, confidence)), y(min(accuracy, confidence))
        parts.append(_bar("sure", left, right, lowest, y.start, title))
        parts.append(_bar("gap", left, right, highest, lowest, title))
        parts.append(_bar("right", left, right, y(accuracy) - 1, y(accuracy) + 1, title))
        histogram.append(_bar("examples", left, right, strip(entry["count"]), strip.start, title))
    parts.append(element("path", d=f"M{x.start} {y.start}L{x.end} {y.end}", class_="ideal"))
    middle = (x.start + x.end) / 2
    parts.append(element("text", "top probability", x=coordinate(middle), y=296, text_anchor="middle"))
    turned = {"transform": f"translate(10 {(y.start + y.end) / 2:g}) rotate(-90)", "text_anchor": "middle"}
    parts.append(element("text", "share that was right", **turned))
    turned["transform"] = f"translate(10 {(strip.start + strip.end) / 2:g}) rotate(-90)"
    histogram.append(element("text", "examples", **turned))
    words = "Reliability diagram: accuracy by top probability; the table tells its numbers"
    return svg([*parts, *histogram], 400, 354, words)


def _bar(name: str, left: float, right: float, top: float, bottom: float, title: Markup) -> Markup:
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return element("rect", title, class_=name, **{side: coordinate(value) for side, value in place.items()})
