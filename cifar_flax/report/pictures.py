"""Images that show what a network gets wrong."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from cifar_flax.data.cache import Arrays
from cifar_flax.report.charts import short
from cifar_flax.report.page import Content, Markup, element, join, note, percent

_MISTAKES = 24
_CLASSES = 20  # at most so many have their hardest images shown
_PER_CLASS = 8
_LETTERS = 28  # of a name below a picture
_SIDE = 64  # pixels; larger images are made smaller, so that a page of many stays small
_COLOR_TYPES = {1: 0, 3: 2}  # channels -> the PNG standard's grey, red-green-blue


def shrink(image: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "rows columns channels"]:
    """Return the image with at most `_SIDE` pixels per side: means of squares, without the remainder at the edge."""
    height, width, channels = image.shape
    square = -(-max(height, width) // _SIDE)
    tall, wide = min(square, height), min(square, width)
    rows, columns = height // tall, width // wide
    squares = image[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, channels)
    return np.round(squares.mean(axis=(1, 3))).astype(np.uint8)


def png(image: UInt8[np.ndarray, "height width channels"]) -> bytes:
    """Return the image, of 1 or 3 channels, as PNG. Source: W3C, "Portable Network Graphics"."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with the number of its filter: none
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def mistakes(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """Return the images that have the highest probability for a wrong class."""
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    if not len(wrong):
        return note("There are no mistakes.")
    shown = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:_MISTAKES]
    captions: list[Sequence[Content]] = []
    for i in shown:
        true, taken = (_bold(arrays.class_names[c]) for c in (labels[i], predicted[i]))
        captions.append((true, " → ", taken, " ", percent(float(probabilities[i].max()), 1)))
    which = f"The {len(shown)} of {len(wrong):,} mistakes" if len(wrong) > len(shown) else "All mistakes"
    about = f"{which}, by the probability of the wrong class: true → predicted, that probability."
    return join([note(about), _gallery(arrays, predicted, shown, captions, "large")])


def hardest(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """Return the images with the lowest probability for their own class, for at most `_CLASSES` classes."""
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    classes = np.unique(labels)
    recall = {int(c): float(np.mean(predicted[labels == c] == c)) for c in classes}
    shown = sorted(sorted(recall, key=lambda c: (recall[c], c))[:_CLASSES])
    about = "The images with the lowest probability for their own class: that probability → predicted."
    if len(shown) < len(classes):
        about += f" Of the {len(classes)} classes, the {len(shown)} with the lowest recall."
    parts = [note(about)]
    for c in shown:
        of_class = np.flatnonzero(labels == c)
        images = of_class[np.argsort(probabilities[of_class, c], kind="stable")][:_PER_CLASS]
        captions: list[Sequence[Content]] = []
        for i in images:
            answer = ["right"] if predicted[i] == c else ["→ ", _bold(arrays.class_names[predicted[i]])]
            captions.append((percent(float(probabilities[i, c]), 1), " ", *answer))
        title = element("h3", arrays.class_names[c], element("small", f"recall {percent(recall[c], 1)}"))
        gallery = _gallery(arrays, predicted, images, captions, "small")
        parts.append(element("div", title, gallery, class_="by-class"))
    return join(parts)


def _bold(name: str) -> Markup:
    return element("b", short(name, _LETTERS))


def _gallery(
    arrays: Arrays, predicted: np.ndarray, indices: np.ndarray, captions: Sequence[Sequence[Content]], size: str
) -> Markup:
    images = np.asarray(arrays.images[indices])  # of a split on a device, copy only these to the host
    entries = []
    for i, image, caption in zip(indices, images, captions, strict=True):
        words = f"{arrays.class_names[arrays.labels[i]]} taken for {arrays.class_names[predicted[i]]}"
        uri = f"data:image/png;base64,{base64.b64encode(png(shrink(image))).decode()}"
        picture = element("img", src=uri, alt=words, title=f"image {i:,}: {words}")
        entries.append(element("li", picture, element("p", *caption, class_="caption")))
    return element("ul", *entries, class_=f"pictures {size}")
