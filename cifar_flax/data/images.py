"""Image files of any size and kind -> the bytes that a network takes."""

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
MAX_PIXELS = 100_000_000  # of a file that is read: a few bytes can ask for all the memory there is

Shape = tuple[int, int, int]  # height, width, channels


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Here, files may be read by several threads: Pillow gives no warnings of large ones, which are refused anyway."""
    Image = packages.load("pillow")
    with warnings.catch_warnings():  # for all threads at once
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # of odd metadata
        yield


def read_image(path: Path, shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """The picture in `path` as viewers show it, in the size and with the channels of `shape`.

    It is turned as its EXIF says, what is transparent shows white, of an animation it is the first picture, and 16 bits
    become 8. Another size is brought to `shape` as data sets with `data.image_size` are: height and width each for
    itself.

    Raises `UserError`, with the reason alone, where the file is no such picture.
    """
    import PIL

    Image = packages.load("pillow")
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError("a folder without files")
        if not stat.S_ISREG(found.st_mode):
            raise UserError("not a file")
        if not found.st_size:
            raise UserError("empty")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width}x{height} pixels are too many; the most is {MAX_PIXELS:,}")
            return _resize(_pixels(image, shape[2]), shape)
    except UserError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"not an image of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"too many pixels; the most is {MAX_PIXELS:,}") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(reason[:1].lower() + reason[1:]) from error
    except Exception as error:  # whatever Pillow makes of damaged files
        raise UserError(f"damaged ({one_line(error)})") from error


def _pixels(image: Any, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF: the picture is there all the same
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _resize(pixels: UInt8[np.ndarray, "h w channels"], shape: Shape) -> UInt8[np.ndarray, "height width channels"]:
    """Linear, over all pixels that become one, rounded once: as `tf.image.resize` does it with `antialias`."""
    from PIL import Image

    height, width, _ = shape
    if pixels.shape == shape:
        return pixels
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, -1, 0)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes]
    return np.clip(np.round(np.stack(resized, axis=-1)), 0, 255).astype(np.uint8)
