import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cifar_flax import files


def test_json_is_replaced_atomically(tmp_path):
    path = tmp_path / "eval.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_a_failed_write_leaves_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    files.write_json(path, {"a": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*eval\.json'"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_a_full_disk_is_reported_with_the_folder(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/new'"), files.new_folder(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_names_may_have_the_greatest_length(tmp_path):
    path = tmp_path / ("a" * 255)
    files.replace(path, b"content")
    assert path.read_bytes() == b"content"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"'.*/folder'"):
        files.replace(tmp_path / "folder", b"content")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, "folder"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_new_folders_have_the_permissions_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with files.new_folder(tmp_path / "new") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_sealed_files_keep_all_json_values(tmp_path):
    content = {"a": [1, 2.5, None, True, '\u00e4 "x"'], "b": {"c": 1 / 3, "": {}}, "f": 1e-300}
    files.write_sealed(tmp_path / "a", content)
    assert files.read_sealed(tmp_path / "a") == content


def test_a_lock_has_one_holder_and_names_it(tmp_path):
    with files.locked(tmp_path / "lock", wait=False):
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
            pytest.fail("two holders")
        assert (tmp_path / "lock").read_text().startswith("process ")
    with files.locked(tmp_path / "lock", wait=False):
        pass


def test_a_dead_process_holds_no_lock(tmp_path):
    program = (
        "import pathlib, time\nfrom cifar_flax import files\n"
        f"with files.locked(pathlib.Path({str(tmp_path / 'lock')!r}), wait=False):\n"
        "    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
            pytest.fail("two holders")
        process.kill()
        process.wait()
    with files.locked(tmp_path / "lock", wait=False):
        pass


def test_lock_holder_does_not_take_the_lock(tmp_path):
    assert files.lock_holder(tmp_path / "lock") is None
    assert not (tmp_path / "lock").exists()
    with files.locked(tmp_path / "lock", wait=False):
        assert files.lock_holder(tmp_path / "lock").startswith("process ")
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
            pytest.fail("two holders")
    assert files.lock_holder(tmp_path / "lock") is None


def test_leftovers_of_killed_processes_are_removed_but_not_those_of_live_ones(tmp_path):
    program = (
        "import pathlib, time\nfrom cifar_flax import files\n"
        f"with files.new_folder(pathlib.Path({str(tmp_path / '[new]')!r})) as folder:\n"
        "    (folder / 'a').touch()\n    print(folder.name, flush=True)\n    time.sleep(60)\n"
    )
    (tmp_path / ".[new].backup").mkdir()  # not made by `new_folder`
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        partial = process.stdout.readline().strip()
        with files.new_folder(tmp_path / "[new]") as folder:
            (folder / "b").touch()
        assert {path.name for path in tmp_path.iterdir()} == {"[new]", partial, ".[new].backup"}
        process.kill()
        process.wait()
    shutil.rmtree(tmp_path / "[new]")
    with files.new_folder(tmp_path / "[new]") as folder:
        (folder / "c").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"[new]", ".[new].backup"}
    assert [path.name for path in (tmp_path / "[new]").iterdir()] == ["c"]
