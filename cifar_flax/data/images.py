"""Read image files of any size and format as arrays of the model's input shape."""

import contextlib
import functools
import io
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Num, UInt8

from cifar_flax import packages
from cifar_flax.errors import UserError, one_line, reason

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# The start of HEIC and AVIF files (ISO/IEC 23008-12), the formats of some phones.
_HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc", b"ftypavif")
MAX_PIXELS = 100_000_000  # limit per file, because a small file can decompress to more than the memory
_MAX_SIDE = 65_535  # pixels, likewise: an image is resized to the target's width first, with all its rows
_STRIP = 2**18  # pixels that are converted and resized at a time
_memory, _used = threading.Condition(), 0  # pixels that all threads decode

Shape = tuple[int, int, int]  # height, width, channels


@contextlib.contextmanager
def _memory_for(width: int, height: int, copies: int = 1) -> Iterator[None]:
    """Wait until there is memory for `copies` of an image: all threads together decode at most `MAX_PIXELS`.

    Raise `UserError` if there will never be.
    """
    largest = MAX_PIXELS // copies
    if width * height > largest or max(width, height) > _MAX_SIDE:
        allowed = f"{largest:,} are allowed, {_MAX_SIDE:,} per side"
        raise UserError(f"too many pixels, {width}x{height}; at most {allowed}")
    global _used
    pixels = width * height * copies
    with _memory:
        _memory.wait_for(lambda: _used + pixels <= MAX_PIXELS)
        _used += pixels
    try:
        yield
    finally:
        with _memory:
            _used -= pixels
            _memory.notify_all()


def read_image(source: Path | bytes, shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """Return the image in a file, or in the bytes of one, resized to `shape`; height and width 0 keep its size.

    Apply the EXIF orientation, composite transparency on white, take the first frame of an animation, and convert 16
    bits per channel to 8. Resize as `data.image_size` does, without keeping the aspect ratio. Let libjpeg reduce a JPEG
    whose short side is at least four times the target, to at least twice the target.

    Raise `UserError`, with the reason alone, without the path, if the file cannot be read as an image.
    """
    Image = _pillow()
    try:
        if isinstance(source, Path):
            found = os.stat(source)
            if not stat.S_ISREG(found.st_mode):
                raise UserError("is not a regular file")
            if not found.st_size:
                raise UserError("is empty")
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(30)
            webp = _webp_size(head)
            file.seek(0)
            # Pillow takes 16 bytes per pixel of a WebP file, from its opening on, and 4 to 8 of others.
            with (
                _memory_for(*webp, copies=2),
                Image.open(file, formats=FORMATS) as image,
                _memory_for(*((0, 0) if any(webp) else image.size)),
            ):
                return _read(image, shape)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        what = "HEIC or AVIF, which is not supported; convert it to JPEG"
        if head[4:12] not in _HEIF:
            what = f"not an image in a supported format ({', '.join(FORMATS)})"
        raise UserError(what) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"too many pixels; at most {MAX_PIXELS:,} are allowed") from error
    except OSError as error:
        raise UserError(reason(error)) from error
    except Exception as error:  # Pillow may raise anything for a damaged file
        raise UserError(f"damaged ({one_line(error)})") from error


@functools.cache  # checking the installed version takes longer than reading a small image
def _pillow() -> Any:
    Image = packages.load("pillow")
    import PIL.PngImagePlugin as png

    png.MAX_TEXT_CHUNK = png.MAX_TEXT_MEMORY  # comments and color profiles may exceed the default of 1 MB
    return Image


def is_grey(content: bytes) -> bool:
    """Return whether the bytes of an image file have one channel of color; False if they cannot be read."""
    Image = _pillow()
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return Image.getmodebase(image.mode) == "L"
    return False


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return width and height in the first 30 bytes of a WebP file, or (0, 0) for another format.

    Source: RFC 9649, sections 2.5 to 2.7.
    """

    def number(start: int, end: int) -> int:
        return int.from_bytes(head[start:end], "little")

    sizes = {
        b"WEBPVP8 ": (number(26, 28) % 2**14, number(28, 30) % 2**14),
        b"WEBPVP8L": (1 + number(21, 25) % 2**14, 1 + (number(21, 25) >> 14) % 2**14),
        b"WEBPVP8X": (1 + number(24, 27), 1 + number(27, 30)),
    }
    return sizes.get(head[8:16], (0, 0))


def _read(image: Any, shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    from PIL import ImageOps

    if shape[0]:
        image.draft(None, (2 * max(shape[:2]),) * 2)  # JPEG only
    level, factors = image.info.get("transparency"), {"1": 255, "L;2": 85, "L;4": 17}
    if image.format == "PNG" and isinstance(level, int) and (bits := image.tile[0][3]) in factors:
        image.info["transparency"] = min(level * factors[bits], 255)  # Pillow scales the pixels to 8 bits, but not this
    image.load()
    with contextlib.suppress(Exception):  # ignore damaged EXIF; in place, it may raise only after the transposition
        ImageOps.exif_transpose(image, in_place=True)
    return _resized(image, shape if shape[0] else (image.height, image.width, shape[2]))


def _resized(image: Any, shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """Return the pixels of a Pillow image, resized; a large one strip by strip, to save memory."""
    if image.width * image.height <= _STRIP:
        return resize(_pixels(image, shape[2]), shape)
    height, width, channels = shape
    narrow, rows = np.empty((image.height, width, channels), np.float32), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        narrow[top:bottom] = _scale(_pixels(strip, channels), bottom - top, width)
    return _rounded(_scale(narrow, height, width))


def _pixels(image: Any, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """Return the pixels of a Pillow image as grey (1 channel) or RGB (3)."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def resize(pixels: UInt8[np.ndarray, "h w channels"], shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """Resize with an antialiased linear filter and round once, as `tf.image.resize(..., antialias=True)` does."""
    return pixels if pixels.shape == shape else _rounded(_scale(pixels, *shape[:2]))


def _scale(pixels: Num[np.ndarray, "h w channels"], height: int, width: int) -> Float32[np.ndarray, "_ _ channels"]:
    from PIL import Image

    planes = (Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, -1, 0))
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(resized, axis=-1)


def _rounded(pixels: Float32[np.ndarray, "h w channels"]) -> UInt8[np.ndarray, "h w channels"]:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
