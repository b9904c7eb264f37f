"""Read the same images from every format, and refuse damaged files."""

import hashlib
import tarfile
import tracemalloc
from pathlib import Path

import archive_files as write
import numpy as np
import pytest
from archive_files import BATCHES, COUNTS, NAMES, examples  # noqa: F401  (examples is a fixture)

from cifar_flax.data import archives
from cifar_flax.data.archives import cifar, npz, parquet
from cifar_flax.data.images import resize
from cifar_flax.errors import ConfigError, UserError

# Format -> name of a packaging -> function that writes examples to a folder and returns the path to read.
PACKAGINGS = {
    "binary": {
        "tar.gz": lambda tmp, e: write.tar(tmp / "a.tar.gz", under("cifar-10-batches-bin", write.binary(e))),
        "tar": lambda tmp, e: write.tar(tmp / "a.tar", under("cifar-10-batches-bin", write.binary(e)), "w"),
        "dot": lambda tmp, e: write.tar(tmp / "a.tgz", under("./cifar-10-batches-bin", write.binary(e))),
        "flat": lambda tmp, e: write.tar(tmp / "a.tar.gz", write.binary(e)),
        "folder": lambda tmp, e: write.folder(tmp / "anything", write.binary(e)),
        "parent": lambda tmp, e: write.folder(tmp / "cifar-10-batches-bin", write.binary(e)).parent,
        "reverse": lambda tmp, e: write.tar(tmp / "a.tgz", dict(reversed(write.binary(e).items()))),
        "CIFAR-100": lambda tmp, e: write.tar(tmp / "a", under("cifar-100-binary", write.binary(e, 100))),
    },
    "python": {
        "tar.gz": lambda tmp, e: write.tar(tmp / "a", under("cifar-10-batches-py", write.python(e, write.python2))),
        "tar": lambda tmp, e: write.tar(tmp / "a", under("cifar-10-batches-py", write.python(e, write.python2)), "w"),
        "dot": lambda tmp, e: write.tar(tmp / "a", under("./cifar-10-batches-py", write.python(e, write.python2))),
        "flat": lambda tmp, e: write.tar(tmp / "a", write.python(e, write.python2)),
        "folder": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.python2)),
        "parent": lambda tmp, e: write.folder(tmp / "cifar-10-batches-py", write.python(e, write.python2)).parent,
        "Python 3, protocol 2": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.dumps(2))),
        "Python 3, protocol 3": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.dumps(3))),
        "Python 3, protocol 4": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.dumps(4))),
        "without names": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.python2, meta=False)),
        "CIFAR-100": lambda tmp, e: write.folder(tmp / "a", write.python(e, write.python2, 100)),
        "CIFAR-100, parent": (
            lambda tmp, e: write.folder(tmp / "cifar-100-python", write.python(e, write.python2, 100)).parent
        ),
    },
    "parquet": {
        "folder": lambda tmp, e: write.parquet(tmp / "a", e),
        "snapshot": lambda tmp, e: write.parquet(tmp / "plain_text", e).parent,
        "file": lambda tmp, e: write.parquet(tmp / "a", e) / "train-00000-of-00001.parquet",
        "shards": lambda tmp, e: write.parquet(tmp / "a", e, shards=11),
        "image": lambda tmp, e: write.parquet(tmp / "a", e, columns=("image", "label")),
        "CIFAR-100": lambda tmp, e: write.parquet(tmp / "cifar100", e, columns=("img", "fine_label")).parent,
        "without names": lambda tmp, e: write.parquet(tmp / "a", e, names=()),
    },
    "npz": {
        "Keras": lambda tmp, e: write.npz(tmp / "a.npz", e),
        "MedMNIST": lambda tmp, e: write.npz(tmp / "a.npz", e, npz.NAMES[1], column=True),
        "with names": lambda tmp, e: write.npz(tmp / "a.npz", e, class_names=np.array(NAMES)),
    },
}
ALL = [(kind, name) for kind, packagings in PACKAGINGS.items() for name in packagings]


def under(folder, contents):
    return {f"{folder}/{name}": content for name, content in contents.items()}


