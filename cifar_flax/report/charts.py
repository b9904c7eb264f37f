"""SVG charts and their building blocks. One unit is about one pixel on a phone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cifar_flax.report.page import Content, Markup, element, note

_WIDTH, _HEIGHT = 400, 240
_TOP, _BOTTOM, _LEFT = 10, 36, 44  # margins
_CHARACTER = 6.4  # approximate width of a character, in units
_MARKS = 14  # minimum distance between two markers of a line, in units
_COLORS = 8

Values = Float[np.ndarray, " values"]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart, with gaps at NaN values of `y`; lines of the same `style` look the same in all charts."""

    name: str
    x: Values
    y: Values
    style: int
    half_width: Values | None = None  # of a band around the line; NaN: none

    @property
    def known(self) -> Values:
        return self.y[~np.isnan(self.y)]

    @property
    def band(self) -> Float[np.ndarray, "ends values"]:
        """Return the lower and the upper end of the band: two rows, without band those of the line."""
        half_width = np.zeros_like(self.y) if self.half_width is None else np.nan_to_num(self.half_width)
        return np.stack([self.y - half_width, self.y + half_width])


def number(value: float) -> str:
    """Format a number, such as "0.25", "12,000" or "2e-5"."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """A map of values from `low` to `high` to coordinates from `start` to `end`; `show` formats the ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float] = ()
    show: Callable[[float], str] = number
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
    show: Callable[[float], str] = number,
    from_zero: bool = False,
    may_be_logarithmic: bool = False,
    skipped: Sequence[Line] = (),
) -> Markup:
    """Return a figure that plots `lines` against the epoch. Dense lines are reduced by `thin`.

    `show` formats the y tick labels. The y axis is logarithmic if `may_be_logarithmic` is true and the values are
    positive and span more than a factor of 30. Epochs at which a line of `skipped` is above 0 are marked on the x axis.
    """
    lines = [line for line in lines if len(line.known)]
    if not lines:
        return element("figure", element("figcaption", title), note("No values were logged."))
    low, high = min(float(np.nanmin(line.band)) for line in lines), max(float(np.nanmax(line.band)) for line in lines)
    logarithmic = may_be_logarithmic and low > 0 and high > 30 * low
    ticks = log_ticks(low, high) if logarithmic else linear_ticks(0.0 if from_zero else low, high)
    left = max(8 + _CHARACTER * max(len(show(tick)) for tick in ticks), _LEFT)
    last = max(float(line.x.max()) for line in lines) or 1.0
    x = Scale(0.0, last, left, _WIDTH - 8, linear_ticks(0.0, last))
    y = Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, ticks, show, logarithmic)
    parts = [*axes(x, y), text("epoch", (x.start + x.end) / 2, _HEIGHT - 4, text_anchor="middle")]
    for line in skipped:
        parts += _skipped(line, x, y)
    parts += [_band(line, x, y) for line in lines if line.half_width is not None]
    parts += [_drawn(line, x, y) for line in lines]
    caption: tuple[Content, ...] = (title, element("small", " · logarithmic")) if logarithmic else (title,)
    ranges = (f"{line.name} from {show(line.known[0])} to {show(line.known[-1])}" for line in lines)
    drawing = svg(parts, _WIDTH, _HEIGHT, f"{title} over epochs: {'; '.join(ranges)}")
    return element("figure", element("figcaption", *caption), drawing)


def svg(parts: Sequence[Markup], width: float, height: float, label: str, **attributes: object) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, **attributes)


def text(words: str, x: float, y: float, **attributes: object) -> Markup:
    return element("text", words, **attributes, x=coordinate(x), y=coordinate(y))


def rectangle(title: Markup, x: float, y: float, width: float, height: float, **attributes: object) -> Markup:
    place = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", title, **attributes, **{side: coordinate(value) for side, value in place.items()})


def legend(names: Sequence[Content]) -> Markup:
    """Return a legend for lines with the styles 0, 1, ..."""
    items = []
    for style, name in enumerate(names):
        key = (element("path", d="M1 6H35", class_="line"), _mark(18.0, 6.0, style, 4.0))
        color = f"--color: var(--series-{style % _COLORS})"
        sample = element("svg", *key, viewBox="0 0 36 12", style=color, aria_hidden="true")
        items.append(element("li", sample, name))
    return element("ul", *items, class_="legend")


