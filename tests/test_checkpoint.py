import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.checkpoint import CheckpointConfig, Checkpoints
from cifar_flax.errors import UserError
from cifar_flax.state import TrainState


def make_state(step=3, width=2, dtype=jnp.float32):
    leaf = jnp.arange(3 * width, dtype=dtype).reshape(3, width)
    return TrainState(
        step=jnp.int32(step),
        seed=jnp.uint32(2**32 - 1),
        params={"layer": {"kernel": leaf}},
        batch_stats={"norm": {"mean": leaf + 1}},
        opt_state=({"mu": leaf + 2}, (), jnp.int32(7)),
        average=(),
    )


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_them(**fields):
        opened.append(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**fields)))
        return opened[-1]

    yield open_them
    for checkpoints in opened:
        checkpoints.close()


def test_round_trip(open_checkpoints):
    state, metadata = make_state(), {"config": {"a": [1, 2.5, None, "x"]}, "dataset": {"mean": [0.1, 1 / 3]}}
    checkpoints = open_checkpoints()
    checkpoints.save(state, metadata, None)
    checkpoints.wait()
    again = open_checkpoints()
    assert again.newest_step() == 3
    assert again.metadata(3) == metadata
    restored = again.restore(3, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_a_save_keeps_its_values_while_training_goes_on(open_checkpoints):
    """The next step reuses the memory of the state that is being saved in the background."""
    checkpoints = open_checkpoints(keep=5)
    state = make_state(step=0, width=200_000)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for _ in range(3):
        state = advance(state)
        checkpoints.save(state, {}, None)
    for _ in range(5):
        state = advance(state)
    checkpoints.wait()
    for step in (1, 2, 3):
        restored = checkpoints.restore(step, make_state(width=200_000))
        assert float(restored.params["layer"]["kernel"][0, 0]) == step


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (make_state(width=4), r"batch_stats/norm/mean is \(3, 2\) float32 there and \(3, 4\) float32 here"),
        (make_state(dtype=jnp.int32), r"is \(3, 2\) float32 there and \(3, 2\) int32 here"),
        (make_state()._replace(params={}), r"params/layer/kernel is \(3, 2\) float32 there and absent here"),
        (
            make_state()._replace(batch_stats={"other": jnp.ones(1)}),
            r"norm/mean is .* there and absent here",
        ),
    ],
    ids=["shape", "dtype", "less", "other"],
)
def test_another_structure_is_refused_with_the_difference(open_checkpoints, template, message):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(), {}, None)
    checkpoints.wait()
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, template)


def test_newest_and_best_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, keep_best=True)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, 0.8)):
        checkpoints.save(make_state(step), {}, accuracy)
    checkpoints.wait()
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {2, 4, 5}
    assert (checkpoints.newest_step(), checkpoints.best_step()) == (5, 2)
    again = open_checkpoints(keep=2, keep_best=True)
    assert (again.newest_step(), again.best_step()) == (5, 2)


def test_unreadable_checkpoint_is_one_message(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(make_state(), {}, None)
    checkpoints.wait()
    for path in (tmp_path / "checkpoints" / "3").rglob("*"):
        if path.is_file() and "checkpoint" not in path.name.lower():
            path.write_bytes(b"")
    for read in (checkpoints.metadata, lambda step: checkpoints.restore(step, make_state())):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read(3)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("processes", "error", "closes"), [(1, False, True), (1, True, True), (2, False, True), (2, True, False)]
)
def test_an_error_in_one_of_several_processes_waits_for_no_save(
    open_checkpoints, monkeypatch, processes, error, closes
):
    """The others, for whose part the save would wait, may be gone, or wait for this one."""
    checkpoints, closed = open_checkpoints(), []
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with contextlib.suppress(KeyError), checkpoints:
        if error:
            raise KeyError
    monkeypatch.undo()
    assert bool(closed) == closes
