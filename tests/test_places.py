"""CIFAR-10 is found where other programs keep it, and data of different sources is never mixed."""

import json
import os
import shutil

import cifar_copies
import numpy as np
import pytest
from cifar_copies import write_binary, write_npz, write_parquet
from doctors import examine, one, skip_compilation, snapshot

from cifar_flax import packages
from cifar_flax.data import archives, cache, sources
from cifar_flax.data.archives import cifar
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.training.trainer import Trainer

pytestmark = pytest.mark.skipif(bool(packages.fault("pyarrow")), reason="pyarrow is not installed")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES", cifar_copies.COUNTS)


def seed_of(config):
    """Return the seed of both splits, which must agree."""
    seeds = set()
    for split in ("train", "test"):
        arrays = sources.load(config, split)
        first = int(arrays.labels[0])  # the label of the first example is the seed
        np.testing.assert_array_equal(arrays.labels, cifar_copies.arrays(split, first)[1])
        np.testing.assert_array_equal(arrays.images, cifar_copies.arrays(split, first)[0])
        seeds.add(first)
    (seed,) = seeds
    return seed


@pytest.mark.parametrize(
    ("folder", "write"),
    [
        ("keras/datasets/cifar-10-batches-py-target/cifar-10-batches-bin", write_binary),
        ("keras/datasets/cifar-10-batches-py", write_binary),
        ("data/cifar-10-batches-bin", write_binary),
        ("data/cifar10/cifar-10-batches-bin", write_binary),
        ("cifar-10-batches-bin", write_binary),
        ("home/data/cifar-10-batches-bin", write_binary),
        ("hub/datasets--uoft-cs--cifar10/snapshots/0/plain_text", write_parquet),
        ("hub/datasets--cifar10/snapshots/1/plain_text", write_parquet),
    ],
)
def test_a_copy_is_found_and_decoded_once(tmp_path, monkeypatch, capsys, folder, write):
    write(tmp_path / folder, 3)
    assert seed_of(DataConfig()) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cifar10: reading ")
    assert folder.split("/")[-2:][0] in line
    monkeypatch.setattr(archives.Archive, "read", lambda *arguments: pytest.fail("decoded again"))
    assert seed_of(DataConfig()) == 3
    assert capsys.readouterr().out == ""
    shutil.rmtree(tmp_path / folder.split("/")[0])
    assert seed_of(DataConfig()) == 3
    assert "its files have gone; using the decoded data in" in capsys.readouterr().out