def read(path, split="train", name="cifar10", **settings):
    """Return images, labels and the description of a split."""
    found = archives.find(path).read(split, name, **settings)
    images, labels = map(np.concatenate, zip(*found.batches, strict=True))
    assert images.shape[1:] == found.image_shape
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    return images, labels, found


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_all_formats_return_the_same_arrays(tmp_path, examples, kind, name):  # noqa: F811
    path = PACKAGINGS[kind][name](tmp_path, examples)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    archive = archives.find(path)
    assert (archive.path, archive.format) == (path, kind)
    assert all(file.is_file() for file in archive.files)
    for split in ("train", "test"):
        images, labels, found = read(path, split, "cifar100" if "CIFAR-100" in name else "cifar10")
        np.testing.assert_array_equal(images, examples.images[split])
        np.testing.assert_array_equal(labels, examples.labels[split])
        hundred = name == "CIFAR-100" and kind == "binary"  # without a file of names
        assert found.class_names[:10] == (archives.CLASS_NAMES["cifar100"][:10] if hundred else NAMES)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("kind", PACKAGINGS)
def test_images_are_resized(tmp_path, examples, kind):  # noqa: F811
    images, _, found = read(next(iter(PACKAGINGS[kind].values()))(tmp_path, examples), "test", image_size=20)
    assert found.image_shape == (20, 20, 3)
    np.testing.assert_array_equal(images[3], resize(examples.images["test"][3], (20, 20, 3)))


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_grey_images_have_one_channel(tmp_path, kind):
    grey = write.random_examples(channels=1)
    path = write.parquet(tmp_path / "a", grey) if kind == "parquet" else write.npz(tmp_path / "a.npz", grey)
    np.testing.assert_array_equal(read(path)[0], grey.images["train"])
    if kind == "npz":
        grey.images = {split: images[..., 0] for split, images in grey.images.items()}
        np.testing.assert_array_equal(read(write.npz(tmp_path / "b.npz", grey))[0][..., 0], grey.images["train"])


def test_names_of_classes(tmp_path, examples):  # noqa: F811
    """They are those of the file, then those of CIFAR if `data.name` and the images fit, then numbers."""

    def names(path, name="cifar10"):
        return archives.find(path).read("test", name).class_names

    letters = np.array(list("abcdefghij"))
    assert names(write.npz(tmp_path / "a.npz", examples, class_names=tuple(letters))) == tuple(letters)
    assert names(write.parquet(tmp_path / "p", examples, names=tuple(letters))) == tuple(letters)
    assert names(write.npz(tmp_path / "b.npz", examples)) == names(tmp_path / "b.npz", "cifar10:3.0.2") == NAMES
    assert names(tmp_path / "b.npz", "pets") == names(tmp_path / "b.npz", "cifar100") == tuple("0123456789")
    contents = under("cifar-100-binary", write.binary(examples, 100))
    hundred = names(write.tar(tmp_path / "c", contents), "cifar100")
    assert (len(hundred), hundred[0], hundred[99]) == (100, "apple", "worm")
    contents["cifar-100-binary/fine_label_names.txt"] = "\n".join(f"c{i}" for i in range(100)).encode() + b"\n\n"
    assert names(write.tar(tmp_path / "d", contents), "cifar100")[99] == "c99"


def binary_files(change):
    """Return a function that writes the binary version with changed pairs of names and contents."""

    def save(tmp, e):
        files = under("cifar-10-batches-bin", write.binary(e))
        return write.tar(tmp / "a.tar.gz", change(list(files.items())))

    return save


def third(content):
    """Return a function that changes the content of data_batch_3.bin."""
    return binary_files(lambda files: [(name, content(data) if "3" in name else data) for name, data in files])


def python_files(**changes):
    """Return a function that writes the Python version with changed entries of each dict."""
    return lambda tmp, e: write.folder(tmp / "a", write.python(e, lambda value: write.python2(value | changes)))


def arrays(**changes):
    """Return a function that writes a .npz file with changed arrays; None removes one."""

    def save(tmp, e):
        named = dict(zip(npz.NAMES[0], (*e.of("train"), *e.of("test")), strict=True)) | changes
        np.savez(tmp / "a.npz", **{name: array for name, array in named.items() if array is not None})
        return tmp / "a.npz"

    return save


def without(file):
    def remove(tmp, e):
        (write.parquet(tmp / "a", e, shards=2) / file).unlink()
        return tmp / "a"

    return remove


def other_table(tmp, e):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write.parquet(tmp / "a", e)
    pq.write_table(pa.table({"img": [[1.5]], "label": ["x"]}), path / "train-00000-of-00001.parquet")
    return path


