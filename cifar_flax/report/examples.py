"""Galleries of misclassified and hard images."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from cifar_flax.data.cache import Arrays
from cifar_flax.report.charts import short
from cifar_flax.report.page import Content, Markup, element, join, note, percent
from cifar_flax.runtime.streams import printable

_MISTAKES = 24
_CLASSES = 20  # maximum number of classes whose hardest images are shown
_PER_CLASS = 8
_LETTERS = 28  # maximum characters of a class name in a caption
_SIDE = 64  # pixels; larger images are downscaled to keep the page small
_COLOR_TYPES = {1: 0, 3: 2}  # channels -> PNG color type (grayscale, RGB)


def shrink(image: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "rows columns channels"]:
    """Return the image, downscaled to at most `_SIDE` pixels per side by averaging squares of pixels.

    Rows and columns at the edge that fill no square are dropped.
    """
    height, width, channels = image.shape
    square = -(-max(height, width) // _SIDE)
    tall, wide = min(square, height), min(square, width)
    rows, columns = height // tall, width // wide
    squares = image[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, channels)
    return np.round(squares.mean(axis=(1, 3))).astype(np.uint8)


def png(image: UInt8[np.ndarray, "height width channels"]) -> bytes:
    """Return the image (1 or 3 channels) as PNG. Source: W3C, "Portable Network Graphics"."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # each row starts with its filter type: 0, none
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def mistakes(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """Return a gallery of the misclassified images with the highest confidence."""
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    if not len(wrong):
        return note("There are no mistakes.")
    shown = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:_MISTAKES]
    captions: list[Sequence[Content]] = []
    for i in shown:
        true, other = (_bold(arrays.class_names[c]) for c in (labels[i], predicted[i]))
        captions.append((true, " → ", other, " ", percent(float(probabilities[i].max()), 1)))
    some = f"The {len(shown)} most confident of {len(wrong):,} mistakes"
    which = some if len(wrong) > len(shown) else "All mistakes, most confident first"
    about = f"{which}. Captions: true class → predicted class, confidence."
    return join([note(about), _gallery(arrays, predicted, shown, captions, "large")])


def hardest(arrays: Arrays, probabilities: Float[np.ndarray, "n classes"]) -> Markup:
    """Return a gallery per class of the images with the lowest probability of their true class.

    If there are more than `_CLASSES` classes, only those with the lowest recall are shown.
    """
    labels, predicted = np.asarray(arrays.labels), probabilities.argmax(axis=1)
    classes = np.unique(labels)
    recall = {int(c): float(np.mean(predicted[labels == c] == c)) for c in classes}
    shown = sorted(sorted(recall, key=lambda c: (recall[c], c))[:_CLASSES])
    about = "The images with the lowest probability of their true class. Captions: that probability → predicted class."
    if len(shown) < len(classes):
        about += f" Only the {len(shown)} of {len(classes)} classes with the lowest recall are shown."
    parts = [note(about)]
    for c in shown:
        of_class = np.flatnonzero(labels == c)
        images = of_class[np.argsort(probabilities[of_class, c], kind="stable")][:_PER_CLASS]
        captions: list[Sequence[Content]] = []
        for i in images:
            answer = ["correct"] if predicted[i] == c else ["→ ", _bold(arrays.class_names[predicted[i]])]
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
    images = arrays.images[indices]
    entries = []
    for i, image, caption in zip(indices, images, captions, strict=True):
        words = f"{arrays.class_names[arrays.labels[i]]} predicted as {arrays.class_names[predicted[i]]}"
        uri = f"data:image/png;base64,{base64.b64encode(png(shrink(image))).decode()}"
        name = printable(arrays.files[i]) if arrays.files else f"image {i:,}"
        photo = element("img", src=uri, alt=words, title=f"{name}: {words}")
        entries.append(element("li", photo, element("p", *caption, class_="caption")))
    return element("ul", *entries, class_=f"gallery {size}")
