"""Files as people have them: every kind, size and colour, and those that are no pictures."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cifar_flax.data import images
from cifar_flax.data.images import read_image
from cifar_flax.data.tensorflow import tf
from cifar_flax.errors import UserError

SHAPE = (6, 8, 3)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, SHAPE, np.uint8)


def write(path, image, **settings):
    image.save(path, **settings)
    return read_image(path, SHAPE)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp"])
def test_lossless_files_give_their_own_bytes(tmp_path, name):
    settings = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(write(tmp_path / name, Image.fromarray(PIXELS), **settings), PIXELS)


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.webp"])
def test_lossy_files_are_as_close_as_they_can_be(tmp_path, name):
    smooth = np.broadcast_to(np.linspace(50, 200, 8)[None, :, None], SHAPE).astype(np.uint8)
    found = write(tmp_path / name, Image.fromarray(smooth), quality=95)
    assert np.abs(found.astype(int) - smooth).max() <= 12


def test_the_kind_is_that_of_the_content_not_of_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path, SHAPE), PIXELS)


def test_grey_and_palette_become_colour_and_colour_becomes_grey(tmp_path):
    grey = Image.fromarray(PIXELS).convert("L")
    np.testing.assert_array_equal(write(tmp_path / "l.png", grey), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(write(tmp_path / "p.png", palette), np.asarray(palette.convert("RGB")))
    black_and_white = Image.fromarray(PIXELS).convert("1")
    assert set(np.unique(write(tmp_path / "1.png", black_and_white))) == {0, 255}
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png", (6, 8, 1))[..., 0], np.asarray(grey))


def test_sixteen_bits_become_eight(tmp_path):
    wide = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    found = write(tmp_path / "wide.png", Image.fromarray(wide))
    np.testing.assert_array_equal(found[..., 0], np.round(wide / 257))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 6), (10, 20, 30, 255))
    image.putpixel((3, 2), (10, 20, 30, 0))
    image.putpixel((4, 2), (0, 0, 0, 128))
    image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((3, 2))
    found = write(tmp_path / "a.png", image)
    assert found[2, 3].tolist() == [255] * 3
    assert found[0, 0].tolist() == list(image.convert("RGB").getpixel((0, 0)))
    if mode == "RGBA":
        assert found[2, 4].tolist() == [127] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_as_viewers_do(tmp_path, orientation):
    turns = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.rot90(np.fliplr(x)),
        6: lambda x: np.rot90(x, 3), 7: lambda x: np.rot90(np.fliplr(x), 3), 8: np.rot90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    expected = turns[orientation](PIXELS)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", expected.shape), expected)


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red = read_image(tmp_path / name, SHAPE)[3, 4]
        assert red[0] > 250
        assert red[2] < 5


@pytest.mark.parametrize("size", [(6, 8), (1, 1), (3, 40), (200, 151), (13, 5)])
def test_other_sizes_are_resized_as_training_data_are(tmp_path, size):
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    found = write(tmp_path / "a.png", Image.fromarray(pixels)).astype(int)
    expected = np.round(tf.image.resize(pixels, SHAPE[:2], antialias=True).numpy())
    assert np.abs(found - expected).max() <= 1  # where the rounding is a matter of the last bit
    assert np.mean(found != expected) < 0.01


def png_of_size(width, height):
    """Its header, and hardly any pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def encoded(kind, **settings):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, format=kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, world\n", "not an image of PNG, JPEG, WEBP, GIF, BMP"),
        (png_of_size(10**4, 10**4 + 1), "10000x10001 pixels are too many; the most is 100,000,000"),
        (png_of_size(10**5, 10**5), "too many pixels"),
        (encoded("PNG")[:2000], "truncated"),
        (encoded("JPEG")[:1500], "truncated"),
        (encoded("WEBP", lossless=True)[:1000], ""),
        (encoded("PNG")[:40] + b"\0" * 100, ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (encoded("TIFF"), "not an image of"),  # which could hold anything
    ],
)
def test_what_is_no_picture_is_said_in_a_word(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    with images.reading(), pytest.raises(UserError) as caught:
        read_image(tmp_path / "file", SHAPE)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "not a file"), (tmp_path / "gone", "no such file or directory")):
        with pytest.raises(UserError, match=reason):
            read_image(path, SHAPE)


def test_damaged_exif_costs_nothing(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", SHAPE), PIXELS)
