import dataclasses
import hashlib
import random
import sys

import namespaces
import numpy as np
import pytest
from conftest import REPOSITORY

from cifar_flax import files
from cifar_flax.data import cache, info, order
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(10, dtype=np.int64) % 3


def store(folder, num_examples=10, batches=((IMAGES[:7], LABELS[:7]), (IMAGES[7:], LABELS[7:]))):
    return cache.store(
        folder,
        batches,
        num_examples=num_examples,
        image_shape=(4, 4, 3),
        class_names=("a", "b", "c"),
        dataset="set/1.0.0",
    )


def test_round_trip_is_memory_mapped(tmp_path):
    store(tmp_path / "train")
    arrays = cache.load(tmp_path / "train")
    assert isinstance(arrays.images, np.memmap)
    assert isinstance(arrays.labels, np.memmap)
    np.testing.assert_array_equal(arrays.images, IMAGES)
    np.testing.assert_array_equal(arrays.labels, LABELS)
    assert arrays.labels.dtype == np.int32
    assert (arrays.class_names, arrays.dataset) == (("a", "b", "c"), "set/1.0.0")


def test_a_missing_cache_does_not_warn(tmp_path):
    assert cache.load(tmp_path / "train") is None


def test_files_not_written_by_the_cache_are_never_removed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match=r"data\.cache_dir: .*photos: Directory not empty"),
    ):
        cache.load(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"mine"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip_a_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "manifest.json"])
def test_every_damage_is_detected_and_the_cache_is_rebuilt(tmp_path, file, damage):
    store(tmp_path / "train")
    DAMAGES[damage](tmp_path / "train" / file)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(tmp_path / "train") is None
    np.testing.assert_array_equal(store(tmp_path / "train").images, IMAGES)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "sha256": 3}', "[" * 10**5])