def test_damaged_copies_are_skipped_with_one_line_each(tmp_path, monkeypatch, capsys):
    (write_binary(tmp_path / "keras" / "datasets" / "cifar-10-batches-bin") / "data_batch_3.bin").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    (write_binary(tmp_path / "data" / "cifar-10-batches-bin") / "test_batch.bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"cannot be downloaded from http://127\.0\.0\.1:9"):
        sources.load(DataConfig(), "train")
    assert len([line for line in capsys.readouterr().out.splitlines() if "cifar10: not used: " in line]) == 3
    write_binary(tmp_path / "datasets" / "cifar-10-batches-bin", 4)
    assert seed_of(DataConfig()) == 4
    with pytest.raises(UserError, match="cannot be downloaded"):
        sources.load(DataConfig(source="hub"), "train")


def test_data_that_tfds_has_comes_first(tmp_path, monkeypatch):
    write_binary(tmp_path / "data" / "cifar-10-batches-bin", 1)
    store_tfds(tmp_path, 2)
    assert seed_of(DataConfig()) == 2
    shutil.rmtree(tmp_path / "cache")
    prepared = tmp_path / "tfds" / "cifar10" / "3.0.2"
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").touch()
    monkeypatch.setattr(packages, "fault", lambda name: None)
    assert sources.uses_tfds(DataConfig(), "train")
    monkeypatch.setattr(packages, "fault", lambda name: "missing" if name == "tensorflow" else None)
    assert seed_of(DataConfig()) == 1
    assert sources.uses_tfds(DataConfig(data_dir=str(tmp_path)), "train")
    assert sources.uses_tfds(DataConfig(source="tfds"), "train")


def test_both_splits_are_of_one_source(tmp_path):
    """The cache has one split that TFDS has prepared, and both of another source."""
    store_tfds(tmp_path, 1, "train")
    write_binary(tmp_path / "data" / "cifar-10-batches-bin", 2)
    assert [int(arrays.labels[0]) for arrays in sources.load_both(DataConfig())] == [2, 2]
    store_tfds(tmp_path, 1, "test")
    assert [int(arrays.labels[0]) for arrays in sources.load_both(DataConfig())] == [1, 1]


def test_a_damaged_split_is_replaced_together_with_the_other(tmp_path, monkeypatch):
    """The files of the first source have gone, and a start in another folder finds another source."""
    shutil.move(write_binary(tmp_path / "a" / "data" / "cifar-10-batches-bin", 1).parent, tmp_path / "data")
    assert seed_of(DataConfig()) == 1
    shutil.move(tmp_path / "data", tmp_path / "gone")
    (images,) = (tmp_path / "cache" / "cifar_flax" / "cifar10" / "files").glob("test.*/images.npy")
    images.write_bytes(images.read_bytes()[:-1] + b"?")
    write_binary(tmp_path / "datasets" / "cifar-10-batches-bin", 2)
    assert [int(arrays.labels[0]) for arrays in sources.load_both(DataConfig())] == [2, 2]


def test_each_folder_has_its_own_copy(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_binary(tmp_path / str(seed) / "data" / "cifar-10-batches-bin", seed)
    for seed in (1, 2, 1):
        monkeypatch.chdir(tmp_path / str(seed))
        assert seed_of(DataConfig()) == seed
    shutil.rmtree("data")
    write_binary(tmp_path / "1" / "data" / "cifar-10-batches-bin", 3)  # other files at the same place
    assert seed_of(DataConfig()) == 3


def test_copies_of_another_dataset_are_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar, "IMAGES", {"train": 60, "test": 12})
    write_parquet(tmp_path / "hub" / "datasets--cifar10" / "snapshots" / "1" / "plain_text", 1)
    with pytest.raises(UserError, match="cannot be downloaded"):
        sources.load(DataConfig(), "train")
    assert "not used: cifar10: decoded 30 examples, expected 60" in capsys.readouterr().out


def store_tfds(tmp_path, seed, *splits):
    for split in splits or cifar_copies.COUNTS:
        cache.store(
            tmp_path / "cache" / "cifar_flax" / "cifar10" / "3.0.2" / split, [cifar_copies.arrays(split, seed)],
            image_shape=(32, 32, 3), class_names=cifar_copies.CLASS_NAMES, dataset="cifar10/3.0.2",
        )  # fmt: skip


def test_sources_of_one_name_are_never_mixed(tmp_path):
    """Load all sources in turn, forwards and backwards, with one cache that has the data of all others."""
    paths = [
        write_npz(tmp_path / "one.npz", 1),
        write_npz(tmp_path / "other.npz", 2),
        write_binary(tmp_path / "binary", 3),
        write_parquet(tmp_path / "parquet", 4),
    ]
    configs = {seed: DataConfig(archive=str(path)) for seed, path in enumerate(paths, 1)}
    configs |= {5: DataConfig(), 6: DataConfig(source="hub"), 7: DataConfig(source="tfds")}
    write_binary(tmp_path / "data" / "cifar-10-batches-bin", 5)
    write_parquet(tmp_path / "hub" / "datasets--uoft-cs--cifar10" / "snapshots" / "0" / "plain_text", 6)
    for seed in (1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1):
        assert seed_of(configs[seed]) == seed
    store_tfds(tmp_path, 7)
    for seed in (1, 2, 3, 4, 6, 7, 6, 4, 3, 2, 1):
        assert seed_of(configs[seed]) == seed
    assert seed_of(DataConfig()) == 7


def test_an_archive_that_has_changed_is_decoded_again(tmp_path, monkeypatch):
    config = DataConfig(name="mnist", archive=str(write_npz(tmp_path / "a.npz", 1)))
    config.validate()
    assert seed_of(config) == 1
    read = archives.Archive.read
    monkeypatch.setattr(archives.Archive, "read", lambda *arguments: pytest.fail("decoded again"))
    assert seed_of(config) == 1
    monkeypatch.setattr(archives.Archive, "read", read)
    write_npz(tmp_path / "a.npz", 2)
    assert seed_of(config) == 2
    (tmp_path / "b.npz").symlink_to(tmp_path / "a.npz")
    monkeypatch.setattr(archives.Archive, "read", lambda *arguments: pytest.fail("decoded again"))
    assert seed_of(DataConfig(name="mnist", archive=str(tmp_path / "b.npz"))) == 2
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ConfigError, match=r"data\.archive="):
        sources.load(config, "train")


