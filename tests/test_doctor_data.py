import shutil
import socket
from types import SimpleNamespace

import fake_tfds
import numpy as np
import pytest
from doctors import disk_with, everything, examine, leave_out_what_compiles, one

from cifar_flax import files, packages
from cifar_flax.data import cache, sources


@pytest.fixture
def visit(tiny_config, tmp_path, monkeypatch):
    """The doctor's, but for what compiles."""
    leave_out_what_compiles(monkeypatch)
    return lambda: examine(tiny_config, tmp_path / "run")


def store(split, count=200, folder="squares/1.0.0"):
    labels = np.arange(count, dtype=np.int32) % 2
    return cache.store(
        files.user_cache() / folder / split,
        [(np.zeros((count, 32, 32, 3), np.uint8), labels)],
        num_examples=count,
        image_shape=(32, 32, 3),
        class_names=("dark", "bright"),
        dataset=folder,
    )


def test_decoded_data(tiny_config, tmp_path):
    tiny_config.data.name = "squares"
    for split in ("train", "test"):
        store(split)
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert reasons is None
    assert one(found, "ok data") == f"ok data squares: train and test decoded and intact in {files.user_cache()}"
    assert [finding.split()[0] for finding in found if "start" in finding] == ["ok"]


def test_damaged_data_are_told_and_left_alone(visit, tiny_config, tmp_path, monkeypatch):
    tiny_config.data.name = "squares"
    for split in ("train", "test"):
        store(split)
    (files.user_cache() / "squares" / "1.0.0" / "test" / "labels.npy").write_bytes(b"")
    monkeypatch.setattr(packages, "installed", lambda name: name != "tensorflow-datasets")
    before = everything(tmp_path)
    found, reasons = visit()
    assert "labels.npy does not match its checksum" in one(found, "note data")
    assert "squares: train decoded" in one(found, "ok data")
    assert "its test split is not in the cache" in reasons
    assert "tensorflow-datasets is not installed" in reasons
    assert everything(tmp_path) == before


def test_data_that_are_prepared_and_yet_to_be_decoded(visit, tiny_config, tmp_path, capsys):
    tiny_config.data.name = "fake_color"
    sources._tfds_builder(tiny_config.data).download_and_prepare()
    capsys.readouterr()
    before = everything(tmp_path)
    found, reasons = visit()
    assert reasons is None
    assert "train and test: a run decodes 0 MB that TFDS has prepared in" in one(found, "ok data")
    assert "not tried" in one(found, "note start")
    assert one(found, "ok disk decoded images: about 0 MB")
    assert everything(tmp_path) == before
    tiny_config.data.eval_split = "validation"
    assert "data.eval_split='validation': fake_color has no such split; it has train, test" in visit()[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", "data: data.name='no_such_set': must be digits or a TFDS image-classification set"),
        ("fake_regression", "data: data.name='fake_regression': must be an image-classification set"),
        ("fake_variable", "data: data.image_size=0: fake_variable has images of various sizes"),
    ],
)
def test_data_that_cannot_be_had(visit, tiny_config, name, message):
    tiny_config.data.name = name
    assert message in visit()[1]


@pytest.fixture
def download(tiny_config, monkeypatch):
    """The tiny config's data must be downloaded; the socket where they are to be had."""
    tiny_config.data.name = "fake_download"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = {f"http://127.0.0.1:{port}/{name}": SimpleNamespace(size=30_000_000) for name in ("train", "test")}
        monkeypatch.setattr(fake_tfds.FakeDownload, "url_infos", urls)
        yield server


def test_a_download_that_is_possible(visit, download, tmp_path):
    before = everything(tmp_path)
    found, reasons = visit()
    assert reasons is None
    assert one(found, "note data") == "note data train and test: TFDS downloads 60 MB from 127.0.0.1"
    assert "decoded images: about 60 MB" in one(found, "ok disk decoded")
    assert "prepares: about 120 MB, with the above 180 MB" in one(found, "ok disk what TFDS")
    assert everything(tmp_path) == before


def test_a_download_that_is_not(visit, download, monkeypatch):
    port = download.getsockname()[1]
    download.close()
    found, reasons = visit()
    assert f"to download it 127.0.0.1:{port} ([Errno" in one(found, "FAIL data")
    assert "Ways out: name a folder where TFDS has prepared it" in reasons


def test_a_proxy_is_asked_in_place_of_the_host(visit, download, monkeypatch):
    port = download.getsockname()[1]
    urls = {"http://no.such.host.invalid/images": SimpleNamespace(size=30_000_000)}
    monkeypatch.setattr(fake_tfds.FakeDownload, "url_infos", urls)
    assert "no.such.host.invalid:80" in visit()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert visit()[1] is None


def test_an_archive_that_is_none(visit, tiny_config, tmp_path):
    tiny_config.data.name, tiny_config.data.archive = "cifar10", "cifar-10-binary.tar.gz"
    assert "must be cifar-10-binary.tar.gz or the folder it unpacks to" in visit()[1]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no gzip")
    assert "cannot be read as a gzip-compressed tar file" in visit()[1]


def test_all_that_comes_to_one_disk_must_find_room(visit, download, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(185_000_000))
    found, reasons = visit()
    assert [finding.split()[0] for finding in found if " disk " in finding] == ["ok", "ok", "FAIL"]
    assert "disk: the run: about 170 MB, with the above 350 MB, of 185 MB free" in reasons
