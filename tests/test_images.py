"""Test reading image files: formats, sizes, color modes, EXIF orientation, and files that are not images."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from conftest import REPOSITORY, python_path
from PIL import Image, PngImagePlugin
from processes import environment

from cifar_flax.data import images
from cifar_flax.data.images import read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime.allocator import SETTINGS

SHAPE = (6, 8, 3)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, SHAPE, np.uint8)


def png(*parts):
    """Return a PNG file that consists of `parts`, each a type and its data."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*parts, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def write(path, image, **settings):
    image.save(path, **settings)
    return read_image(path, SHAPE)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp"])
def test_lossless_formats_are_read_exactly(tmp_path, name):
    settings = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(write(tmp_path / name, Image.fromarray(PIXELS), **settings), PIXELS)


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.webp"])
def test_lossy_formats_are_read_approximately(tmp_path, name):
    smooth = np.broadcast_to(np.linspace(50, 200, 8)[None, :, None], SHAPE).astype(np.uint8)
    result = write(tmp_path / name, Image.fromarray(smooth), quality=95)
    assert np.abs(result.astype(int) - smooth).max() <= 12


def test_format_is_detected_from_the_content_not_the_name(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path, SHAPE), PIXELS)


def test_color_modes_are_converted(tmp_path):
    grey = Image.fromarray(PIXELS).convert("L")
    np.testing.assert_array_equal(write(tmp_path / "l.png", grey), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(write(tmp_path / "p.png", palette), np.asarray(palette.convert("RGB")))
    black_and_white = Image.fromarray(PIXELS).convert("1")
    assert set(np.unique(write(tmp_path / "1.png", black_and_white))) == {0, 255}
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png", (6, 8, 1))[..., 0], np.asarray(grey))


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    wide = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    result = write(tmp_path / "wide.png", Image.fromarray(wide))
    np.testing.assert_array_equal(result[..., 0], np.round(wide / 257))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_composited_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 6), (10, 20, 30, 255))
    image.putpixel((3, 2), (10, 20, 30, 0))
    image.putpixel((4, 2), (0, 0, 0, 128))
    image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((3, 2))
    result = write(tmp_path / "a.png", image)
    assert result[2, 3].tolist() == [255] * 3
    assert result[0, 0].tolist() == list(image.convert("RGB").getpixel((0, 0)))
    if mode == "RGBA":
        assert result[2, 4].tolist() == [127] * 3


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_level_of_a_grey_png_may_be_transparent(tmp_path, bits):
    largest = 2**bits - 1
    for transparent, opaque in ((0, largest), (largest, 0), (largest // 3, largest - largest // 3)):
        row = int(f"{transparent:0{bits}b}{opaque:0{bits}b}".ljust(32, "0"), 2).to_bytes(4)[: -(-2 * bits // 8)]
        header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
        parts = (b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(b"\0" + row))
        (tmp_path / "a.png").write_bytes(png(*parts))
        pixels = read_image(tmp_path / "a.png", (1, 2, 3))
        assert pixels[0, :, 0].tolist() == [255, round(opaque * 255 / largest)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    transforms = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.rot90(np.fliplr(x)),
        6: lambda x: np.rot90(x, 3), 7: lambda x: np.rot90(np.fliplr(x), 3), 8: np.rot90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    expected = transforms[orientation](PIXELS)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", expected.shape), expected)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red = read_image(tmp_path / name, SHAPE)[3, 4]
        assert red[0] > 250
        assert red[2] < 5


@pytest.mark.parametrize("size", [(6, 8), (1, 1), (3, 40), (200, 151), (13, 5)])
def test_other_sizes_are_resized_like_training_images(tf, tmp_path, size):
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    result = write(tmp_path / "a.png", Image.fromarray(pixels)).astype(int)
    expected = np.round(tf.image.resize(pixels, SHAPE[:2], antialias=True).numpy())
    assert np.abs(result - expected).max() <= 1  # a value near .5 may be rounded either way
    assert np.mean(result != expected) < 0.01


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_large_images_are_resized_in_strips_as_at_once(tmp_path, monkeypatch, mode):
    pixels = RNG.integers(0, 256, (61, 47, 4), np.uint8)
    image = Image.fromarray(pixels.view(np.uint16)[..., 0]) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    at_once = write(tmp_path / "a.png", image, exif=exif).astype(int)
    for strip in (1, 500, 61 * 47 - 1):
        monkeypatch.setattr(images, "_STRIP", strip)
        difference = np.abs(read_image(tmp_path / "a.png", SHAPE) - at_once)
        assert difference.max() <= 1  # a value near .5 may be rounded either way
        assert np.mean(difference) < 0.01


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_reduced_while_decoding(tmp_path, monkeypatch, orientation):
    decoded = []
    pixels_of = images._pixels
    monkeypatch.setattr(
        images, "_pixels", lambda image, channels: decoded.append(image.size) or pixels_of(image, channels)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    shape = (8, 8, 3)
    for size, wanted in (((40, 31), (40, 31)), ((40, 32), (20, 16)), ((320, 160), (40, 20))):
        photo = Image.fromarray(RNG.integers(0, 256, (3, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        photo.save(tmp_path / "a.jpg", exif=exif, quality=95)
        result = read_image(tmp_path / "a.jpg", shape).astype(int)
        assert decoded.pop() == (wanted if orientation == 1 else wanted[::-1])
        whole = images.resize(np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")), shape).astype(int)
        whole = whole if orientation == 1 else np.rot90(whole, 3)
        assert np.abs(result - whole).mean() <= (4 if wanted != size else 0.01)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0II*\0"])
def test_sizes_of_webp_files_are_read_from_their_headers(lossless, exif):
    for size in ((1, 1), (7, 300), (16383, 2), (2, 16383)):
        stream = io.BytesIO()
        Image.new("RGBA", size, (1, 2, 3, 255)).save(stream, "WEBP", lossless=lossless, exif=exif, method=0)
        assert images._webp_size(stream.getvalue()[:30]) == size
    assert images._webp_size(encoded("PNG")[:30]) == images._webp_size(b"") == (0, 0)


def test_the_limit_of_webp_files_is_half_that_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    write(tmp_path / "a.png", Image.new("RGB", (100, 60)))
    with pytest.raises(UserError, match="100x60; at most 5,000"):
        write(tmp_path / "a.webp", Image.new("RGB", (100, 60)))


def test_threads_wait_for_memory():
    order = []

    def hold():
        with images._memory_for(5000, 10_000):
            order.append("second")

    thread = threading.Thread(target=hold)
    with images._memory_for(6000, 10_000), images._memory_for(4000, 10_000):
        thread.start()
        thread.join(0.2)
        with images._memory_for(0, 0):  # small images do not wait behind large ones
            order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with images._memory_for(10_000, 10_000):
        pass


# Reads four files in four threads; prints by how many bytes per pixel of one file the process grew.
GREW = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import PIL.ImageOps, PIL.PngImagePlugin
from cifar_flax.data import images

def peak():
    # Not ru_maxrss, which begins with that of the parent process.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

images.MAX_PIXELS = 9_000_000
before = peak()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda path: images.read_image(Path(path), (32, 32, 3)), sys.argv[1:] * 4))
print((peak() - before) / 9_000_000)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc of Linux")
def test_memory_of_large_images(tmp_path):
    """Four bytes per pixel decoded and four rotated, one file at a time; copies in float32 would take 12 more."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (3000, 3000)).save(tmp_path / "a.png", exif=exif, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", GREW, str(tmp_path / "a.png")],
        env=environment(PYTHONPATH=python_path(REPOSITORY), **SETTINGS),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8 + 8  # and the strips


def png_of_size(width, height):
    """Return a PNG file whose header states this size, with almost no pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))))


def encoded(kind, **settings):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, format=kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, world\n", "not an image"),
        (png_of_size(10**4, 10**4 + 1), "10000x10001"),
        (png_of_size(10**5, 10**5), "pixels"),
        (png_of_size(1, 2**16), "1x65536"),  # resizing the width alone would take gigabytes
        (encoded("PNG")[:2000], "truncated"),
        (encoded("JPEG")[:1500], "truncated"),
        (encoded("WEBP", lossless=True)[:1000], ""),
        (encoded("PNG")[:40] + b"\0" * 100, ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (encoded("TIFF"), "not an image"),  # not among the supported formats
    ],
)
def test_invalid_files_raise_a_one_line_error(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError) as caught:
        read_image(tmp_path / "file", SHAPE)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pipes_and_missing_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "not a regular file"), (tmp_path / "gone", "no such file or directory")):
        with pytest.raises(UserError, match=reason):
            read_image(path, SHAPE)


def test_long_metadata_is_accepted(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    np.testing.assert_array_equal(write(tmp_path / "text.png", Image.fromarray(PIXELS), pnginfo=text), PIXELS)
    result = write(tmp_path / "profile.png", Image.fromarray(PIXELS), icc_profile=b"x" * 3_000_000)
    np.testing.assert_array_equal(result, PIXELS)


def test_the_orientation_is_applied_beside_a_corrupt_exif_tag(tmp_path):
    """Pillow cannot write the rational number -1/0, which some cameras store as a resolution."""
    tags = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x011A, 10, 1, 38)]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4) + struct.pack("<ii", -1, 0)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (8, 6, 3)), np.rot90(PIXELS, 3))


def test_corrupt_exif_is_ignored(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", SHAPE), PIXELS)
