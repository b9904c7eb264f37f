"""Training steps with different layouts; test_parallel.py runs this file in a process with eight virtual devices.

The tests train the reference CNN with augmentation and dropout: a small version for 10 steps or, if FULL_SIZE is set,
the full network for 20 steps.
"""

import dataclasses
import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_counts, make_tiny_config, widest_gap

from cifar_flax.checkpoints.manager import CheckpointConfig, Checkpoints
from cifar_flax.config import Config, TrainConfig
from cifar_flax.data import order, resident
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.batches import Indices, evaluation_indices, gather
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import ConfigError
from cifar_flax.models import AirbenchConfig, CNNConfig
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training import evaluator, steps
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer

FULL_SIZE = "FULL_SIZE" in os.environ
jax.config.update("jax_disable_most_optimizations", not FULL_SIZE)

BATCH = 64
# The network, its number of parameters, and the number of steps (two epochs).
MODEL, PARAMETERS, COUNT = (CNNConfig(), 3_693_002, 20) if FULL_SIZE else (CNNConfig(width=8, hidden=32), 58_202, 10)
SIZE = BATCH * COUNT // 2  # images


def make_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, SIZE).astype(np.int32)
    images = rng.integers(0, 160, (SIZE, 32, 32, 3)) + 9 * labels[:, None, None, None]
    return Arrays(images.astype(np.uint8), labels, tuple("0123456789"), "noise")


IMAGES = make_images()
EXAMPLES = np.arange(SIZE, dtype=np.int32)
INFO = DatasetInfo.of(IMAGES, EXAMPLES, "standard")


def make_config(backend="auto", **settings):
    return Config(
        augment=AugmentConfig(flip="random", crop_padding=2),
        model=MODEL,
        optim=OptimConfig(name="sgd", learning_rate=1e-3, momentum=0.9),
        train=TrainConfig(batch_size=BATCH, epochs=2, **settings),
        parallel=ParallelConfig(backend=backend),
    )


def build(backend, devices, **settings):
    task, init = setup(make_config(backend, **settings), INFO, jax.devices()[:devices])
    return task, init(0, None)


def batches(start=0):
    for row, of in order.batches(0, EXAMPLES, BATCH, start, COUNT):
        yield gather(IMAGES.images, IMAGES.labels, Indices(row, of, row >= 0))


def compile_step(task, state, step=steps.train_step):
    return task.layout.compile(
        functools.partial(step, task), state, task.layout.shard_batch(next(batches())), donate=True
    )


def run(task, state, start=0):
    """Train from step `start` to `COUNT`; return the final state and the losses."""
    step, losses = compile_step(task, state), []
    for batch in batches(start):
        state, values = step(state, task.layout.shard_batch(batch))
        losses.append(float(values["loss"]))
    return state, np.array(losses)


@functools.cache
def result(backend, devices, **settings):
    """Return the final state, on the host, and the losses with a layout; trained once for all tests."""
    state, losses = run(*build(backend, devices, **settings))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def reference():
    """Return the state and the losses of one device that sees the whole batch."""
    state, losses = result("jit", 1)
    assert losses[-1] < losses[0] - 0.3  # the network has learned
    return state, losses


# The first loss depends on one forward pass only; rounding errors then grow with the steps.
LAYOUTS = [("shard_map", 1), ("shard_map", 2), ("shard_map", 8), ("pmap", 8), ("jit", 8)]


@pytest.mark.parametrize(("backend", "devices"), LAYOUTS)
def test_losses_do_not_depend_on_the_layout(reference, backend, devices):
    state, losses = result(backend, devices)
    np.testing.assert_allclose(losses[0], reference[1][0], rtol=1e-6)
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (state.params, state.batch_stats),
        (reference[0].params, reference[0].batch_stats),
    )


def test_weighted_losses_do_not_depend_on_the_layout(reference):
    """The devices' rows have different sums of class weights."""
    found = []
    for backend, devices in (("jit", 1), ("shard_map", 8)):
        task, state = build(backend, devices, class_weights="balanced")
        step = compile_step(task, state)
        for batch in itertools.islice(batches(), 2):
            state, values = step(state, task.layout.shard_batch(batch))
            found.append(float(values["loss"]))
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-5)
    assert abs(found[0] / reference[1][0] - 1) > 1e-4


def test_repeated_training_is_bitwise_equal():
    (state, losses), (again, same) = result("shard_map", 8), run(*build("shard_map", 8))
    np.testing.assert_array_equal(losses, same)
    jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(again))


