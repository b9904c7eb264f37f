"""Fuzzing: damaged files are loaded with their original content or refused with a one-line error.

There are 18,100 cases in all. Each case is a function of its number, which a failure reports.
"""

import hashlib
import io
import json
import pickle
import pickletools
import random
import re
import shutil
import warnings

import archive_files as write
import numpy as np
import pytest
from archive_files import examples  # noqa: F401  (a fixture)
from PIL import Image

from cifar_flax import config as configs
from cifar_flax import files
from cifar_flax.checkpoints import metadata
from cifar_flax.config import Config
from cifar_flax.data import archives, cache
from cifar_flax.data.archives import pickles
from cifar_flax.data.images import FORMATS, read_image
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.telemetry.metrics_log import _keep_until

VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "\ud800", [], {}, [[]], {"name": "cnn"}, "../..")


def damaged(content, rng):
    """Flip a bit; delete, insert, repeat or overwrite a few bytes; or truncate the content."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(content) + 1)
        length = rng.choice([1, 1, 2, 8, 64])
        kind = rng.randrange(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = rng.randbytes(length)
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place : place + length] = bytes(len(content[place : place + length]))
        else:
            del content[place:]
    return bytes(content)


def changed(value, rng):
    """Return a copy of a JSON value with one entry replaced, renamed or deleted."""
    value = json.loads(json.dumps(value))
    container = value
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(container[key], dict | list) and container[key] and rng.random() < 0.8:
            container = container[key]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        else:
            container[key] = rng.choice(VALUES)
        return value


def read_archive(path, split):
    images, labels = map(np.concatenate, zip(*archives.find(path).read(split, "cifar10").batches, strict=True))
    return images, labels


def test_archive(tmp_path, examples):  # noqa: F811
    """Read both splits of 2,000 damaged archives."""
    path = write.tar(tmp_path / "a.tar.gz", write.binary(examples))
    intact, loaded, messages = path.read_bytes(), 0, []
    for case in range(2000):
        path.write_bytes(damaged(intact, random.Random(case)))
        for split in ("train", "test"):
            try:
                images, labels = read_archive(path, split)
            except UserError as error:
                messages.append(str(error))
                continue
            np.testing.assert_array_equal(images, examples.images[split], err_msg=f"case {case}")
            np.testing.assert_array_equal(labels, examples.labels[split], err_msg=f"case {case}")
            loaded += 1
    assert not any("\n" in message for message in messages)
    assert loaded < 400  # few damages go unnoticed: those to unused bytes, such as the time in gzip's header


class Array:
    """An array, or its data type, as pickled: NumPy itself crashes on damaged ones."""

    def __setstate__(self, state):
        _, (rows, columns), _, transposed, content = state if len(state) == 5 else (0, (0, 0), 0, False, b"")
        self.values = np.frombuffer(content, np.uint8).reshape((rows, columns), order="F" if transposed else "C")


class OnlyArrays(pickle._Unpickler):
    """Python's reader, for the names that ours knows."""

    def find_class(self, module, name):
        return (
            {"encode": str.encode}.get(name, lambda *arguments: Array()) if (module, name) in pickles._NAMES else None
        )


def plain(value):
    """Return a value with arrays as lists, and functions and unfinished arrays, which the caller refuses, as None."""
    value = getattr(value, "values", value) if isinstance(value, Array) else value
    if isinstance(value, np.ndarray):
        return [value.shape, value.tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value), *map(plain, value)]
    return value if isinstance(value, bytes | str | int) else None


def test_pickles():
    """Read 5,000 damaged pickles of Python 2 and 3: the value that Python reads, or a one-line error."""
    record = {"data": np.arange(36, dtype=np.uint8).reshape(2, 18), "labels": [6, 9], "filenames": ["a.png", "b.png"]}
    intact = [write.python2(record), *(write.dumps(protocol)(record) for protocol in (2, 3, 4))]
    opcodes = bytes(ord(each.code) for each in pickletools.opcodes)
    loaded, differ, messages = 0, 0, []
    for case in range(5000):
        rng, content = random.Random(case), bytearray(intact[case % len(intact)])
        if case % 3:
            content = damaged(content, rng)
        else:
            for _ in range(rng.choice([1, 1, 2, 5])):
                content[rng.randrange(len(content))] = rng.choice(opcodes)
        try:
            value = pickles.loads(bytes(content))
        except UserError as error:
            messages.append(str(error))
            continue
        try:
            expected = OnlyArrays(io.BytesIO(content), encoding="bytes").load()
        except Exception:  # damage to a type that does not matter to arrays of uint8
            differ += 1
            continue
        assert plain(value) == plain(expected), case
        loaded += 1
    assert not any("\n" in message or len(message) > 200 for message in messages)
    assert 500 < loaded < 4000
    assert differ < 100, differ


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_tables(tmp_path, examples, kind):  # noqa: F811
    """Read 300 damaged .npz or Parquet files: images of one shape with valid labels, or a one-line error."""
    if kind == "npz":
        path = file = write.npz(tmp_path / "a.npz", examples)
    else:
        path = write.parquet(tmp_path / "a", examples)
        file = path / "test-00000-of-00001.parquet"
    intact, loaded, messages = file.read_bytes(), 0, []
    for case in range(300):
        file.write_bytes(damaged(intact, random.Random(case)))
        try:
            images, labels = read_archive(path, "test")
        except UserError as error:
            messages.append(str(error))
            continue
        assert (images.shape, labels.shape) == ((len(images), 32, 32, 3), (len(images),)), case
        assert set(labels.tolist()) <= set(range(10)), case
        loaded += 1
    assert not any("\n" in message for message in messages)
    assert len(messages) > 30