def axes(x: Scale, y: Scale) -> list[Markup]:
    """Return the elements of both axes, with grid lines at the y ticks and labels at all ticks."""
    parts = []
    left, right, bottom = coordinate(x.start), coordinate(x.end), coordinate(y.start)
    for tick in y.ticks:
        parts.append(element("path", d=f"M{left} {coordinate(y(tick))}H{right}", class_="grid"))
        place = {"text_anchor": "end", "dominant_baseline": "central"}
        parts.append(text(y.show(tick), x.start - 6, y(tick), class_="y", **place))
    parts.append(element("path", d=f"M{left} {bottom}H{right}", class_="axis"))
    for tick in x.ticks:
        if x.low <= tick <= x.high * (1 + 1e-9):
            parts.append(element("path", d=f"M{coordinate(x(tick))} {bottom}v4", class_="axis"))
            parts.append(text(x.show(tick), x(tick), y.start + 16, class_="x", text_anchor="middle"))
    return parts


def linear_ticks(low: float, high: float) -> list[float]:
    """Return about five equally spaced round numbers that cover `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-20):
        low = low - abs(low) / 10 if low else 0.0
        high = high if high > low else 1.0
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= 5.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most seven powers of ten that cover `low` to `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 6)
    return [float(f"1e{first + i}") for i in range(0, last - first + step, step)]


def percentage(value: float) -> str:
    """Return the fraction `value` as a percentage, such as "97.5 %"."""
    return f"{100 * value:.6g}\u202f%"


def coordinate(value: Any) -> str:
    """Format a coordinate with at most two decimals."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def short(name: str, length: int) -> str:
    """Return `name`, with "…" in place of its middle if it is longer than `length` characters."""
    return name if len(name) <= length else f"{name[: (length - 1) // 2]}…{name[-(length // 2) :]}"


def thin(x: Values, y: Values) -> tuple[Float[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """Reduce a dense line to the first, last, lowest and highest point in each column of pixels.

    A column that holds only NaN keeps one point, so that the gap remains. A line with at most four points per column
    on average is returned as it is.
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


def _drawn(line: Line, x: Scale, y: Scale) -> Markup:
    across, up = thin(x(line.x), y(line.y))
    path = ""
    for piece in np.ma.clump_unmasked(np.ma.masked_invalid(up)):
        points = [f"{coordinate(at)} {coordinate(height)}" for at, height in zip(across[piece], up[piece], strict=True)]
        path += f"M{'L'.join(points)}{'h0' if len(points) == 1 else ''}"  # h0 draws a single point as a dot
    parts = [element("path", d=path, class_="line")]
    next_mark = -math.inf
    for i, at in enumerate(x(line.x).tolist()):
        if at >= next_mark and not math.isnan(line.y[i]):
            title = element("title", f"{line.name}, epoch {number(line.x[i])}: {y.show(line.y[i])}")
            parts.append(_mark(at, float(y(line.y[i])), line.style, 3.0, title))
            next_mark = at + _MARKS
    return element("g", *parts, style=f"--color: var(--series-{line.style % _COLORS})")


def _band(line: Line, x: Scale, y: Scale) -> Markup:
    path = ""
    for piece in np.ma.clump_unmasked(np.ma.masked_invalid(line.y)):
        low, high = y(np.clip(line.band[:, piece], y.low, y.high))
        across = x(line.x[piece])
        corners = zip([*across, *across[::-1]], [*low, *high[::-1]], strict=True)
        path += f"M{'L'.join(f'{coordinate(at)} {coordinate(height)}' for at, height in corners)}z"
    return element("path", d=path, class_="band", style=f"--color: var(--series-{line.style % _COLORS})")


def _skipped(line: Line, x: Scale, y: Scale) -> list[Markup]:
    """Return markers on the x axis at epochs at which `line` is above 0, at most one per column of pixels."""
    there, parts = line.y > 0, []
    columns, column_of = np.unique(np.floor(x(line.x[there])), return_inverse=True)
    for column, steps in zip(columns, np.bincount(column_of, weights=line.y[there]), strict=True):
        title = element("title", f"skipped steps: {steps:,.0f}")
        corner = f"M{coordinate(column - 3.5)} {coordinate(y.start)}h7l-3.5 -7z"
        parts.append(element("path", title, d=corner, class_="skipped"))
    return parts


def _mark(x: float, y: float, style: int, radius: float, *content: Markup) -> Markup:
    at, r = f"M{coordinate(x)} {coordinate(y)}", radius
    shapes = (
        f"{at}m{-r:g} 0a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z",
        f"{at}m{-r:g} {-r:g}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z",
        f"{at}m0 {-1.3 * r:g}l{1.2 * r:g} {2.2 * r:g}h{-2.4 * r:g}z",
        f"{at}m0 {-1.4 * r:g}l{1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {1.4 * r:g}l{-1.4 * r:g} {-1.4 * r:g}z",
    )  # a circle, a square, a triangle and a diamond
    return element("path", *content, d=shapes[style % len(shapes)], class_="mark")
