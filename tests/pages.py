"""A parser for the HTML pages that the package writes."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np

VOID = {"meta", "img", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict
    children: list = field(default_factory=list)  # elements and strings

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag=None, **attributes):
        """Yield the descendants with `tag` and `attributes` in document order; `class_` is one of their classes."""
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and all(
                    value in child.attributes.get(name.rstrip("_"), "").split() for name, value in attributes.items()
                ):
                    yield child
                yield from child.all(tag, **attributes)

    def one(self, tag=None, **attributes):
        """Return the only descendant with `tag` and `attributes`."""
        (found,) = self.all(tag, **attributes)
        return found


class _Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}>"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(path):
    """Parse a page; assert that it is well-formed, self-contained and free of scripts."""
    document = path.read_text()
    assert document.startswith("<!doctype html>")
    parser = _Parser()
    parser.feed(document)
    parser.close()
    assert parser.open == [parser.root]
    page = parser.root
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    for element in page.all():
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                is_report = re.fullmatch(r"[^:]*/report\.html", value)  # of a run, beside the page
                assert value.startswith("data:image/png;base64,") or value.removeprefix("#") in ids or is_report
    assert not re.search("url|import|//", page.one("style").text)
    return page


def figure(page, title):
    """Return the chart titled `title`."""
    (found,) = (each for each in page.all("figure") if each.one("figcaption").text.split(" · ")[0] == title)
    return found


def table(page, label):
    """Return the rows of the table `label` as lists of cell texts, header first."""
    (found,) = (each for each in page.all("div", role="region") if each.attributes["aria-label"] == label)
    return [[cell.text for cell in row.children] for row in found.all("tr")]


def curves(chart):
    """Return the segments of each line of a chart, as arrays of x and y in the units of the axis ticks."""
    scales = []
    for axis in ("x", "y"):
        ticks = [(float(text.attributes[axis]), _value(text.text)) for text in chart.all("text", class_=axis)]
        places, values = np.array([ticks[0], ticks[-1]]).T
        is_logarithmic = axis == "y" and "logarithmic" in chart.one("figcaption").text
        scales.append(_scale(places, values, is_logarithmic))
    lines = []
    for path in chart.all("path", class_="line"):
        pieces = [piece.removesuffix("h0").split("L") for piece in path.attributes["d"].split("M")[1:]]
        points = [np.array([point.split() for point in piece], float).T for piece in pieces]
        lines.append([(scales[0](x), scales[1](y)) for x, y in points])
    return lines


def _scale(places, values, is_logarithmic):
    if is_logarithmic:
        linear = _scale(places, np.log(values), False)
        return lambda place: np.exp(linear(place))
    return lambda place: values[0] + (place - places[0]) / (places[1] - places[0]) * (values[1] - values[0])


def _value(text):
    number = float(text.replace(",", "").removesuffix("\u202f%"))
    return number / 100 if text.endswith("%") else number
