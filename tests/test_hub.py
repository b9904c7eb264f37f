"""Download CIFAR-10 from a local hub that works, breaks off, is slow, sends wrong bytes, or is not there."""

import errno
import shutil
from pathlib import Path

import cifar_copies
import numpy as np
import pytest

from cifar_flax import packages
from cifar_flax.data import hub, sources
from cifar_flax.data.archives import cifar
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import UserError

pytestmark = pytest.mark.skipif(bool(packages.fault("huggingface-hub")), reason="huggingface-hub is not installed")

CONFIG = DataConfig(source="hub")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES", cifar_copies.COUNTS)
    with cifar_copies.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def load(config=CONFIG):
    return {split: sources.load(config, split) for split in ("train", "test")}


def assert_intact(loaded, seed=0):
    for split, arrays in loaded.items():
        images, labels = cifar_copies.arrays(split, seed)
        np.testing.assert_array_equal(arrays.images, images)
        np.testing.assert_array_equal(arrays.labels, labels)
        assert (arrays.dataset, arrays.class_names[3]) == ("cifar10", "cat")


def ranges(server):
    return [requested for method, _, requested in server.requests if method == "GET"]


def fail():
    """Return the error of a start; it has one line and exit code 1."""
    with pytest.raises(UserError) as caught:
        load()
    assert ("\n" in str(caught.value), caught.value.exit_code) == (False, 1)
    for part in ("./data", "data.archive=", "HF_ENDPOINT"):
        assert part in str(caught.value)
    return str(caught.value)


def partial_files(tmp_path):
    return list((tmp_path / "hub").rglob("*.partial"))


@pytest.mark.parametrize("source", ["hub", "auto"])
def test_files_are_downloaded_into_the_hubs_cache_and_decoded_once(server, tmp_path, capfd, source):
    import huggingface_hub

    config = DataConfig(source=source)
    assert_intact(load(config))
    out, err = capfd.readouterr()
    assert err == ""
    place = f"from {server.url} to {tmp_path}/hub/datasets--uoft-cs--cifar10"
    first, second = out.splitlines()
    assert first == f"cifar10: downloading 0.1 MB of 0.1 MB {place}"
    assert second.startswith(f"cifar10: reading {tmp_path}/hub/datasets--uoft-cs--cifar10/snapshots/")
    for file in cifar_copies.FILES.values():  # where other programs look for them
        path = huggingface_hub.try_to_load_from_cache("uoft-cs/cifar10", file, repo_type="dataset")
        assert Path(path).read_bytes() == server.files[f"/datasets/uoft-cs/cifar10/resolve/main/{file}"]
    shutil.rmtree(tmp_path / "hub")
    server.requests.clear()
    assert_intact(load(config))
    assert (server.requests, capfd.readouterr().err) == ([], "")


def test_a_download_that_breaks_off_resumes(server, tmp_path):
    server.breaks = 10_000
    assert_intact(load())
    assert ranges(server) == ["", "bytes=10000-", ""]
    assert partial_files(tmp_path) == []


def test_a_second_start_resumes(server, tmp_path, monkeypatch):
    receive = hub._receive

    def broken(url, partial, start, size, meter):
        if start:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        receive(url, partial, start, size, meter)

    server.breaks = 10_000
    monkeypatch.setattr(hub, "_receive", broken)
    message = fail()
    assert "Connection reset by peer" in message
    assert "A later start resumes." in message
    (partial,) = partial_files(tmp_path)
    assert partial.stat().st_size == 10_000
    monkeypatch.setattr(hub, "_receive", receive)
    assert_intact(load())
    assert ranges(server) == ["", "bytes=10000-", ""]


@pytest.mark.parametrize(("slow", "lines"), [(1e12, 1), (0, 0)])
def test_a_slow_download_names_other_ways_once(server, monkeypatch, capsys, slow, lines):
    monkeypatch.setattr(hub, "_WINDOW", 0)
    monkeypatch.setattr(hub, "_SLOW", slow)
    assert_intact(load())
    rates = [line for line in capsys.readouterr().out.splitlines() if "kB/s" in line]
    assert all(" min left" in line for line in rates)
    named = [line for line in rates if "data.archive=FILE" in line and "HF_ENDPOINT" in line]
    assert (len(named), len(rates) > 1) == (lines, True)


def test_wrong_bytes_are_removed(server, tmp_path):
    server.wrong = True
    assert "does not match its SHA-256" in fail()
    assert partial_files(tmp_path) == []
    server.wrong = False
    assert_intact(load())


@pytest.mark.parametrize("status", [404, 503])
def test_an_answer_of_failure_is_reported(server, status):
    server.status = status
    assert f"({status} for http://127.0.0.1" in fail()


def test_no_server_is_reported():
    assert "cannot be downloaded from http://127.0.0.1:9 (ConnectError: " in fail()


def test_offline_mode_is_respected(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in fail()
    assert server.requests == []


def test_a_full_disk_is_reported(server, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_receive", full)
    with pytest.raises(UserError, match=r"cannot write the cache folder .*No space left on device.*HF_HUB_CACHE"):
        load()


def test_a_server_that_sends_nothing_is_reported(server, monkeypatch):
    monkeypatch.setattr(hub, "_receive", lambda *arguments: None)
    assert "sends no more bytes" in fail()


def test_damaged_files_of_the_hubs_cache_are_downloaded_again(server, tmp_path, capsys):
    assert_intact(load())
    for damage in (lambda content: content[:-5], lambda content: content[:-5] + b"?" + content[-4:]):
        shutil.rmtree(tmp_path / "cache")
        blob = max((tmp_path / "hub").rglob("blobs/*"), key=lambda path: path.stat().st_size)
        blob.write_bytes(damage(blob.read_bytes()))
        server.requests.clear()
        capsys.readouterr()
        assert_intact(load())
        assert "does not match its SHA-256" in capsys.readouterr().out
        assert partial_files(tmp_path) == []
        assert blob.exists()


def test_a_rate_below_300_kilobytes_for_20_seconds_is_slow(monkeypatch, capsys):
    """Each pair is a number of seconds and the bytes that arrive in them, of 100 MB."""
    clock = [0.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: clock[0])
    meter = hub._Meter(CONFIG, 100_000_000, 40_000_000)
    for seconds, count in ((19, 1_000_000), (2, 6_000_000), (21, 2_100_000), (21, 2_100_000)):
        clock[0] += seconds
        meter.advance(count)
    fast, slow, again = capsys.readouterr().out.splitlines()
    assert fast == "333 kB/s, 53 MB and 3 min left"
    assert slow.startswith(
        "100 kB/s, 51 MB and 8 min left. A later start resumes. What may be faster: a copy in ./data"
    )
    assert again == "100 kB/s, 49 MB and 8 min left"
