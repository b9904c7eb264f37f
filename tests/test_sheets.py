"""Archives of decoded data, which carry it to machines without TensorFlow and TFDS."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import sheets
from cifar_flax import files
from cifar_flax.data import sources, tfds
from cifar_flax.data.cache import Arrays
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import UserError


def digits(split, count):
    """Return the first digits, as if they were CIFAR-10 of TFDS: digits themselves are not cached."""
    arrays = sources.load(DataConfig(name="digits"), split)
    return Arrays(arrays.images[:count], arrays.labels[:count], arrays.class_names, "cifar10/3.0.2")


DIGITS = {"train": digits("train", 600), "test": digits("test", 100)}  # three strips


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Return a function that packs splits as if `sources.load` had read them."""

    def pack(parts, splits=DIGITS, folder="packed", **settings):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "load", lambda config, split: splits[split])
            return sheets.pack(DataConfig(**settings), parts, tmp_path / folder)

    return pack


def made_up(count, *shape):
    """Return splits of random images, which have no structure that an encoder might assume."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    arrays = Arrays(images, rng.integers(0, 2, count, np.int32), ("a", "b"), "made_up/1.0.0")
    return {"train": arrays, "test": dataclasses.replace(arrays, images=arrays.images[::-1])}


def assert_cached(cache_dir, splits, **settings):
    """The reader of the data finds the splits in the cache; it would need TFDS otherwise."""
    for split, arrays in splits.items():
        cached = sources.load(DataConfig(cache_dir=str(cache_dir), **settings), split)
        assert (cached.class_names, cached.dataset) == (arrays.class_names, arrays.dataset)
        for name in ("images", "labels"):
            ours, theirs = getattr(cached, name), getattr(arrays, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sheets", *map(str, arguments)])
    return sheets.main()


@pytest.mark.parametrize("parts", [1, 3])
def test_unpacked_data_equals_packed_data(pack, tmp_path, parts, monkeypatch):
    paths = pack(parts)
    assert [path.name for path in paths] == [f"cifar10_3.0.2_{i + 1}of{parts}.tar" for i in range(parts)]
    monkeypatch.setattr(tfds, "require_installed", lambda *arguments: pytest.fail("not in the cache"))
    assert run(monkeypatch, "unpack", *reversed(paths), "--out", tmp_path / "cache") == 0
    assert_cached(tmp_path / "cache", DIGITS)


@pytest.mark.parametrize("shape", [(5, 7, 1), (7, 5, 3), (3000, 2, 1), (2, 4096, 3)])
def test_images_of_any_size_fit_into_strips(pack, tmp_path, shape):
    splits = made_up(6, *shape)
    sheets.unpack(pack(2, splits, image_size=0), tmp_path / "cache")
    assert_cached(tmp_path / "cache", splits, name="made_up")


def test_resized_data_is_unpacked_under_its_size(pack, tmp_path):
    splits = made_up(20, 9, 9, 3)
    sheets.unpack(pack(1, splits, image_size=9), tmp_path / "cache")
    assert_cached(tmp_path / "cache", splits, name="made_up", image_size=9)
    assert not (tmp_path / "cache/made_up/1.0.0/train").exists()


@pytest.mark.parametrize("height", [1, 32, 33, 1000, 4096])
def test_strips_are_within_the_limit_of_webp(height):
    images = np.broadcast_to(np.uint8(0), (1001, height, 1, 1))
    strips = sheets.split_into_strips("train", images)
    assert sum(map(len, strips.values())) == 1001
    assert max(map(len, strips.values())) * height <= 16_383
    assert len(strips) == -(-1001 // min(500, 16_383 // height))


def test_packing_again_writes_the_same_bytes(pack):
    assert [path.read_bytes() for path in pack(2)] == [path.read_bytes() for path in pack(2, folder="again")]


def members(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def rewrite(path, contents):
    """Write `contents` to the tar file `path`, with a manifest that is sealed again."""
    manifest = json.loads(contents["manifest.json"])
    manifest.pop("seal")
    contents["manifest.json"] = json.dumps(manifest | {"seal": files.json_checksum(manifest)}).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[-1].offset_data + 30] ^= 1
    path.write_bytes(content)


def other_labels(path):
    path.write_bytes(path.read_bytes().replace(b'"labels":[0,', b'"labels":[7,', 1))


def absent(path):
    path.unlink()


def edited(change):
    """Return a function that applies `change` to the described data of an archive, and seals it again."""

    def edit(path):
        contents = members(path)
        manifest = json.loads(contents["manifest.json"])
        change(manifest["data"], manifest["strips"], contents)
        contents["manifest.json"] = json.dumps(manifest).encode()
        rewrite(path, contents)

    return edit


def strip_of(width, height):
    """Return an edit that replaces the first strip by one whose header has another size, with the right checksum."""

    def change(data, strips, contents):
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "WEBP", lossless=True)
        strip = bytearray(file.getvalue())
        strip[21:25] = (width - 1 | (height - 1) << 14).to_bytes(4, "little")  # the size in the header of VP8L
        contents["train_0.webp"] = bytes(strip)
        strips["train_0.webp"] = sheets.sha256(strip).hexdigest()

    return edited(change)


DAMAGES = [
    (absent, "No such file"),
    (truncated, "end of data|missing|train"),
    (flipped, r"test_0\.webp does not match"),
    (other_labels, r"manifest\.json does not match"),
    (lambda path: path.write_bytes(b"hello"), "ReadError"),
    (lambda path: path.write_bytes(b""), "ReadError"),
    (edited(lambda data, strips, contents: contents.pop("train_0.webp")), r"train_0\.webp"),
    (edited(lambda data, strips, contents: data["splits"]["test"].update(sha256="0")), "do not match their checksum"),
    (edited(lambda data, strips, contents: data["splits"]["train"]["labels"].pop()), "labels"),
    (edited(lambda data, strips, contents: data["splits"]["train"]["labels"].append(0.5)), "labels"),
    (edited(lambda data, strips, contents: data["splits"]["train"].update(shape=[600, 32, 10**9, 3])), "shape"),
    (edited(lambda data, strips, contents: data["splits"]["train"].update(shape=[600, 32, -1, 3])), "shape"),
    (edited(lambda data, strips, contents: data["splits"]["train"].update(shape=None)), "TypeError"),
    (edited(lambda data, strips, contents: data.update(dataset="../evil/1.0.0")), "data.name"),
    (edited(lambda data, strips, contents: data.update(dataset="cifar10/..")), "data.name"),
    (edited(lambda data, strips, contents: data.update(dataset="digits")), "data.name"),
    (edited(lambda data, strips, contents: data["splits"].update({"..": data["splits"].pop("test")})), "eval_split"),
    (edited(lambda data, strips, contents: data.update(format=2)), "format"),
    (edited(lambda data, strips, contents: data.update(image_size="../x")), r"'\.\./x'"),
    (edited(lambda data, strips, contents: data.update(class_names=["a"])), "labels must be 0 to 0"),
    (strip_of(33, 16_000), "33x16000 pixels, not 32x16000"),
    (strip_of(16_383, 16_383), "DecompressionBombError"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_archive_is_reported_in_one_line_and_nothing_is_written(
    pack, tmp_path, damage, message, monkeypatch, capsys
):
    (path,) = pack(1)
    damage(path)
    assert run(monkeypatch, "unpack", path, "--out", tmp_path / "cache") != 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert len(output.err.splitlines()) == 1
    with pytest.raises(UserError, match=message):
        sheets.unpack([path], tmp_path / "cache")
    assert not [file for file in tmp_path.glob("**/*") if file.is_file() and file != path]


def test_names_of_members_are_no_paths(pack, tmp_path):
    (path,) = pack(1)
    rewrite(path, members(path) | {"../evil": b"x", "/tmp/evil": b"x"})
    sheets.unpack([path], tmp_path / "cache")
    assert not list(tmp_path.glob("**/evil"))
    assert_cached(tmp_path / "cache", DIGITS)


def test_all_archives_of_one_set_are_needed(pack, tmp_path):
    first, second = pack(2)
    other = pack(2, made_up(600, 4, 4, 3), folder="other")
    for paths, message in (
        ([second], r"ARCHIVE=\[2\]: must be all 2 parts"),
        ([first, first], r"ARCHIVE=\[1\]: must be all 2 parts"),
        ([first, other[1]], "made_up.*holds other data than .*cifar10"),
    ):
        with pytest.raises(UserError, match=message):
            sheets.unpack(paths, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_other_data_in_the_cache_is_kept(pack, tmp_path):
    sheets.unpack(pack(1), tmp_path / "cache")
    sheets.unpack(pack(1), tmp_path / "cache")
    changed = {split: dataclasses.replace(arrays, images=255 - arrays.images) for split, arrays in DIGITS.items()}
    with pytest.raises(UserError, match="exists with other data"):
        sheets.unpack(pack(1, changed), tmp_path / "cache")
    assert_cached(tmp_path / "cache", DIGITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pack --config.data.name=digits", "error: data.name='digits'"),
        ("pack --config.data.archive=cifar-10-binary.tar.gz", "error: data.name='cifar10'"),
        ("pack --config.data.image_sizes=8", "error: data.image_sizes"),
        ("unpack nowhere.tar", "error: ARCHIVE='nowhere.tar'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments.split(), "--out", tmp_path / "out") != 0
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit_is_not_packed(pack, tmp_path):
    for parts, shape, message in ((1, (1, 4097, 1), "data.image_size=4097"), (9, (2, 2, 1), "--parts=9: .*most 2")):
        with pytest.raises(UserError, match=message):
            pack(parts, made_up(3, *shape))
    assert not list(tmp_path.iterdir())
