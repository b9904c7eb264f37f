"""Curves and the reliability diagram as SVG: sized in units that are pixels on a phone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cifar_flax.report.page import Content, Markup, element

_WIDTH, _HEIGHT = 400, 240
_TOP, _BOTTOM, _LEFT = 10, 36, 44  # margins
_CHARACTER = 6.4  # width of one, about
_LABELS = 12  # characters of a name at the end of a line
_LINE_HEIGHT = 13
_MARKS = 14  # units from one on a line to the next, at least
_COLORS = 8
_SHAPES = ("circle", "square", "triangle", "diamond")

Values = Float[np.ndarray, " values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One of a chart, with gaps where `y` is NaN; lines of the same `style` look the same, on whatever chart."""

    name: str
    x: Values
    y: Values
    style: int
    marks: bool = True  # whether some of its points are marked


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` -> coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, values: Any) -> Any:
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (np.asarray(values) - low) / (high - low) * (self.end - self.start)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    show: Callable[[float], str] | None = None,
    from_zero: bool = False,
    may_be_logarithmic: bool = False,
    skipped: Sequence[Line] = (),
) -> Markup:
    """Curves over epochs, every point of them: of many in one column of pixels the first, last, lowest and highest.

    `show` writes the ticks' values. The y axis is logarithmic where that is allowed and the values span much. Where
    one of `skipped` is above 0 there is a mark on the x axis.
    """
    show = show or number
    lines = [line for line in lines if not np.all(np.isnan(line.y))]
    if not lines:
        return element(
            "figure", element("figcaption", title), element("p", "Nothing of this is logged.", class_="note")
        )
    everything = np.concatenate([line.y[~np.isnan(line.y)] for line in lines])
    low, high = float(everything.min()), float(everything.max())
    logarithmic = may_be_logarithmic and low > 0 and high > 30 * low
    ticks = log_ticks(low, high) if logarithmic else linear_ticks(0.0 if from_zero else low, high)
    names = (
        [short(line.name, _LABELS) for line in lines]
        if 1 < len(lines) <= (_HEIGHT - _TOP - _BOTTOM) // _LINE_HEIGHT
        else []
    )
    left = max(8 + _CHARACTER * max(len(show(tick)) for tick in ticks), _LEFT)
    right = _WIDTH - 8 - _CHARACTER * max(map(len, names), default=0)
    last = max(float(line.x.max()) for line in lines)
    x = Scale(0.0, last if last > 0 else 1.0, left, right)
    y = Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, logarithmic)
    parts = [*axes(x, y, linear_ticks(x.low, x.high), ticks, number, show), *_x_title(x, "epoch")]
    for line in skipped:
        parts += _skipped(line, x, y)
    parts += [_drawn(line, x, y, show) for line in lines]
    parts += _ends(lines, names, x, y)
    caption: tuple[Content, ...] = (title, element("small", " · logarithmic")) if logarithmic else (title,)
    return element("figure", element("figcaption", *caption), svg(parts, _WIDTH, _HEIGHT, _summary(title, lines, show)))


def svg(parts: Sequence[Markup], width: float, height: float, label: str, **attributes: object) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, **attributes)


def legend(entries: Sequence[tuple[Content, int, bool]]) -> Markup:
    """Of lines: their names, styles, and whether they have marks."""
    items = []
    for name, style, marks in entries:
        mark = [_mark(18.0, 6.0, style, 4.0)] if marks else []
        key = (element("path", d="M1 6H35", class_="line"), *mark)
        sample = element("svg", *key, viewBox="0 0 36 12", class_=_class(style), aria_hidden="true")
        items.append(element("li", sample, name))
    return element("ul", *items, class_="legend")


def axes(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
) -> list[Markup]:
    """Lines and labels at the ticks that lie on the scales."""
    parts = []
    for tick in y_ticks:
        at = coordinate(y(tick))
        parts.append(element("path", d=f"M{coordinate(x.start)} {at}H{coordinate(x.end)}", class_="grid"))
        place = {"x": coordinate(x.start - 6), "y": at, "text_anchor": "end", "dominant_baseline": "central"}
        parts.append(element("text", show_y(tick), class_="y", **place))
    parts.append(element("path", d=f"M{coordinate(x.start)} {coordinate(y.start)}H{coordinate(x.end)}", class_="axis"))
    for tick in x_ticks:
        if x.low <= tick <= x.high * (1 + 1e-9):
            at = coordinate(x(tick))
            parts.append(element("path", d=f"M{at} {coordinate(y.start)}v4", class_="axis"))
            place = {"x": at, "y": coordinate(y.start + 16), "text_anchor": "middle"}
            parts.append(element("text", show_x(tick), class_="x", **place))
    return parts


def _x_title(x: Scale, title: str) -> list[Markup]:
    place = {"x": coordinate((x.start + x.end) / 2), "y": _HEIGHT - 4, "text_anchor": "middle"}
    return [element("text", title, **place)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, that take in `low` and `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-20):
        low = low - abs(low) / 10 if low else 0.0
        high = high if high > low else 1.0
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= 5.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that take in `low` and `high`, at most about six."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 6)
    return [float(f"1e{first + i}") for i in range(0, last - first + step, step)]


