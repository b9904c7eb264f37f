"""Test `data.cache=none`: images of a folder are decoded whenever they are read, and nothing else changes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import make_tiny_config
from folders import load, many, write

from cifar_flax.data import folder
from cifar_flax.data.config import DataConfig
from cifar_flax.data.file_images import FileImages
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.modes import evaluate
from cifar_flax.modes.train import train
from cifar_flax.training.trainer import Trainer


@pytest.fixture
def root(tmp_path):
    """Return a folder of images, one of which is a copy in the other split, and one of which cannot be read."""
    root = write(tmp_path / "in", *many("train/a", "train/b", "test/a", "test/b", count=12))
    (root / "test" / "a" / "1.png").write_bytes((root / "train" / "a" / "2.png").read_bytes())
    (root / "train" / "b" / "bad.png").write_text("no image")
    return root


def test_the_images_are_those_of_the_cache(root, capsys):
    decoded = load(root)
    lines = capsys.readouterr().out
    found = load(root, cache="none")
    assert "1 train files cannot be read\n  train/b/bad.png" in lines
    assert "exact copies of training images: test/a/1.png of train/a/2.png" in lines
    without_times = [line for line in lines.splitlines() if " s" not in line]
    assert without_times == [line for line in capsys.readouterr().out.splitlines() if " s" not in line]
    for each, expected in zip(found, decoded, strict=True):
        assert isinstance(each.images, FileImages)
        np.testing.assert_array_equal(each.images, expected.images)
        np.testing.assert_array_equal(each.labels, expected.labels)
        for field in ("class_names", "dataset", "files", "skipped", "nbytes"):
            assert getattr(each, field) == getattr(expected, field)
        assert each.checksum() == expected.checksum()


@pytest.mark.parametrize("index", [3, np.int64(-1), slice(2, 9, 3), [4, 0, 4], np.array([[1, 2], [2, 5]]), []])
def test_an_index_is_that_of_an_array(root, index):
    expected = load(root)[0].images
    images = load(root, cache="none")[0].images
    index = np.array(index, np.int32) if isinstance(index, list) else index
    np.testing.assert_array_equal(images[index], expected[index])
    assert images[index].dtype == np.uint8
    assert len(images) == len(expected)


def test_no_images_are_stored_and_a_second_start_decodes_nothing(root, tmp_path, monkeypatch):
    settings = {"cache": "none", "cache_dir": str(tmp_path / "cache")}
    load(root, **settings)
    assert {path.name for path in (tmp_path / "cache").rglob("*.npy")} == {"labels.npy"}
    decodings = []
    original = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda *arguments: decodings.append(arguments) or original(*arguments))
    load(root, **settings)
    assert decodings == []
    write(root, "train/a/3.png", seed=9)
    load(root, **settings)
    assert len(decodings) == 25  # the train split
    load(root, **settings | {"cache": "decoded"})
    assert len(decodings) == 50 + 24
    assert len(list((tmp_path / "cache").rglob("images.npy"))) == 2


def test_a_file_that_cannot_be_read_any_more_is_named(root):
    arrays = load(root, cache="none")[0]
    number = arrays.files.index("train/a/5.png")
    (root / "train" / "a" / "5.png").unlink()
    arrays.images[:number]
    with pytest.raises(UserError, match=r"in/train/a/5\.png: .*; it was readable before"):
        arrays.images[number]


def test_a_file_that_has_changed_is_named(root):
    arrays = load(root, cache="none")[0]
    write(root, "train/a/5.png", seed=8)
    with pytest.raises(UserError, match=r"in/train/a/5\.png has changed since the start"):
        arrays.images[arrays.files.index("train/a/5.png")]


def config_for(root, **settings):
    config = make_tiny_config()
    config.data = DataConfig(folder=str(root), image_size=16, pipeline="streaming", **settings)
    config.train = dataclasses.replace(config.train, batch_size=8, epochs=2)
    return config


def test_runs_with_and_without_the_cache_are_equal(root, tmp_path, compile_once):
    states = []
    for cache in ("decoded", "none"):
        trainer = Trainer(config_for(root, cache=cache, validation_fraction=0.2))
        state, calls = trainer.initial_state, trainer.compile(trainer.initial_state)
        for call in trainer.inputs(trainer.config.seed, 0):
            state, _ = calls(state, call)
        states.append((jax.device_get(state), trainer.info))
    jax.tree.map(np.testing.assert_array_equal, states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_a_run_without_the_cache_is_evaluated_with_it(root, tmp_path, compile_once, capsys):
    workdir = tmp_path / "run"
    train(config_for(root, cache="none"), workdir)
    before = (workdir / "eval.json").read_bytes()
    assert "test/a/" in (workdir / "report.html").read_text()
    evaluate.evaluate(config_for(root), workdir)
    assert (workdir / "eval.json").read_bytes() == before
    assert json.loads(before)["num_examples"] == 24
    train(config_for(root), workdir)
    assert "is finished" in capsys.readouterr().out


def test_images_that_are_not_decoded_are_not_put_on_the_device(root):
    with pytest.raises(ConfigError, match=r"data\.pipeline='resident': must be streaming or auto"):
        load(root, cache="none", pipeline="resident")
    with pytest.raises(ConfigError, match=r"data\.cache='none': needs data\.folder"):
        DataConfig(cache="none").validate()
    with pytest.raises(ConfigError, match=r"data\.cache='all': must be decoded or none"):
        DataConfig(cache="all").validate()