def test_invalid_manifest_is_detected(tmp_path, text):
    store(tmp_path / "train")
    (tmp_path / "train" / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(tmp_path / "train") is None


@pytest.mark.parametrize("num_examples", [9, 11])
def test_wrong_number_of_examples_leaves_nothing(tmp_path, num_examples):
    with pytest.raises(UserError, match=f"10 examples.*{num_examples}"):
        store(tmp_path / "train", num_examples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    with pytest.raises(UserError, match="labels"):
        store(tmp_path / "train", batches=[(IMAGES, np.full(10, label))])
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_data_set_is_refused(tmp_path):
    store(tmp_path / "train")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*other/1\.0\.0"):
        cache.store(
            tmp_path / "train",
            [(IMAGES, LABELS)],
            num_examples=10,
            image_shape=(4, 4, 3),
            class_names=("a", "b", "c"),
            dataset="other/1.0.0",
        )


def test_interrupted_decoding_leaves_nothing(tmp_path):
    def batches():
        yield IMAGES[:5], LABELS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "train", batches=batches())
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*/file/train\b.*File exists"):
        store(tmp_path / "file" / "train")


def test_the_newest_version_of_a_key_is_found(tmp_path):
    folder = tmp_path / "set" / "*" / "train"
    assert cache.newest(folder) is None
    for version in ("3.0.2", "3.0.10", "2.9.9"):
        store(tmp_path / "set" / version / "train.ab1")
    store(tmp_path / "set" / "3.0.2" / "train.cd1")
    store(tmp_path / "set" / "3.0.11" / "train_32px.ab1")
    assert cache.newest(folder) == cache.newest(folder, "ab1") == tmp_path / "set" / "3.0.10" / "train.ab1"
    assert cache.newest(folder, "cd1") == tmp_path / "set" / "3.0.2" / "train.cd1"
    assert cache.newest(folder, "ab") is None
    assert cache.newest(tmp_path / "set" / "2.9.9" / "train") == tmp_path / "set" / "2.9.9" / "train.ab1"


FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from cifar_flax.data import cache
from cifar_flax.errors import UserError
folder, images = Path(sys.argv[1]), np.ones((2000, 32, 32, 3), np.uint8)
try:
    cache.store(
        folder / "train", [(images, np.zeros(2000, np.int32))],
        num_examples=2000, image_shape=(32, 32, 3), class_names=("a",), dataset="set/1.0.0",
    )
except UserError as error:
    print(error)
print(list(folder.iterdir()))
"""


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path):
    program = [sys.executable, "-c", FULL_DISK, tmp_path]
    done = namespaces.run_on_small_disk(tmp_path, "4m", program, cwd=REPOSITORY)
    wanted = f"data.cache_dir: cannot write {tmp_path}/train: No space left on device\n[]\n"
    assert (done.returncode, done.stdout) == (0, wanted), done.stderr


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Store images that count as a large split: eight blocks, of which a start verifies five."""
    monkeypatch.setattr(cache, "_BLOCK", 2**16)
    monkeypatch.setattr(cache, "_WHOLE", 2**18)
    monkeypatch.setattr(cache, "_SAMPLE", 5)
    count = 7 * 2**16 // 48 + 100
    images = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), np.uint8)
    store(tmp_path / "train", count, [(images, np.arange(count) % 3)])
    return tmp_path / "train"


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", ["labels", "header", "first", "last", "shortened", "lengthened", "sampled"])
def test_damage_of_a_large_split_is_found_at_the_start(large, monkeypatch, damage):
    images, chosen = large / "images.npy", (2, 4, 5)
    monkeypatch.setattr(random.SystemRandom, "sample", lambda self, blocks, count: chosen[:count])
    size = images.stat().st_size
    flip(images, 3 * 2**16 + 9)  # not chosen
    assert cache.load(large) is not None
    if damage == "labels":
        flip_a_bit(large / "labels.npy")
    elif damage in ("shortened", "lengthened"):
        with images.open("r+b") as file:
            file.truncate(size - 1 if damage == "shortened" else size + 1)
    else:
        flip(images, {"header": 20, "first": 2**16 - 1, "last": size - 1, "sampled": 4 * 2**16}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(large) is None


def test_other_blocks_are_chosen_at_each_start(large):
    """The doctor verifies them all."""
    flip(large / "images.npy", 3 * 2**16)
    with pytest.raises(ValueError, match=r"images\.npy"):
        cache.verify(large)
    for _ in range(300):
        try:
            cache.verify(large, sample=True)
        except ValueError:
            return
    pytest.fail("the damaged block was never chosen")


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_recorded_checksum_and_statistics_are_those_of_the_arrays(large, fraction, monkeypatch):
    arrays = cache.load(large)
    assert arrays.known_checksum
    computed = dataclasses.replace(arrays, known_checksum="", histogram=None)
    assert arrays.checksum() == computed.checksum()
    assert arrays.checksum() == hashlib.sha256(arrays.images.tobytes() + arrays.labels.tobytes()).hexdigest()
    examples, held_out = order.split_validation(len(arrays.labels), fraction)
    expected, read, histogram = DatasetInfo.of(computed, examples, "standard"), [], cache.pixel_histogram
    recorded = lambda images, some: read.extend(some.tolist()) or histogram(images, some)  # noqa: E731
    monkeypatch.setattr(info, "pixel_histogram", recorded)
    assert DatasetInfo.of(arrays, examples, "standard") == expected  # to the bit
    assert read == held_out.tolist()


def test_splits_that_earlier_releases_stored_still_load(large):
    arrays, manifest = cache.load(large), files.read_sealed(large / "manifest.json")
    for name in ("blocks", "checksum", "histogram"):
        del manifest[name]
    files.write_sealed(large / "manifest.json", manifest)
    earlier = cache.load(large)
    assert (earlier.known_checksum, earlier.histogram) == ("", None)
    assert earlier.checksum() == arrays.checksum()
    flip(large / "images.npy", 3 * 2**16)
    with pytest.warns(UserWarning, match="damaged"):  # verified whole
        assert cache.load(large) is None


def test_images_that_differ_on_the_disk_are_not_stored(tmp_path, monkeypatch):
    write = cache._write_headers

    def write_wrongly(images, labels, count, image_shape):
        write(images, labels, count, image_shape)
        if count:
            images.write(bytes(1))

    monkeypatch.setattr(cache, "_write_headers", write_wrongly)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*read back"):
        store(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []
