import contextlib
import math
import shutil
import tempfile
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_state, steps_in
from hypothesis import given
from hypothesis import strategies as st

from cifar_flax import files, restore
from cifar_flax.checkpoints import storage
from cifar_flax.checkpoints.manager import CheckpointConfig, Checkpoints, steps_to_keep
from cifar_flax.errors import UserError


def test_round_trip(open_checkpoints):
    state, metadata = make_state(), {"config": {"a": [1, 2.5, None, "x"]}, "dataset": {"mean": [0.1, 1 / 3]}}
    checkpoints = open_checkpoints()
    checkpoints.save(state, metadata)
    checkpoints.wait()
    again = open_checkpoints()
    assert again.newest_step() == 3
    restored, record = again.restore_newest(jax.tree.map(jnp.zeros_like, state))
    assert {name: record[name] for name in metadata} == metadata
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_a_save_is_not_changed_by_later_steps(open_checkpoints):
    """The next step reuses the buffers of the state that is being saved in the background."""
    checkpoints = open_checkpoints(keep=5)
    state = make_state(step=0, width=200_000)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for _ in range(3):
        state = advance(state)
        checkpoints.save(state, {})
    for _ in range(5):
        state = advance(state)
    checkpoints.wait()
    for step in (1, 2, 3):
        restored = checkpoints.restore(step, make_state(width=200_000))
        assert float(restored.params["layer"]["kernel"][0, 0]) == step


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (make_state(width=4), r"batch_stats/norm/mean .*\(3, 2\) float32 .*\(3, 4\) float32"),
        (make_state(dtype=jnp.int32), r"\(3, 2\) float32 .*\(3, 2\) int32"),
        (make_state()._replace(params={}), r"params/layer/kernel .*\(3, 2\) float32 .*absent"),
        (make_state()._replace(batch_stats={"other": jnp.ones(1)}), r"norm/mean .*absent"),
    ],
    ids=["shape", "dtype", "less", "other"],
)
def test_another_structure_is_refused_with_the_difference(open_checkpoints, template, message):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(), {})
    checkpoints.wait()
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, template)


def test_newest_and_best_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, keep_best=1)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, None), (4, math.nan), (5, 0.8)):
        checkpoints.save(make_state(step), {}, accuracy)
    checkpoints.wait()
    assert steps_in(tmp_path / "checkpoints") == {"2", "4", "5"}
    assert (checkpoints.newest_step(), checkpoints.best_step()) == (5, 2)
    again = open_checkpoints(keep=2, keep_best=1)
    assert (again.newest_step(), again.best_step()) == (5, 2)
    checkpoints.save(make_state(6), {}, 0.1)
    checkpoints.save(make_state(7), {}, 0.2)
    checkpoints.wait()
    assert steps_in(tmp_path / "checkpoints") == {"2", "6", "7"}  # those without an accuracy are removed


def test_extra_checkpoints_are_replaced_by_the_next_one(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2)
    for step, is_extra, names in (
        (1, False, {"1"}),
        (2, True, {"1", "2"}),
        (3, False, {"1", "3"}),
        (4, True, {"1", "3", "4"}),
        (5, True, {"1", "3", "5"}),
        (6, False, {"3", "6"}),
    ):
        checkpoints.save(make_state(step), {}, is_extra=is_extra)
        checkpoints.wait()
        assert steps_in(tmp_path / "checkpoints") == names


ACCURACIES = st.dictionaries(st.integers(1, 50), st.none() | st.just(math.nan) | st.sampled_from([0.1, 0.5, 0.5, 0.9]))


@given(ACCURACIES, st.integers(1, 5), st.integers(0, 5))
def test_steps_to_keep(accuracies, newest, best):
    kept = steps_to_keep(accuracies, newest, best)
    last = sorted(accuracies)[-newest:]
    assert set(last) <= kept <= set(accuracies)
    evaluated = [step for step, value in accuracies.items() if value is not None and not math.isnan(value)]
    others = kept - set(last)
    assert others <= set(evaluated)
    assert len(others) <= best
    highest = sorted(evaluated, key=lambda step: (accuracies[step], step))[len(evaluated) - min(best, len(evaluated)) :]
    assert kept == {*last, *highest}


def test_the_folder_of_a_killed_save_is_removed(open_checkpoints, tmp_path):
    (tmp_path / "checkpoints" / "5.unfinished" / "state").mkdir(parents=True)
    checkpoints = open_checkpoints()
    assert checkpoints.restore_newest(make_state()) is None
    assert steps_in(tmp_path / "checkpoints") == set()


def test_reading_removes_nothing(tmp_path):
    """Another process may still be writing an unfinished checkpoint."""
    (tmp_path / "checkpoints" / "5.unfinished").mkdir(parents=True)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        assert checkpoints.newest_step() is None
    assert steps_in(tmp_path / "checkpoints") == {"5.unfinished"}


def fail_to_seal(path, content):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_in_the_background_is_reported_and_keeps_the_others(open_checkpoints, tmp_path, monkeypatch):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(3), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_sealed", fail_to_seal)
        for method in (checkpoints.check, checkpoints.wait, lambda: checkpoints.save(make_state(5), {})):
            checkpoints.save(make_state(4), {})
            deadline = time.monotonic() + 10
            while not checkpoints._saving[1].done():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            with pytest.raises(UserError, match=r"step 4 .*step 3\b.*No space"):
                method()
    assert steps_in(tmp_path / "checkpoints") == {"3"}
    assert int(open_checkpoints().restore_newest(make_state())[0].step) == 3


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_save(tmp_path, monkeypatch):
    def run():
        with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
            checkpoints.save(make_state(3), {})
            raise KeyError("the first")

    monkeypatch.setattr(files, "write_sealed", fail_to_seal)
    with pytest.raises(KeyError, match="the first"):
        run()


