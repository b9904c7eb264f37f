"""Write the same images and labels in every format that `data.archive` reads, with a few images per file."""

import io
import json
import pickle
import struct
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from cifar_flax.data.archives import cifar

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = 5  # files of the train split of CIFAR-10
COUNTS = {"train": 30, "test": 6}  # images; the real sets have 50,000 and 10,000
BATCHES = [f"data_batch_{i}" for i in range(1, PARTS + 1)]


@dataclass
class Examples:
    """Images, labels and classes to write."""

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def of(self, split):
        return self.images[split], self.labels[split]


@pytest.fixture
def examples(monkeypatch):
    """Return random examples; CIFAR's files must have as many."""
    monkeypatch.setattr(cifar, "IMAGES", COUNTS)
    return random_examples()


def random_examples(channels=3):
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (n, 32, 32, channels), np.uint8) for split, n in COUNTS.items()}
    labels = {split: np.arange(n) * 7 % 10 for split, n in COUNTS.items()}
    return Examples(images, labels)


def planes(images):
    """Return the rows of bytes that CIFAR's files have: a plane per color."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def parts(examples, classes=10):
    """Yield the name, images and labels of each of CIFAR's files."""
    for split in ("train", "test"):
        names = {10: BATCHES if split == "train" else ["test_batch"], 100: [split]}[classes]
        yield from zip(names, *(np.array_split(x, len(names)) for x in examples.of(split)), strict=True)


def binary(examples, classes=10):
    """Return the contents of the files of the binary version, by name."""
    contents = {}
    for name, images, labels in parts(examples, classes):
        coarse = np.full((len(images), classes // 100), 99)
        contents[f"{name}.bin"] = np.hstack([coarse, labels[:, None], planes(images)]).astype(np.uint8).tobytes()
    return contents


def python(examples, dumps, classes=10, meta=True):
    """Return the contents of the files of the Python version, by name; `dumps` pickles a dict."""
    fine = "fine_" if classes == 100 else ""
    contents = {}
    for name, images, labels in parts(examples, classes):
        record = {"batch_label": f"batch {name}", f"{fine}labels": labels.tolist(), "data": planes(images)}
        if fine:
            record["coarse_labels"] = [99] * len(labels)
        contents[name] = dumps(record | {"filenames": [f"{i}.png" for i in range(len(labels))]})
    names = {"num_vis": 3072, f"{fine}label_names": [*NAMES, *(str(i) for i in range(10, classes))]}
    return contents | ({"meta" if fine else "batches.meta": dumps(names)} if meta else {})


def dumps(protocol):
    return lambda value: pickle.dumps(value, protocol=protocol)


def python2(value):
    """Return a pickle as cPickle of Python 2 writes it with protocol 2."""
    memo = 0

    def put():
        nonlocal memo
        memo += 1
        return b"q" + bytes([memo]) if memo < 256 else b"r" + struct.pack("<I", memo)

    def string(text):
        return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<I", len(text))) + text

    def dump(value):
        if isinstance(value, str):
            return string(value.encode()) + put()
        if isinstance(value, int):
            return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
        if isinstance(value, list):
            start = b"]" + put()
            items = [dump(item) for item in value]
            return start + (items[0] + b"a" if len(items) == 1 else b"(" + b"".join(items) + b"e")
        if isinstance(value, dict):
            start = b"}" + put()
            return start + b"(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
        made = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
        made += b"K\x00\x85" + string(b"b") + b"\x87R" + put() + b"(K\x01" + b"".join(map(dump, value.shape)) + b"\x86"
        made += b"cnumpy\ndtype\n" + put() + string(b"u1") + b"K\x00K\x01\x87R" + put()
        made += b"(K\x03" + string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
        return made + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02" + dump(value) + b"."


def folder(path, contents):
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


def tar(path, members, mode="w:gz"):
    """Write a tar file with `members`, a dict or pairs of names and contents."""
    with tarfile.open(path, mode, compresslevel=1) if mode.endswith("gz") else tarfile.open(path, mode) as file:
        for name, content in dict(members).items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, "PNG")
    return stream.getvalue()


def parquet(path, examples, shards=1, columns=("img", "label"), names=NAMES, encode=png):
    """Write Parquet files with the metadata of the Hugging Face hub in the folder `path`."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.mkdir(parents=True)
    for split, count in (("train", shards), ("test", 1)):
        for i, (images, labels) in enumerate(zip(*(np.array_split(x, count) for x in examples.of(split)), strict=True)):
            files = [{"bytes": encode(image), "path": None} for image in images]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({columns[0]: pa.array(files, kind), columns[1]: pa.array(labels), "coarse_label": labels})
            if names:
                features = {columns[1]: {"names": list(names), "_type": "ClassLabel"}}
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            pq.write_table(table, path / f"{split}-{i:05}-of-{count:05}.parquet", row_group_size=7)
    return path


def npz(path, examples, names=("x_train", "y_train", "x_test", "y_test"), column=False, **others):
    """Write a .npz file, with labels of shape (n, 1) if `column`."""
    arrays = [array for split in ("train", "test") for array in examples.of(split)]
    arrays = [array[:, None] if array.ndim == 1 and column else array for array in arrays]
    np.savez(path, **dict(zip(names, arrays, strict=True)), **others)
    return path