def test_cache(tmp_path):
    """Load 3,000 caches with a changed manifest or a damaged file."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(4) % 3
    store = {"num_examples": 4, "image_shape": (8, 8, 3), "class_names": ("a", "b", "c"), "dataset": "set/1.0.0"}
    original = cache.store(tmp_path / "intact", [(images, labels)], **store)
    manifest = json.loads((tmp_path / "intact" / "manifest.json").read_text())
    folder, loaded = tmp_path / "cached", 0
    for case in range(3000):
        rng = random.Random(case)
        shutil.copytree(tmp_path / "intact", folder)
        if case % 3 == 0:
            (folder / "manifest.json").write_text(json.dumps(changed(manifest, rng)))
        else:
            path = folder / rng.choice(["manifest.json", "images.npy", "labels.npy"])
            path.write_bytes(damaged(path.read_bytes(), rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cache warns that it rebuilds the folder
            arrays = cache.load(folder)
        if arrays is None:
            assert not folder.exists(), case
            continue
        assert (arrays.class_names, arrays.dataset) == (original.class_names, original.dataset), case
        np.testing.assert_array_equal(arrays.images, images, err_msg=f"case {case}")
        np.testing.assert_array_equal(arrays.labels, labels, err_msg=f"case {case}")
        shutil.rmtree(folder)
        loaded += 1
    assert loaded < 300


def test_checkpoint_metadata(tmp_path):
    """Read 2,500 changed or damaged metadata files; no change may go unnoticed."""
    content = {"config": configs.to_dict(Config()), "arrays": {"step": "() int32"}, "sha256": {"a": "b"}}
    record = {"format": 1, "step": 3, "accuracy": 0.5, **content}
    (tmp_path / "3").mkdir()
    path = tmp_path / "3" / "record.json"
    files.write_sealed(path, record)
    intact, sealed, loaded = path.read_bytes(), json.loads(path.read_bytes()), 0
    messages = []
    for case in range(2500):
        rng = random.Random(case)
        path.write_bytes(json.dumps(changed(sealed, rng)).encode() if case % 2 else damaged(intact, rng))
        try:
            assert metadata.read_metadata(tmp_path, 3) == json.loads(json.dumps(record)), case
            loaded += 1
        except UserError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert loaded < 250


def test_saved_config(tmp_path):
    """Read 1,000 changed or damaged config.json files; accepted ones are valid and survive a round trip."""
    intact, path, loaded = configs.to_dict(Config()), tmp_path / "config.json", 0
    files.write_json(path, intact)
    text, messages = path.read_bytes(), []
    for case in range(1000):
        rng = random.Random(case)
        path.write_bytes(json.dumps(changed(intact, rng)).encode() if case % 5 else damaged(text, rng))
        try:
            config = configs.from_dict(files.read_json(path))
            config.validate()
            assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config, case
            loaded += 1
        except ConfigError as error:
            messages.append(str(error))
        except ValueError:  # not JSON; workdir.py converts this error to a message
            pass
    assert not any("\n" in message for message in messages)
    assert 100 < loaded < 900  # accepted ones lack a field or have another valid value


def test_metrics(tmp_path, capsys):
    """Read 2,500 damaged logs: lines up to the checkpoint are intact, or the damage is logged."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train", "loss": 1 / step}).encode() + b"\n" for step in range(1, 9)]
    before = b"".join(lines[:5])
    mark = {"bytes": len(before), "sha256": hashlib.sha256(before).hexdigest()}
    unchanged = 0
    for case in range(2500):
        path.write_bytes(damaged(b"".join(lines), random.Random(case)))
        _keep_until(path, 5, mark)
        kept = path.read_bytes()
        printed = capsys.readouterr().out
        assert (kept == before) or re.search(r"metrics\.jsonl.*step 5\b", printed), case
        for line in kept.splitlines():
            assert json.loads(line)["step"] <= 5, case
        unchanged += not printed
    assert 100 < unchanged < 2400


def test_images(tmp_path):
    """Read 1,500 damaged images of five formats: an image of the requested shape or a one-line error."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 4), np.uint8)
    intact = {}
    for kind in FORMATS:
        stream = io.BytesIO()
        Image.fromarray(pixels).convert("RGB" if kind == "JPEG" else "RGBA").save(stream, format=kind)
        intact[kind] = stream.getvalue()
    path, loaded, messages = tmp_path / "file", 0, []
    with warnings.catch_warnings(action="ignore"):
        for case in range(1500):
            path.write_bytes(damaged(intact[FORMATS[case % len(FORMATS)]], random.Random(case)))
            try:
                image = read_image(path, (8, 8, 3))
                assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8), case
                loaded += 1
            except UserError as error:
                messages.append(str(error))
    assert not any("\n" in message or not message for message in messages)
    assert 100 < loaded < 1400


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(100), b"x" * 5000])
def test_files_that_are_not_archives_are_refused(tmp_path, content):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.archive="):
        archives.find(path)