def number(value: float) -> str:
    """Such as "0.25", "12,000", "2e-5"."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


def share(value: float) -> str:
    """Such as "97.5 %"."""
    return f"{100 * value:.6g}\u202f%"


def coordinate(value: Any) -> str:
    """As short as a hundredth of a unit allows."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def short(name: str, length: int) -> str:
    """At most `length` characters of it, from its begin and its end."""
    return name if len(name) <= length else f"{name[: (length - 1) // 2]}…{name[-(length // 2) :]}"


def thin(x: Values, y: Values) -> tuple[Float[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """Of the points in one column of pixels, where there are many, the first, the last, the lowest and the highest.

    A column that holds NaN alone keeps one, as it is a gap.
    """
    column = np.floor(x)
    if len(x) <= 4 * len(np.unique(column)):
        return x, y
    kept: list[int] = []
    for points in np.split(np.arange(len(x)), np.flatnonzero(np.diff(column)) + 1):
        there = points[~np.isnan(y[points])]
        ends = (there[0], there[-1], there[y[there].argmin()], there[y[there].argmax()]) if len(there) else points[:1]
        kept += sorted({int(point) for point in ends})
    return x[kept], y[kept]


def _drawn(line: Line, x: Scale, y: Scale, show: Callable[[float], str]) -> Markup:
    across, up = thin(x(line.x), y(line.y))
    path, pen = [], "M"
    for i, (at, height) in enumerate(zip(across.tolist(), up.tolist(), strict=True)):
        if math.isnan(height):
            pen = "M"
            continue
        path.append(f"{pen}{coordinate(at)} {coordinate(height)}")
        alone = pen == "M" and (i + 1 == len(up) or math.isnan(up[i + 1]))
        path.append("h0" if alone else "")  # a dot
        pen = "L"
    parts = [element("path", d="".join(path), class_="line")]
    next_mark = -math.inf
    for i, at in enumerate(x(line.x).tolist() if line.marks else ()):
        if at >= next_mark and not math.isnan(line.y[i]):
            title = element("title", f"{line.name}, epoch {number(line.x[i])}: {show(float(line.y[i]))}")
            parts.append(_mark(at, float(y(line.y[i])), line.style, 3.0, title))
            next_mark = at + _MARKS
    return element("g", *parts, class_=_class(line.style))


def _ends(lines: Sequence[Line], names: Sequence[str], x: Scale, y: Scale) -> list[Markup]:
    """The lines' names at their ends, moved apart."""
    named = lines[: len(names)]
    last = [np.flatnonzero(~np.isnan(line.y))[-1] for line in named]
    ends = sorted((float(y(line.y[j])), i) for i, (line, j) in enumerate(zip(named, last, strict=True)))
    places: list[float] = []
    for place, _ in ends:
        places.append(max(place, places[-1] + _LINE_HEIGHT) if places else place)
    lowest = y.start
    for i in reversed(range(len(places))):
        places[i] = lowest = min(places[i], lowest)
        lowest -= _LINE_HEIGHT
    parts = []
    for place, (_, i) in zip(places, ends, strict=True):
        at = {"x": coordinate(x(lines[i].x[last[i]]) + 6), "y": coordinate(place), "dominant_baseline": "central"}
        text = element("text", names[i], class_="end", **at)
        parts.append(element("g", text, class_=_class(lines[i].style)))
    return parts


def _skipped(line: Line, x: Scale, y: Scale) -> list[Markup]:
    """Marks on the x axis where `line` is above 0, one per column of pixels."""
    across, parts = np.floor(x(line.x)), []
    there = line.y > 0
    for column in np.unique(across[there]):
        steps = line.y[there & (across == column)].sum()
        title = element("title", f"skipped steps: {steps:,.0f}")
        corner = f"M{coordinate(column - 3.5)} {coordinate(y.start)}h7l-3.5 -7z"
        parts.append(element("path", title, d=corner, class_="skipped"))
    return parts


def _mark(x: float, y: float, style: int, radius: float, *content: Markup) -> Markup:
    at, r = f"M{coordinate(x)} {coordinate(y)}", radius
    paths = {
        "circle": f"{at}m{-r:g} 0a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z",
        "square": f"{at}m{-r:g} {-r:g}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z",
        "triangle": f"{at}m0 {-1.3 * r:g}l{1.2 * r:g} {2.2 * r:g}h{-2.4 * r:g}z",
        "diamond": f"{at}m0 {-1.4 * r:g}l{1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {-1.4 * r:g}z",
    }
    return element("path", *content, d=paths[_SHAPES[style % len(_SHAPES)]], class_="mark")


def _class(style: int) -> str:
    return f"series-{style % _COLORS}"


def _summary(title: str, lines: Sequence[Line], show: Callable[[float], str]) -> str:
    """The chart in words."""
    words = []
    for line in lines:
        there = line.y[~np.isnan(line.y)]
        words.append(f"{line.name} from {show(float(there[0]))} to {show(float(there[-1]))}")
    return f"{title} over epochs: {'; '.join(words)}"
