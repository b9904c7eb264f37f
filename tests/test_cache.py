import sys

import namespaces
import numpy as np
import pytest
from conftest import REPOSITORY

from cifar_flax.data import cache
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