def encoded(encode):
    return lambda tmp, e: write.parquet(tmp / "a", e, encode=encode)


def two_subfolders(tmp, e):
    write.parquet(tmp / "a", e)
    return write.parquet(tmp / "b", e).parent


REFUSED = {
    "missing": (binary_files(lambda files: files[1:]), r"data_batch_1\.bin not found"),
    "short": (third(lambda data: data[:-1]), r"data_batch_3\.bin is damaged"),
    "long": (third(lambda data: data + b"x"), r"data_batch_3\.bin is damaged"),
    "twice": (binary_files(lambda files: files + files[:1]), r"data_batch_1\.bin is damaged: must occur once"),
    "label": (third(lambda data: b"\x0a" + data[1:]), "contains label 10; labels must be 0 to 9"),
    "parent folder": (binary_files(lambda files: [(f"../{name}", data) for name, data in files]), "It contains '../"),
    "absolute": (binary_files(lambda files: [(f"/{name}", data) for name, data in files]), "It contains '/cifar"),
    "other folder": (binary_files(lambda files: [(f"a/{name}", data) for name, data in files]), "'a/cifar.*and 5 more"),
    "other tar": (lambda tmp, e: write.tar(tmp / "a", {"cat.png": b"x"}), r"must be CIFAR's.*'cat.png' and 0 more"),
    "other folder of files": (lambda tmp, e: write.folder(tmp / "a", {"cat.png": b"x"}), "'cat.png' and 0 more"),
    "empty folder": (lambda tmp, e: write.folder(tmp / "a", {}), "It contains nothing"),
    "other file": (lambda tmp, e: write.folder(tmp / "a", {"b": b"x" * 5000}) / "b", "cannot be read.*must be CIFAR's"),
    "python: missing": (lambda tmp, e: write.folder(tmp / "a", {"test_batch": b""}), "data_batch_1 not found"),
    "python: empty": (lambda tmp, e: write.folder(tmp / "a", {name: b"" for name in BATCHES}), "its end is missing"),
    "python: no dict": (lambda tmp, e: write.folder(tmp / "a", {n: b"]." for n in BATCHES}), "'list' object has no"),
    "python: labels": (python_files(labels=[1, 2]), "2 labels for images of shape"),
    "python: label": (python_files(labels=[10] * 6), "contains label 10"),
    "python: nested labels": (python_files(labels=[[1]] * 6), "data_batch_1|cannot be read"),
    "python: shape": (python_files(data=np.zeros((6, 3071), np.uint8)), r"\(6, 3071\)"),
    "python: names": (python_files(label_names=3), "cannot be read"),
    "python: equal names": (python_files(label_names=["a"] * 10), "classes must have different names"),
    "parquet: no test": (without("test-00000-of-00001.parquet"), "all of test-00000.*not none"),
    "parquet: shard": (without("train-00001-of-00002.parquet"), "all of train-.*not train-00000-of-00002.parquet"),
    "parquet: columns": (other_table, r"must have columns image or img \(with bytes\) and label.*double"),
    "parquet: folders": (two_subfolders, "must be one of its folders a, b"),
    "parquet: image": (encoded(lambda image: write.png(image)[:-40]), "image 0 of train-00000-of-00001.parquet: "),
    "parquet: no image": (encoded(lambda image: None), "image 0 of train-00000-of-00001.parquet: not an image"),
    "parquet: sizes": (
        encoded(lambda image: write.png(image[: 31 + image[0, 0, 0] % 2])),
        r"differ in size, such as 32x3\d and 32x3\d; set data.image_size",
    ),
    "npz: no test": (arrays(x_test=None), "x_test must occur once, not 0 times"),
    "npz: others": (lambda tmp, e: write.npz(tmp / "a.npz", e, "abcd"), "It contains 'a' and 3 more"),
    "npz: objects": (arrays(y_train=np.array([{}] * 30)), "y_train holds Python objects"),
    "npz: Fortran": (arrays(x_train=np.zeros((3, 8, 8, 30), np.uint8).T), "x_train holds an array in Fortran order"),
    "npz: floats": (arrays(x_train=np.zeros((30, 32, 32, 3))), "x_train must be uint8 .*not float64"),
    "npz: channels": (arrays(x_train=np.zeros((30, 32, 32, 2), np.uint8)), "x_train must be uint8 of shape"),
    "npz: labels": (arrays(y_train=np.zeros(29, int)), "y_train must be 30 integers"),
    "npz: negative": (arrays(y_train=np.full(30, -1)), "contains label -1"),
    "npz: many classes": (arrays(y_test=np.full(6, 2**60)), "labels must be below 100,000"),
    "npz: names": (arrays(class_names=np.arange(10)), "class_names must be a list of strings"),
    "npz: none": (arrays(x_train=np.zeros((0, 32, 32, 3), np.uint8)), "x_train is empty"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_contents_are_refused_in_one_line(tmp_path, examples, make, message):  # noqa: F811
    path = make(tmp_path, examples)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"data.archive={str(path)!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PACKAGINGS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, examples, kind, keep):  # noqa: F811
    path = archives.find(next(iter(PACKAGINGS[kind].values()))(tmp_path, examples)).files[0]
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"^data\.archive=") as caught:
        read(path, "test")
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_refused(tmp_path):
    few = write.random_examples()
    few.images["test"], few.labels["test"] = few.images["test"][:0], few.labels["test"][:0]
    path = write.parquet(tmp_path / "a", few)
    assert len(read(path, "train")[0]) == COUNTS["train"]
    with pytest.raises(UserError, match="a split contains no images"):
        read(path, "test")


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in (*BATCHES, "test_batch"):
            link = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(UserError, match="It contains nothing"):
        read(tmp_path / "a.tar.gz")


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path, examples):  # noqa: F811
    blobs = write.parquet(tmp_path / "blobs", examples)
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file.rename(file.with_suffix("")))
    np.testing.assert_array_equal(read(tmp_path / "snapshot")[0], examples.images["train"])


