"""HTML that is safe by construction: every string that is not `Markup` is escaped."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cifar_flax import files

_STYLE = Path(__file__).with_name("page.css")
_VOID = ("img", "meta", "wbr")  # elements without content
NOTHING = "\u2013"  # placeholder for a missing value
# This policy makes browsers run no scripts and send no network requests.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """A string of HTML, which is inserted into pages without escaping."""

    __slots__ = ()


Content = str  # `Markup` or plain text


def join(parts: Iterable[Content]) -> Markup:
    return Markup("".join(map(_escape, parts)))


def element(name: str, /, *content: Content, **attributes: object) -> Markup:
    """Return `<name attributes>content</name>`; `class_` becomes class, `aria_label` becomes aria-label."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    inside = "".join(f' {names[key]}="{_escape(str(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{inside}>" if name in _VOID else f"<{name}{inside}>{join(content)}</{name}>")


def _escape(text: Content) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


class Section(NamedTuple):
    name: str  # id of the HTML element
    title: str
    content: Markup


def note(*content: Content) -> Markup:
    return element("p", *content, class_="note")


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]], *, label: str, kind: str = "figures") -> Markup:
    """Return a table whose first column names the rows; it scrolls if it is too wide or too long.

    `label` describes the table to screen readers. `kind` is "figures" (all columns but the first are right-aligned) or
    "text".
    """
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = (
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    )
    whole = element("table", element("thead", head), element("tbody", *body), class_=kind)
    return scrolling(whole, label)


def scrolling(content: Markup, label: str) -> Markup:
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def definitions(entries: Mapping[str, Content]) -> Markup:
    """Return a list of names and their values."""
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in entries.items())
    return element("dl", *pairs)


def write(path: Path, title: str, head: Markup, sections: Sequence[Section]) -> None:
    """Write an HTML document to `path`, atomically: `head`, links to the sections, and the sections.

    Characters that UTF-8 cannot encode, such as half of a surrogate pair, become "?". Raise `OSError` if the
    file cannot be written.
    """
    links = (element("a", section.title, href=f"#{section.name}") for section in sections)
    parts = (element("section", element("h2", part.title), part.content, id=part.name) for part in sections)
    body = element(
        "body",
        element("header", head),
        element("nav", *links, aria_label="Parts of this page"),
        element("main", *parts),
    )
    metadata = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(_STYLE.read_text("utf-8"))),
    )
    document = f"<!doctype html>\n{element('html', metadata, body, lang='en')}\n"
    files.replace(path, document.encode(errors="replace"))


def percent(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{100 * value:.{digits}f}\u202f%"
