import re
import shutil
import socket
from types import SimpleNamespace

import fake_tfds
import numpy as np
import pytest
from doctors import disk_with, examine, one, skip_compilation, snapshot

from cifar_flax import files, packages
from cifar_flax.data import cache, sources
from cifar_flax.errors import UserError


@pytest.fixture
def examination(tiny_config, tmp_path, monkeypatch):
    """Return a function that examines the tiny config, without the checks that compile programs."""
    skip_compilation(monkeypatch)
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


def test_decoded_data_are_verified(tiny_config, tmp_path):
    tiny_config.data.name = "squares"
    for split in ("train", "test"):
        store(split)
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert reasons is None
    assert re.search(f"squares: train .*test .*{files.user_cache()}", one(found, "ok data"))
    assert [finding.split()[0] for finding in found if "start" in finding] == ["ok"]


def test_damaged_data_are_reported_and_not_changed(examination, tiny_config, tmp_path, monkeypatch):
    tiny_config.data.name = "squares"
    for split in ("train", "test"):
        store(split)
    (files.user_cache() / "squares" / "1.0.0" / "test" / "labels.npy").write_bytes(b"")
    monkeypatch.setattr(packages, "installed", lambda name: name != "tensorflow-datasets")
    before = snapshot(tmp_path)
    found, reasons = examination()
    assert re.search(r"labels\.npy.*checksum", one(found, "note data"))
    assert re.search("squares: train(?! and test)", one(found, "ok data"))
    assert re.search(r"data\.name='squares': .*\btest\b.*tensorflow-datasets is not installed", reasons)
    assert snapshot(tmp_path) == before


def test_data_from_elsewhere_are_a_note(examination, tiny_config, tmp_path):
    tiny_config.data.name = "squares"
    for split in ("train.ab.cd", "test.ab.cd"):
        store(split)
    found, reasons = examination()
    assert reasons is None
    notes = [finding for finding in found if finding.startswith("note data")]
    assert [re.search(r"squares is not in .*/tfds; using .*/(\w+)\.ab\.cd$", note)[1] for note in notes] == [
        "train",
        "test",
    ]
    tiny_config.data.data_dir = str(tmp_path / "nowhere")
    assert re.search("data: data.data_dir='.*nowhere': must be an existing folder", examination()[1])


def test_prepared_data_that_are_not_decoded_yet(examination, tiny_config, tmp_path, capsys):
    tiny_config.data.name, tiny_config.data.data_dir = "fake_color", str(tmp_path / "[tfds]")  # a glob pattern
    sources._tfds_builder(tiny_config.data).download_and_prepare()
    capsys.readouterr()
    before = snapshot(tmp_path)
    found, reasons = examination()
    assert reasons is None
    assert re.search("train and test: .*TFDS", one(found, "ok data"))
    assert "not tried" in one(found, "note start")
    assert " 0 MB" in one(found, "ok disk decoded images")
    assert snapshot(tmp_path) == before
    tiny_config.data.eval_split = "validation"
    assert re.search("data.eval_split='validation': .*train, test", examination()[1])


def test_an_incomplete_copy_of_prepared_data_is_reported(examination, tiny_config, capsys):
    tiny_config.data.name = "fake_color"
    builder = sources._tfds_builder(tiny_config.data)
    builder.download_and_prepare()
    [missing] = builder.info.splits["test"].filepaths
    missing.unlink()
    capsys.readouterr()
    assert re.search(f"data: .*{missing.name} is missing", examination()[1])
    with pytest.raises(UserError, match=f"{missing.name} is missing"):
        sources.load(tiny_config.data, "test")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("no_such_set", r"data: data\.name='no_such_set': .*TFDS"),
        ("fake_regression", r"data: data\.name='fake_regression': .*image-classification"),
        ("fake_variable", r"data: data\.image_size=0: .*fake_variable"),
    ],
)
def test_unusable_data_sets_are_reported(examination, tiny_config, name, pattern):
    tiny_config.data.name = name
    assert re.search(pattern, examination()[1])


@pytest.fixture
def download(tiny_config, monkeypatch):
    """Make the tiny config use data that must be downloaded; return the socket of their server."""
    tiny_config.data.name = "fake_download"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = {f"http://127.0.0.1:{port}/{name}": SimpleNamespace(size=30_000_000) for name in ("train", "test")}
        monkeypatch.setattr(fake_tfds.FakeDownload, "url_infos", urls)
        yield server


def test_a_possible_download_is_a_note(examination, download, tmp_path):
    before = snapshot(tmp_path)
    found, reasons = examination()
    assert reasons is None
    assert re.search(r"train and test: .*\b60 MB\b.*127\.0\.0\.1$", one(found, "note data"))
    assert " 60 MB" in one(found, "ok disk decoded images")
    assert re.search(r"TFDS.*\b120 MB\b.*\b180 MB", " ".join(found))
    assert snapshot(tmp_path) == before


def test_an_unreachable_server_is_reported(examination, download):
    port = download.getsockname()[1]
    download.close()
    found, reasons = examination()
    assert f"127.0.0.1:{port} ([Errno" in one(found, "FAIL data")
    assert "data.data_dir" in reasons


def test_a_proxy_is_checked_instead_of_the_host(examination, download, monkeypatch):
    port = download.getsockname()[1]
    urls = {"http://no.such.host.invalid/images": SimpleNamespace(size=30_000_000)}
    monkeypatch.setattr(fake_tfds.FakeDownload, "url_infos", urls)
    assert "no.such.host.invalid:80" in examination()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert examination()[1] is None


def test_invalid_archives_are_reported(examination, tiny_config, tmp_path):
    tiny_config.data.name, tiny_config.data.archive = "cifar10", "cifar-10-binary.tar.gz"
    assert re.search(r"data\.archive='cifar-10-binary\.tar\.gz': .*folder", examination()[1])
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no gzip")
    assert re.search(r"data\.archive='cifar-10-binary\.tar\.gz': cannot be read", examination()[1])


def test_space_is_checked_for_all_files_on_one_disk(examination, download, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(185_000_000))
    found, reasons = examination()
    assert [finding.split()[0] for finding in found if " disk " in finding] == ["ok", "ok", "FAIL"]
    assert re.search(r"disk: the run: .*\b170 MB\b.*\b350 MB\b.*\b185 MB", reasons)
