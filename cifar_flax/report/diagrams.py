"""The confusion matrix and the reliability diagram as SVG."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cifar_flax.report.charts import Scale, axes, coordinate, share, short, svg
from cifar_flax.report.page import Markup, element, percent, scrolling

FEW_CLASSES = 20  # up to so many, cells have counts and names
NARROW = 12  # of so many, all can be seen on a phone
_CELL = 31  # units, of few classes
_LABELS = 14  # characters of a name beside its row
_SIDE = 640  # units, of many
_SHADES = 10
CELLS = 20_000  # at most so many are drawn, of many classes


def heat_map(counts: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> Markup:
    """Rows are true classes, columns predicted ones: how dark a cell is says which share of its class it holds.

    Mistakes have another color, and are darkest where the share is the largest of all mistakes. Above `FEW_CLASSES`
    there are neither counts nor names, and of more than `CELLS` cells those of the smallest counts are left out.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistakes = shares * (1 - np.eye(len(counts)))
    depth = np.where(np.eye(len(counts), dtype=bool), shares, mistakes / max(mistakes.max(), 1e-9))
    return _few(counts, shares, depth, names) if len(names) <= FEW_CLASSES else _many(counts, depth)


def _few(counts: np.ndarray, shares: np.ndarray, depth: np.ndarray, names: Sequence[str]) -> Markup:
    longest = min(max(map(len, names)), _LABELS)
    margin = 12 + 6.2 * longest
    size = margin + _CELL * len(names)
    parts = []
    for i, name in enumerate(names):
        text = short(name, _LABELS)
        center = coordinate(margin + _CELL * (i + 0.5))
        row = {"x": coordinate(margin - 6), "y": center, "text_anchor": "end", "dominant_baseline": "central"}
        up = {"transform": f"translate({center} {coordinate(margin - 6)}) rotate(-90)", "dominant_baseline": "central"}
        parts += [element("text", text, class_="name", **row), element("text", text, class_="name", **up)]
    for i, j in np.ndindex(counts.shape):
        count, opacity = int(counts[i, j]), opaque(float(depth[i, j]))
        x, y = margin + _CELL * j, margin + _CELL * i
        title = element("title", f"{names[i]} taken for {names[j]}: {count:,} ({percent(float(shares[i, j]))})")
        place = {"x": coordinate(x), "y": coordinate(y), "width": _CELL - 1, "height": _CELL - 1}
        kind = "hit" if i == j else "miss"
        parts.append(element("rect", title, class_=kind, fill_opacity=f"{opacity:.3g}", **place))
        if count:
            middle = {"x": coordinate(x + (_CELL - 1) / 2), "y": coordinate(y + (_CELL - 1) / 2)}
            parts.append(element("text", str(count), class_="count", dominant_baseline="central", **middle))
    style = f"max-width: {size * 1.4:.0f}px"
    if len(names) <= NARROW:
        return svg(parts, size, size, _WORDS, style=style)
    return scrolling(
        svg(parts, size, size, _WORDS, style=f"{style}; min-width: {size * 0.8:.0f}px"), "Confusion matrix"
    )


def _many(counts: np.ndarray, depth: np.ndarray) -> Markup:
    """One path per shade, of at most `CELLS` cells."""
    rows, columns = np.nonzero(counts)
    largest = np.argsort(-counts[rows, columns], kind="stable")[:CELLS]
    rows, columns = rows[largest], columns[largest]
    shades = np.ceil(depth[rows, columns] * _SHADES).astype(int)
    parts = [element("path", d=f"M0 0H{len(counts)}V{len(counts)}H0z", class_="frame")]
    side = max(1, len(counts) // 250)  # units: of very many classes, a cell of its true size could not be seen
    for kind, of_kind in (("hit", rows == columns), ("miss", rows != columns)):
        for shade in np.unique(shades[of_kind]):
            chosen = of_kind & (shades == shade)
            cells = zip(columns[chosen].tolist(), rows[chosen].tolist(), strict=True)
            square = f"h{side}v{side}h{-side}z"
            path = "".join(f"M{column - side // 2} {row - side // 2}{square}" for column, row in cells)
            parts.append(element("path", d=path, class_=kind, fill_opacity=f"{opaque(shade / _SHADES):.3g}"))
    return svg(parts, len(counts), len(counts), _WORDS, style=f"max-width: {_SIDE}px")


_WORDS = "Confusion matrix: rows are true classes, columns predicted ones; the table tells the most frequent mistakes"


def opaque(depth: float) -> float:
    """Of a cell of that depth, from 0 to 1: what is there at all can be seen."""
    return 0.0 if depth <= 0 else 0.08 + 0.92 * float(depth)


def reliability(calibration: Sequence[dict[str, Any]]) -> Markup:
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