def test_a_cache_that_cannot_be_written_is_not_a_damaged_copy(tmp_path, monkeypatch):
    write_binary(tmp_path / "data" / "cifar-10-batches-bin", 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_headers", full)
    with pytest.raises(UserError, match=r"^data\.cache_dir: cannot write .*No space left on device"):
        sources.load(DataConfig(), "train")


def test_a_run_does_not_resume_with_another_source(tmp_path, tiny_config):
    store_tfds(tmp_path, 1)
    tiny_config.data.name, tiny_config.train.batch_size = "cifar10", 10
    before = Trainer(tiny_config).info
    tiny_config.data.archive = str(write_binary(tmp_path / "binary", 2))
    trainer = Trainer(tiny_config)
    with pytest.raises(UserError, match=r"images or labels of the train split.*cifar10/3\.0\.2.*data\.source"):
        trainer.require_same_data(json.loads(json.dumps(before.to_dict())))
    trainer.require_same_data(trainer.info.to_dict())


@pytest.fixture
def examination(tiny_config, tmp_path, monkeypatch):
    skip_compilation(monkeypatch)
    tiny_config.data.name = "cifar10"
    return lambda **options: examine(tiny_config, tmp_path / "run", **options)


def test_the_doctor_names_the_copy_that_it_found(examination, tiny_config, tmp_path):
    place = write_binary(tmp_path / "data" / "cifar-10-batches-bin")
    (write_binary(tmp_path / "keras" / "datasets" / "cifar-10-batches-py") / "test_batch.bin").unlink()
    before = snapshot(tmp_path / "data") | snapshot(tmp_path / "keras")
    found, reasons = examination()
    assert reasons is None
    assert "not used: data.archive=" in one(found, "note data")
    assert f"data {os.path.relpath(place)}: 30 train images, 6 test images" in one(found, "ok data").replace("./", "")
    assert "not tried: the images are not decoded yet" in one(found, "note start")
    assert snapshot(tmp_path / "data") | snapshot(tmp_path / "keras") == before
    assert not (tmp_path / "cache" / "cifar_flax").exists()
    seed_of(tiny_config.data)
    assert "cifar10: train and test decoded and intact" in one(examination()[0], "ok data")


def test_the_doctor_uses_the_network_only_if_asked(examination, tmp_path, monkeypatch):
    found, reasons = examination()
    assert reasons is None
    assert "144 MB from 127.0.0.1 (not tried, which needs --online)" in one(found, "note data")
    assert "ok disk download: needs about 144 MB" in " ".join(found)
    assert "127.0.0.1:9 ([Errno" in examination(online=True)[1]
    with cifar_copies.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert "it can be reached" in one(examination(online=True)[0], "note data")
        assert server.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in examination()[1]