def test_per_device_batch_statistics_agree_under_shard_map_and_pmap():
    (state, losses), (mapped, same) = (result(name, 8, sync_batchnorm=False) for name in ("shard_map", "pmap"))
    np.testing.assert_allclose(losses, same, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.params, mapped.params)


def test_shard_map_on_one_device_equals_jit(reference):
    np.testing.assert_allclose(run(*build("shard_map", 1, sync_batchnorm=False))[1], reference[1], rtol=1e-6)


def test_parameters_without_per_device_copies_are_refused(monkeypatch):
    """Without `pcast`, autodiff sums the gradients over the devices; the gradient of BatchNorm detects that."""
    monkeypatch.setattr(steps.jax.lax, "pcast", lambda x, axis_name, to: x)
    with pytest.raises(ValueError, match="_normalize"):
        compile_step(*build("shard_map", 8))


def test_shard_map_rejects_gradients_without_a_mean(monkeypatch):
    """shard_map tracks which values vary over the devices; the returned state must not."""
    monkeypatch.setattr(steps.jax.lax, "pmean", lambda x, axis_name, **settings: x)
    with pytest.raises(ValueError, match="out_specs"):
        compile_step(*build("shard_map", 8, sync_batchnorm=False))


def test_per_device_batch_statistics_differ_from_synchronized_ones(reference):
    _, losses = result("shard_map", 8, sync_batchnorm=False)
    assert abs(losses[0] / reference[1][0] - 1) > 1e-4
    # Running means are averaged over the devices; after one step, they equal those of the whole batch.
    means = []
    for task, state in (build("shard_map", 8, sync_batchnorm=False), build("jit", 1)):
        state, _ = compile_step(task, state)(state, task.layout.shard_batch(next(batches())))
        means.append(state.batch_stats["norm"]["mean"])
    np.testing.assert_allclose(*means, rtol=1e-5)


def test_constant_batch_statistics_stay_bitwise_equal_on_three_devices():
    """Averaging airbench's constant whitening kernel over three devices would change it by rounding errors."""
    config = make_config("shard_map", sync_batchnorm=False)
    config.model = AirbenchConfig(widths=(4, 8, 8))
    config.train.batch_size = 63
    task, init = setup(config, INFO, jax.devices()[:3])
    state = init(0, IMAGES.images[:300])
    kernel = np.asarray(state.batch_stats["whitening"]["kernel"])
    index = EXAMPLES[:63]
    batch = task.layout.shard_batch(gather(IMAGES.images, IMAGES.labels, Indices(index, 0 * index, index >= 0)))
    step = task.layout.compile(functools.partial(steps.train_step, task), state, batch, donate=True)
    for _ in range(3):
        state, _ = step(state, batch)
    assert np.abs(kernel).max() > 0
    np.testing.assert_array_equal(state.batch_stats["whitening"]["kernel"], kernel)


COLLECTIVES = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")
BYTES_PER_STEP = 4 * (PARAMETERS + 2)  # gradients, loss and accuracy in float32
STATISTICS = 4 * 2 * MODEL.width  # two values per channel


@pytest.mark.parametrize(
    ("backend", "sync_batchnorm", "expected"),
    [
        # Backward: two sums per channel; forward: the statistics of each device; gradients and metrics.
        ("shard_map", True, [STATISTICS, 8 * STATISTICS, BYTES_PER_STEP]),
        ("shard_map", False, [BYTES_PER_STEP + STATISTICS]),
        ("pmap", True, [STATISTICS, 8 * STATISTICS, BYTES_PER_STEP]),
    ],
)
def test_devices_exchange_no_more_than_necessary(backend, sync_batchnorm, expected):
    """Check the bytes of each collective of a step compiled with the default optimizations; all are sums."""
    task, state = build(backend, 8, sync_batchnorm=sync_batchnorm)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = compile_step(task, state).as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", not FULL_SIZE)
    found = COLLECTIVES.findall(text)
    assert {kind for _, kind in found} == {"all-reduce"}
    sizes = [
        sum(4 * int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"f32\[([\d,]*)\]", shapes))
        for shapes, _ in found
    ]
    assert sorted(sizes) == expected


@pytest.mark.parametrize(("backend", "devices"), [("jit", 1), ("shard_map", 8), ("pmap", 8)])
def test_the_buffers_of_the_state_are_donated(backend, devices):
    task, state = build(backend, devices)
    addresses = {shard.data.unsafe_buffer_pointer() for shard in state.params["hidden"]["kernel"].addressable_shards}
    step = compile_step(task, state)
    after, _ = step(state, task.layout.shard_batch(next(batches())))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    kernel = after.params["hidden"]["kernel"]
    assert {shard.data.unsafe_buffer_pointer() for shard in kernel.addressable_shards} == addresses


