"""Checkpoints that are damaged or cannot be read."""

import re
import shutil

import jax
import numpy as np
import pytest
from conftest import make_state, steps_in

from cifar_flax import files
from cifar_flax.errors import UserError

DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_restored(open_checkpoints, tmp_path, capsys, damage):
    """If any file is damaged, an older checkpoint is restored; without an older one, restoring fails."""
    folder = tmp_path / "checkpoints"
    checkpoints = open_checkpoints(keep=2)
    for step in (3, 5):
        checkpoints.save(jax.tree.map(lambda x, step=step: x + step, make_state(0)), {"note": step})
    checkpoints.wait()
    shutil.copytree(folder, tmp_path / "intact")
    names = [path.relative_to(folder / "5") for path in (folder / "5").rglob("*") if path.is_file()]
    assert len(names) >= 8
    for name in names:
        if not (folder / "5" / name).stat().st_size and damage != "deleted":
            continue  # an empty file cannot be shortened
        DAMAGES[damage](folder / "5" / name)
        state, record = open_checkpoints().restore_newest(make_state())
        assert (int(state.step), record["note"]) == (3, 3)
        jax.tree.map(np.testing.assert_array_equal, state, jax.tree.map(lambda x: x + 3, make_state(0)))
        printed = capsys.readouterr().out
        assert re.search(r"^.*step 5 .*damaged \(.+\)\n.* 3\b.* 5\.damaged$", printed, re.MULTILINE)
        assert steps_in(folder) == {"3", "5.damaged"}

        shutil.rmtree(folder / "3")
        (folder / "5.damaged").rename(folder / "5")
        for _ in range(2):  # a second start fails too
            with pytest.raises(UserError, match=r"checkpoints: .*--workdir"):
                open_checkpoints().restore_newest(make_state())
        assert re.search(r"step 5 .*damaged", capsys.readouterr().out)
        assert steps_in(folder) == {"5"}
        for read in (lambda: checkpoints.restore(5, make_state()), lambda: checkpoints.restore_newest(make_state())):
            with pytest.raises(UserError) as caught:
                read()
            assert "\n" not in str(caught.value)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "intact", folder)


def test_a_checkpoint_renamed_to_another_step_is_damaged(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(3), {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "4")
    assert open_checkpoints().restore_newest(make_state())[1]["step"] == 3


@pytest.fixture
def make_unreadable(monkeypatch):
    """Return a function that makes reading the metadata of one step raise an I/O error."""

    def of(step):
        read = files.read_sealed

        def failing(path):
            if path.parent.name == str(step):
                raise OSError(5, "Input/output error", str(path))
            return read(path)

        monkeypatch.setattr(files, "read_sealed", failing)

    return of


def test_an_unreadable_checkpoint_is_not_removed(open_checkpoints, tmp_path, make_unreadable):
    checkpoints = open_checkpoints(keep=1, keep_best=1)
    for step, accuracy in ((1, 0.9), (2, 0.5)):
        checkpoints.save(make_state(step), {}, accuracy)
    checkpoints.wait()
    make_unreadable(1)
    checkpoints.save(make_state(3), {}, 0.6)
    checkpoints.wait()
    assert steps_in(tmp_path / "checkpoints") == {"1", "3"}
    with pytest.raises(UserError, match=r"checkpoints/1 .*OSError: .*Input/output error"):
        checkpoints.best_step()  # step 1 may be the best


def test_an_unreadable_checkpoint_is_not_renamed(open_checkpoints, tmp_path, make_unreadable):
    checkpoints = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(make_state(step), {})
    checkpoints.wait()
    make_unreadable(2)
    with pytest.raises(UserError, match=r"checkpoints/2 .*Input/output error"):
        open_checkpoints().restore_newest(make_state())
    assert steps_in(tmp_path / "checkpoints") == {"1", "2"}


def test_checkpoints_of_other_versions_are_refused_and_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(1), {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2")
    files.write_sealed(tmp_path / "checkpoints" / "2" / "record.json", {"format": 99, "step": 2})
    with pytest.raises(UserError, match=r"checkpoints/2 .*format.*99"):
        open_checkpoints().restore_newest(make_state())
    assert steps_in(tmp_path / "checkpoints") == {"1", "2"}
