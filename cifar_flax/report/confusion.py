"""The confusion matrix as text, PNG and SVG. Rows are true classes, columns are predicted classes."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cifar_flax import files, packages
from cifar_flax.report.charts import coordinate, rectangle, short, svg, text
from cifar_flax.report.page import Markup, element, percent, scrolling

FEW_CLASSES = 20  # up to this many classes, cells show counts and axes show class names
NARROW = 12  # up to this many classes, the whole matrix is readable on a phone
_CELL = 31  # size of a cell in units, for up to FEW_CLASSES classes
_LABELS = 14  # maximum characters of a class name on an axis
_SIDE = 640  # maximum width in pixels, for more than FEW_CLASSES classes
_SHADES = 10
_CORNER = "true \\ predicted"  # heading of the rows and columns of the text table
CELLS = 20_000  # maximum number of cells drawn, for more than FEW_CLASSES classes


def text_lines(counts: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table for a terminal: rows are true classes, columns are predicted classes."""
    width = max(map(len, [*class_names, _CORNER]))
    columns = [max(len(name[:6]), len(f"{counts[:, i].max()}")) for i, name in enumerate(class_names)]
    heads = [f"{name[:6]:>{size}}" for name, size in zip(class_names, columns, strict=True)]
    yield "  ".join([f"{_CORNER:{width}}", *heads])
    for name, row in zip(class_names, counts, strict=True):
        yield "  ".join([f"{name:{width}}", *(f"{n:{size}}" for n, size in zip(row, columns, strict=True))])


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Write the confusion matrix of an evaluation as a PNG.

    Raise `UserError` if matplotlib is missing, too old or broken.
    """
    Figure = packages.load("matplotlib").Figure  # without pyplot, whose backend depends on the environment
    import matplotlib

    settings: Any = {"text.usetex": False, "text.parse_math": False, "savefig.bbox": None, "savefig.dpi": "figure"}
    # Ignore those of the user that need LaTeX or change the size, and warnings about characters that no font has.
    counts, names = np.asarray(result["confusion_matrix"]), list(result["per_class"])
    normalized, png = fractions(counts), io.BytesIO()
    size = min(2.5 + 0.5 * len(names), 16)  # inches
    font = min(10, 400 / len(names))  # points
    with matplotlib.rc_context(settings), warnings.catch_warnings(action="ignore", category=UserWarning):
        figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.imshow(normalized, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font)
        axes.set_yticks(range(len(names)), names, fontsize=font)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        correct = f"{result['accuracy']:.2%} of {result['num_examples']:,} correct"
        axes.set_title(f"{result['dataset']} {result['split']}: {correct}")
        if len(names) <= FEW_CLASSES:  # counts of more classes would be unreadable
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = "white" if normalized[row, column] > 0.5 else "black"
                    axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=9)
        figure.savefig(png, format="png", metadata={"Software": None})
    files.replace(path, png.getvalue())


def fractions(counts: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes classes"]:
    """Return the row-normalized matrix: each count as a fraction of its true class."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def heat_map(counts: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> Markup:
    """Return the matrix as SVG; the opacity of a cell grows with its fraction of its true class.

    Mistakes have their own color; the largest fraction among them is fully opaque. For more than `FEW_CLASSES` classes,
    the matrix has neither counts nor names, and only the `CELLS` largest counts are drawn.
    """
    normalized, is_hit = fractions(counts), np.eye(len(counts), dtype=bool)
    largest_mistake = max(normalized[~is_hit].max(initial=0), 1e-9)
    depth = np.where(is_hit, normalized, normalized / largest_mistake)
    return _few(counts, normalized, depth, names) if len(names) <= FEW_CLASSES else _many(counts, depth)


def _few(counts: np.ndarray, normalized: np.ndarray, depth: np.ndarray, names: Sequence[str]) -> Markup:
    margin = 12 + 6.2 * min(max(map(len, names)), _LABELS)
    size = margin + _CELL * len(names)
    parts = []
    for i, name in enumerate(names):
        center = margin + _CELL * (i + 0.5)
        label = {"words": short(name, _LABELS), "class_": "name", "dominant_baseline": "central"}
        parts.append(text(x=margin - 6, y=center, text_anchor="end", **label))
        turned = f"translate({coordinate(center)} {coordinate(margin - 6)}) rotate(-90)"
        parts.append(text(x=0, y=0, transform=turned, **label))
    for (i, j), count in np.ndenumerate(counts):
        x, y = margin + _CELL * j, margin + _CELL * i
        title = element("title", f"{names[i]} predicted as {names[j]}: {count:,} ({percent(float(normalized[i, j]))})")
        look = {"class_": "hit" if i == j else "miss", "fill_opacity": f"{opaque(float(depth[i, j])):.3g}"}
        parts.append(rectangle(title, x, y, _CELL - 1, _CELL - 1, **look))
        if count:
            half = (_CELL - 1) / 2
            parts.append(text(str(count), x + half, y + half, class_="count", dominant_baseline="central"))
    style = f"max-width: {size * 1.4:.0f}px"
    if len(names) > NARROW:
        style += f"; min-width: {size * 0.8:.0f}px"
    drawing = svg(parts, size, size, _WORDS, style=style)
    return drawing if len(names) <= NARROW else scrolling(drawing, "Confusion matrix")


def _many(counts: np.ndarray, depth: np.ndarray) -> Markup:
    """Return the matrix of many classes, drawn as one path per color and shade."""
    rows, columns = np.nonzero(counts)
    largest = np.argsort(-counts[rows, columns], kind="stable")[:CELLS]
    rows, columns = rows[largest], columns[largest]
    shades = np.ceil(depth[rows, columns] * _SHADES).astype(int)
    parts = [element("path", d=f"M0 0H{len(counts)}V{len(counts)}H0z", class_="frame")]
    side = max(1, len(counts) // 250)  # in units; cells of very large matrices are enlarged to stay visible
    for kind, of_kind in (("hit", rows == columns), ("miss", rows != columns)):
        for shade in np.unique(shades[of_kind]):
            chosen = of_kind & (shades == shade)
            cells = zip(columns[chosen].tolist(), rows[chosen].tolist(), strict=True)
            square = f"h{side}v{side}h{-side}z"
            path = "".join(f"M{column - side // 2} {row - side // 2}{square}" for column, row in cells)
            parts.append(element("path", d=path, class_=kind, fill_opacity=f"{opaque(shade / _SHADES):.3g}"))
    return svg(parts, len(counts), len(counts), _WORDS, style=f"max-width: {_SIDE}px")


_WORDS = "Confusion matrix: rows are true, columns are predicted classes; the table lists the most frequent mistakes"


def opaque(depth: float) -> float:
    """Return the opacity of a cell of `depth` (0 to 1). Any depth above 0 is visible."""
    return 0.0 if depth <= 0 else 0.08 + 0.92 * depth