@pytest.mark.parametrize(
    ("backend", "devices", "on_device"),
    [("shard_map", 3, False), ("shard_map", 3, True), ("pmap", 8, True), ("jit", 8, False)],
)
def test_evaluation_does_not_depend_on_the_devices(backend, devices, on_device):
    """Batches of 500 images, which neither 3 nor 8 divide, with TTA for about half of the images."""
    (one, state), (several, sharded) = build("jit", 1), build(backend, devices)
    (everything,) = evaluation_indices(EXAMPLES, SIZE)
    batch = jax.device_put(gather(IMAGES.images, IMAGES.labels, everything))
    logits = steps._logits(one, (state.params, state.batch_stats), batch.image, "none")
    confidence = jax.nn.softmax(logits).max(axis=-1)
    fraction = float(np.mean(confidence < widest_gap(confidence)))
    results = []
    for task, current in ((one, state), (several, sharded)):
        arrays = resident.put(IMAGES, task.layout) if on_device else IMAGES
        evaluate = evaluator.Evaluator(task, arrays, EXAMPLES, 500, tta="mirror", tta_fraction=fraction)
        results.append(evaluate(current))
    first, second = (result.summary for result in results)
    assert first["num_examples"] == SIZE
    assert_same_counts(first["confusion_matrix"], second["confusion_matrix"])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    np.testing.assert_allclose(results[0].probabilities, results[1].probabilities, atol=1e-5)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(("shard_map", 8), ("shard_map", 2)), (("jit", 1), ("pmap", 4))])
def test_a_checkpoint_moves_between_layouts(reference, tmp_path, saved_on, restored_on):
    """Train half of the steps with each layout; the losses equal those of an uninterrupted run."""
    task, state = build(*saved_on)
    step = compile_step(task, state)
    for batch, _ in zip(batches(), range(COUNT // 2), strict=False):
        state, _ = step(state, task.layout.shard_batch(batch))
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(state, {}, None)
    checkpoints.wait()
    task, template = build(*restored_on)
    restored = checkpoints.restore(COUNT // 2, template)
    checkpoints.close()
    assert all(leaf.sharding.device_set == set(task.layout.mesh.devices.flat) for leaf in jax.tree.leaves(restored))
    _, losses = run(task, restored, COUNT // 2)
    np.testing.assert_allclose(losses, reference[1][COUNT // 2 :], rtol=1e-5)


def test_a_call_of_many_steps_equals_single_steps(reference):
    """The call gets the indices of all steps, sharded along their second axis; each device holds the dataset.

    The number of steps is a constant of the program, or an argument.
    """
    for backend in ("jit", "shard_map", "pmap"):
        task, initial = build(backend, 4)
        arrays = resident.put(IMAGES, task.layout)
        (positions,) = resident.training_indices(
            EXAMPLES, batch_size=BATCH, seed=0, start=0, stop=COUNT, drop_last=False, ends=[COUNT], steps_per_call=COUNT
        )
        inputs = task.layout.shard_batch(positions, batch_axis=1)
        split = arrays.images, arrays.labels
        program = functools.partial(steps.train_steps, task)
        for count in (COUNT, COUNT - 3):
            state = jax.tree.map(jnp.copy, initial)
            shared = split if count == COUNT else (*split, task.layout.replicate(np.int32(count)))
            call = task.layout.compile(program, state, inputs, *shared, batch_axis=1, donate=True)
            state, values = call(state, inputs, *shared)
            assert int(state.step) == count
            np.testing.assert_allclose(values["loss"][:count], reference[1][:count], rtol=1e-5)
            assert not np.asarray(values["loss"][count:]).any()


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match=r"^train\.sync_batchnorm=False: .*parallel\.backend"):
        build("jit", 8, sync_batchnorm=False)
    with pytest.raises(ConfigError, match=r"^train\.batch_size=100: .*\b8\b"):
        Trainer(dataclasses.replace(make_tiny_config(), train=TrainConfig(batch_size=100)))


def test_auto_selects_the_backend_by_the_number_of_devices():
    one, several = (build("auto", devices)[0].layout for devices in (1, 8))
    assert [str(one), str(several)] == ["cpu", "8 x cpu (shard_map)"]
    assert (one.backend, several.backend) == ("jit", "shard_map")
    assert [several.round_up(size) for size in (1, 8, 9, 500)] == [8, 8, 16, 504]
