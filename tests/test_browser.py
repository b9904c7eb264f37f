"""The HTML pages in a real Chromium: in a desktop window, on a phone and in print."""

import io

import chromium
import made_up
import numpy as np
import pages
import pytest
from PIL import Image

from cifar_flax.modes.compare import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def page():
    with chromium.opened() as page:
        yield page


@pytest.fixture(scope="module", params=["few", "many", "hostile", "comparison"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "few":
            return made_up.report(folder, made_up.evaluation(classes=10, count=400, side=32))
        case "many":
            return made_up.report(folder, made_up.evaluation(classes=100, count=1000), config={"a" * 99: "b" * 999})
        case "hostile":
            names = (*made_up.HOSTILE, "long " * 30, "long" * 30, *map(str, range(14)))
            return made_up.report(folder, made_up.evaluation(classes=20, count=400, names=names))
    results = [made_up.evaluation(classes=10, count=400, seed=seed)[0] for seed in range(4)]
    folders = [
        made_up.run(folder / f"a run of {i}" / ("long" * i), results[i], config={"a": "b" * 99 * i}) for i in range(4)
    ]
    compare(folders, folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_page_fits_the_window(page, path, width, scheme):
    page.requests.clear()
    page.show(path, width=width, scheme=scheme)
    assert page.value("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    edges = "[...document.querySelectorAll('p, h1, h2, figure, img')].map(part => part.getBoundingClientRect().right)"
    assert page.value(f"Math.max(...{edges})") <= width
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), np.float32)
    assert pixels.shape[0] > 1000
    background = {"light": 255, "dark": 23}[scheme]
    assert abs(np.median(pixels) - background) < 3
    assert pixels.std() > 10
    assert page.console == []
    assert {request for request in page.requests if not request.startswith("data:")} == {path.as_uri()}


def test_every_image_is_decoded(page, path):
    page.show(path, width=1280, scheme="light")
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert page.value(broken) == 0
    assert page.value("document.images.length") == len(list(pages.read(path).all("img")))


def test_text_of_charts_is_not_clipped(page, path):
    page.show(path, width=1280, scheme="light")
    outside = """[...document.querySelectorAll('svg text')].filter(text => {
        const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
        return inner.right > outer.right + 12 || inner.left < outer.left - 12 || inner.top < outer.top - 6;
    }).map(text => text.textContent)"""
    assert page.value(outside) == []


def test_page_can_be_printed(page, path):
    page.show(path, width=1280, scheme="dark")
    content = page.pdf()
    assert content.startswith(b"%PDF-")
    count = content.count(b"/Type /Page\n")
    assert 1 <= count <= 25
    assert page.console == []


def test_faulty_pages_are_detected(page, tmp_path):
    """A page with a script, a network request and an overflow fails the checks of the other tests."""
    (tmp_path / "page.html").write_text(
        "<script>console.log('ran')</script><img src='http://127.0.0.1:9/x.png'><p style='width: 2000px'>wide"
    )
    page.show(tmp_path / "page.html", width=390, scheme="dark")
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert len(page.console) == 2
    assert page.value("document.documentElement.scrollWidth") > 390
    assert page.value("matchMedia('(prefers-color-scheme: dark)').matches")
    page.console.clear()