def test_absent_archive_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.archive=.*nowhere"):
        archives.find(tmp_path / "nowhere.tar.gz")


def test_official_files_are_recognized(tmp_path, examples, monkeypatch):  # noqa: F811
    archive = archives.find(PACKAGINGS["python"]["tar.gz"](tmp_path, examples))
    found = hashlib.md5((tmp_path / "a").read_bytes()).hexdigest()
    official = "c58f30108f718f92721af3b95e74349a"
    assert archive.official() == f"a is not the official file (md5 {found}, official: {official})"
    monkeypatch.setattr(cifar, "LAYOUTS", tuple(layout._replace(md5=found) for layout in cifar.LAYOUTS))
    assert archive.official() == f"a is the official file (md5 {found})"
    assert archives.find(PACKAGINGS["python"]["folder"](tmp_path / "b", examples)).official() == ""
    assert archives.find(write.npz(tmp_path / "c.npz", examples)).official() == ""


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    """The memory for a split is that of a part of it."""
    rng = np.random.default_rng(0)
    images = {split: np.repeat(rng.integers(0, 256, (1, 64, 64, 3), np.uint8), n, 0) for split, n in COUNTS.items()}
    images["train"] = np.repeat(images["train"], 8, 0)  # 3 MB
    labels = {split: np.zeros(len(array), int) for split, array in images.items()}
    large = write.Examples(images, labels)
    write.npz(tmp_path / "a.npz", large)
    write.parquet(tmp_path / "p", large, names=("a",))
    monkeypatch.setattr(npz, "_CHUNK", 2**16)
    monkeypatch.setattr(parquet, "_BATCH", 16)
    for path in (tmp_path / "a.npz", tmp_path / "p"):
        read(path, "test")  # imports
        found = archives.find(path).read("train", "x")
        tracemalloc.start()
        try:
            assert sum(len(images) for images, _ in found.batches) == 240
            assert tracemalloc.get_traced_memory()[1] < 1.2e6
        finally:
            tracemalloc.stop()


def test_the_number_of_classes_of_cifar_must_be_that_of_its_name(tmp_path, examples):  # noqa: F811
    path = write.folder(tmp_path / "cifar-10-batches-py", write.python(examples, write.python2))
    with pytest.raises(UserError, match=r"has 10 classes, but cifar100 has 100; set data\.name"):
        read(path, "train", "cifar100")


def test_subfolders_of_a_folder_with_parquet_files_are_not_searched(tmp_path, examples, monkeypatch):  # noqa: F811
    """They may be closed to the user."""
    path = write.parquet(tmp_path / "a", examples)
    (path / "closed").mkdir()
    searched = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: searched.append(folder.name) or iterdir(folder))
    assert archives.find(path).format == "parquet"
    assert set(searched) == {"a"}
