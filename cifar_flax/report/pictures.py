"""Images that show what a network gets wrong."""

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

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


def data_uri(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """A PNG, inside an address."""
    return f"data:image/png;base64,{base64.b64encode(png(shrink(image))).decode()}"


def shrink(image: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "rows columns channels"]:
    """At most `_SIDE` pixels high and wide: means of squares, without what is left over at the edge."""
    height, width, channels = image.shape
    square = -(-max(height, width) // _SIDE)
    tall, wide = min(square, height), min(square, width)
    rows, columns = height // tall, width // wide
    squares = image[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, channels)
    return np.round(squares.mean(axis=(1, 3))).astype(np.uint8)


def png(image: UInt8[np.ndarray, "height width channels"]) -> bytes:
    """The image in the format of W3C's "Portable Network Graphics", of 1 or 3 channels."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with the number of its filter: none
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


class _Picture(NamedTuple):
    image: int  # its index
    words: str  # for those who cannot see it
    caption: Content


def mistakes(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """The images that have the highest probability for a wrong class."""
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    if not len(wrong):
        return note("There are no mistakes.")
    shown = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:_MISTAKES]
    pictures = []
    for i in shown.tolist():
        true, taken = arrays.class_names[labels[i]], arrays.class_names[predicted[i]]
        names = (element("b", short(true, _LETTERS)), " → ", element("b", short(taken, _LETTERS)))
        caption = join([*names, " ", percent(float(probabilities[i].max()), 1)])
        pictures.append(_Picture(i, f"{true} taken for {taken}", caption))
    which = f"The {len(shown)} of {len(wrong):,} mistakes" if len(wrong) > len(shown) else "All mistakes"
    about = f"{which}, by the probability of the wrong class: true → predicted, that probability."
    return join([note(about), _gallery(arrays, pictures, "large")])


def hardest(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """Of each class, or of those with the lowest recall where there are many, the images least taken for it."""
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    classes = np.unique(labels)
    recall = {int(c): float(np.mean(predicted[labels == c] == c)) for c in classes}
    shown = sorted(sorted(recall, key=lambda c: (recall[c], c))[:_CLASSES])
    about = "The images with the lowest probability for their own class: that probability → predicted."
    if len(shown) < len(classes):
        about += f" Of the {len(classes)} classes, the {len(shown)} with the lowest recall."
    parts = [note(about)]
    for c in shown:
        name, of_class = arrays.class_names[c], np.flatnonzero(labels == c)
        pictures = []
        for i in of_class[np.argsort(probabilities[of_class, c], kind="stable")][:_PER_CLASS].tolist():
            taken = arrays.class_names[predicted[i]]
            answer: tuple[Content, ...] = (
                ("right",) if predicted[i] == c else ("→ ", element("b", short(taken, _LETTERS)))
            )
            caption = join([percent(float(probabilities[i, c]), 1), " ", *answer])
            pictures.append(_Picture(i, f"{name} taken for {taken}", caption))
        title = element("h3", name, element("small", f"recall {percent(recall[c], 1)}"))
        parts.append(element("div", title, _gallery(arrays, pictures, "small"), class_="by-class"))
    return join(parts)


def _gallery(arrays: Arrays, pictures: Sequence[_Picture], size: str) -> Markup:
    indices = np.array([picture.image for picture in pictures])
    images = np.asarray(arrays.images[indices])  # of a split on a device, these alone come to the host
    entries = [
        element(
            "li",
            element("img", src=data_uri(image), alt=picture.words, title=f"image {picture.image:,}: {picture.words}"),
            element("p", picture.caption, class_="caption"),
        )
        for picture, image in zip(pictures, images, strict=True)
    ]
    return element("ul", *entries, class_=f"pictures {size}")
