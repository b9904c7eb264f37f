"""Read image files of any size and format as arrays of the model's input shape."""

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cifar_flax import packages
from cifar_flax.errors import UserError, one_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000  # limit per file, because a small file can decompress to more than the memory

Shape = tuple[int, int, int]  # height, width, channels


@contextlib.contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings inside the block, for all threads. Files above `MAX_PIXELS` are rejected anyway."""
    Image = packages.load("pillow")
    with warnings.catch_warnings():  # not thread-safe, hence once for all threads
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # about invalid metadata
        yield


def read_image(path: Path, shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """Return the image in `path`, resized to `shape`.

    Apply the EXIF orientation, composite transparency on white, take the first frame of an animation, and convert 16
    bits per channel to 8. Resize as `data.image_size` does, without keeping the aspect ratio.

    Raise `UserError`, with the reason alone, without the path, if the file cannot be read as an image.
    """
    Image = packages.load("pillow")
    import PIL.PngImagePlugin as png

    png.MAX_TEXT_CHUNK = png.MAX_TEXT_MEMORY  # comments and color profiles may exceed the default of 1 MB
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError("is a folder")
        if not stat.S_ISREG(found.st_mode):
            raise UserError("is not a regular file")
        if not found.st_size:
            raise UserError("is empty")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"too many pixels, {width}x{height}; at most {MAX_PIXELS:,} are allowed")
            return resize(_pixels(image, shape[2]), shape)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not an image in a supported format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"too many pixels; at most {MAX_PIXELS:,} are allowed") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(reason[:1].lower() + reason[1:]) from error
    except Exception as error:  # Pillow may raise anything for a damaged file
        raise UserError(f"damaged ({one_line(error)})") from error


def _pixels(image: Any, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """Return the pixels of a Pillow image in its original size, as grey (1 channel) or RGB (3)."""
    from PIL import Image, ImageOps

    level, factors = image.info.get("transparency"), {"1": 255, "L;2": 85, "L;4": 17}
    if image.format == "PNG" and isinstance(level, int) and (bits := image.tile[0][3]) in factors:
        image.info["transparency"] = min(level * factors[bits], 255)  # Pillow scales the pixels to 8 bits, but not this
    image.load()
    with contextlib.suppress(Exception):  # ignore damaged EXIF; in place, it may raise only after the transposition
        ImageOps.exif_transpose(image, in_place=True)
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
    from PIL import Image

    height, width, _ = shape
    if pixels.shape == shape:
        return pixels
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, -1, 0)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes]
    return np.clip(np.round(np.stack(resized, axis=-1)), 0, 255).astype(np.uint8)