def test_the_disk_is_not_waited_for(open_checkpoints, monkeypatch):
    checkpoints, on_disk = open_checkpoints(), threading.Event()
    finish = Checkpoints._finish

    def finish_late(self, *arguments):
        assert on_disk.wait(20)
        finish(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_finish", finish_late)
    checkpoints.save(make_state(3), {})
    assert checkpoints.steps() == []
    threading.Timer(0.2, on_disk.set).start()
    checkpoints.save(make_state(4), {})  # waits for the save before it
    assert on_disk.is_set()
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state"])
def test_non_finite_states_are_not_saved(open_checkpoints, part, value):
    checkpoints, state = open_checkpoints(), make_state()
    poisoned = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(value) if x.dtype == jnp.float32 else x, getattr(state, part)
    )
    with pytest.raises(UserError, match=r"step 3 .*not finite"):
        checkpoints.save(state._replace(**{part: poisoned}), {})
    checkpoints.wait()
    assert checkpoints.steps() == []


def test_saving_the_restored_step_again_only_replaces_its_metadata(open_checkpoints, tmp_path):
    """A run that was stopped during an evaluation evaluates and saves the same step again."""
    checkpoints = open_checkpoints(keep_best=1)
    checkpoints.save(make_state(3), {"evaluated": False})
    checkpoints.wait()
    again = open_checkpoints(keep_best=1)
    state, _ = again.restore_newest(make_state())
    (data,) = [path for path in (tmp_path / "checkpoints" / "3" / "state").glob("manifest.ocdbt")]
    before = data.stat().st_mtime_ns
    again.save(state, {"evaluated": True}, accuracy=0.5)
    again.wait()
    assert data.stat().st_mtime_ns == before
    assert again.best_step() == 3
    assert open_checkpoints().restore_newest(make_state())[1]["evaluated"]


@pytest.mark.parametrize(
    ("processes", "error", "closes"), [(1, False, True), (1, True, True), (2, False, True), (2, True, False)]
)
def test_after_an_error_one_of_several_processes_does_not_wait_for_the_save(
    open_checkpoints, monkeypatch, processes, error, closes
):
    """The save would wait for the other processes, which may have ended or wait for this one."""
    checkpoints, closed = open_checkpoints(), []
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with contextlib.suppress(KeyError), checkpoints:
        if error:
            raise KeyError
    monkeypatch.undo()
    assert bool(closed) == closes


@pytest.mark.parametrize("name", ["[a]", "a*b", "a?b", "**", "a\\b", "a%20#b", "a\nb", "~"])
def test_the_name_of_a_folder_is_not_a_pattern(tmp_path, monkeypatch, name):
    """Orbax passes absolute paths to `glob`."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    state = make_state()
    for _ in range(2):  # a new run, and a resumed one
        with Checkpoints(tmp_path / name / "checkpoints", CheckpointConfig()) as checkpoints:
            restored, _ = checkpoints.restore_newest(state) or (state, {})
            jax.tree.map(np.testing.assert_array_equal, restored, state)
            state = state._replace(step=state.step + 1)
            checkpoints.save(state, {})
            checkpoints.wait()
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(int(state.step), make_state()), state)
    assert steps_in(tmp_path / "temporary") == set()


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_a_save_that_cannot_be_read_back_gets_no_name(open_checkpoints, tmp_path, monkeypatch, name):
    checkpoints, finish = open_checkpoints(), storage.Storage.finish

    def lose_files(self):
        finish(self)
        for path in (tmp_path / "checkpoints" / "4.unfinished" / "state").glob(name):
            path.unlink()

    checkpoints.save(make_state(3), {})
    checkpoints.wait()
    monkeypatch.setattr(storage.Storage, "finish", lose_files)
    checkpoints.save(make_state(4, width=200_000), {})  # arrays of a few bytes would be in the index
    with pytest.raises(UserError, match=r"step 4 .*could not be saved.*resumes from step 3"):
        checkpoints.wait()
    assert steps_in(tmp_path / "checkpoints") == {"3"}


def test_a_run_that_is_training_can_be_read(straight, tmp_path):
    """A checkpoint that is removed while it is read is replaced by a newer one."""
    shutil.copytree(straight[0], tmp_path / "run")
    run, stop = restore.restore(restore.saved_config(tmp_path / "run"), tmp_path / "run"), threading.Event()
    saved_anew = ("step", "accuracy", "is_extra", "arrays", "sha256", "format")
    metadata = {name: value for name, value in run.metadata.items() if name not in saved_anew}

    def keep_saving():
        state = run.state
        with Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(keep=1)) as checkpoints:
            while not stop.is_set():
                state = state._replace(step=state.step + 1)
                checkpoints.save(state, metadata | {"config": metadata["config"] | {"max_skipped": int(state.step)}})

    thread = threading.Thread(target=keep_saving)
    thread.start()
    try:
        for _ in range(25):
            found = restore.restore(restore.saved_config(tmp_path / "run"), tmp_path / "run")
            assert found.step == int(found.state.step)
            assert found.step in (run.step, found.config.max_skipped)  # config and state are of one checkpoint
    finally:
        stop.set()
        thread.join()


def test_reads_and_writes_that_orbax_has_given_up_print_no_traceback(tmp_path):
    of_orbax = {"__name__": "orbax"}
    exec(compile("async def given_up(): pass", "/site-packages/orbax/reading.py", "exec"), of_orbax)

    async def ours():
        pass

    reported, coroutines = [], [of_orbax["given_up"](), ours()]
    for coroutine in coroutines:
        storage._report(types.SimpleNamespace(object=coroutine, exc_value=OSError("gone")), reported.append)
        coroutine.close()
    assert [one.object for one in reported] == coroutines[1:]
