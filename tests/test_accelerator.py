"""Tests on a GPU or TPU: `python -m pytest -m accelerator`. With REHEARSE=1, they run on a CPU.

They compare the accelerator with itself, with the CPU of the same machine, and with NumPy. Unless a test names another
tolerance, products are in float32 precision and results agree to `CLOSE`. Random bits, bytes and counts are equal.
"""

import contextlib
import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from conftest import (
    REPOSITORY,
    assert_same_classes,
    assert_same_counts,
    make_tiny_config,
    needs_tensorflow,
    read_metrics,
)
from device_steps import (
    BATCH,
    IMAGES,
    INFO,
    NETWORKS,
    SIZE,
    assert_trees_equal,
    batch_of,
    bits_of,
    build,
    call,
    loss_and_gradient,
    on_cpu,
    store_images,
    three_steps,
)
from PIL import Image
from stops import saved, stop_at

from cifar_flax.arguments import parse
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.config import DataConfig, TrainConfig
from cifar_flax.data import resident, sources
from cifar_flax.data.batches import Indices, evaluation_indices, gather
from cifar_flax.export import program
from cifar_flax.modes import export, predict
from cifar_flax.restore import restore, saved_config
from cifar_flax.runtime import signals
from cifar_flax.training import loop, steps
from cifar_flax.training.evaluator import Evaluator, all_examples
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer

pytestmark = pytest.mark.accelerator

REHEARSAL = os.environ.get("REHEARSE") == "1"
CLOSE = 1e-5
# Largest difference between accelerator and CPU: of the loss, and of the gradient, relative to its norm. The gradients
# of the two implementations of the layers differ on a CPU by 4e-7 (cnn), 3e-4 (airbench) and 1 % (resnet18) in float32.
# In bfloat16 they differ from float32 by 4, 11 and 24 %.
PARITY = {
    ("cnn", "float32"): (1e-5, 1e-4),
    ("airbench", "float32"): (1e-5, 1e-3),
    ("resnet18", "float32"): (1e-5, 0.03),
    ("cnn", "bfloat16"): (0.02, 0.1),
    ("airbench", "bfloat16"): (0.02, 0.2),
    ("resnet18", "bfloat16"): (0.02, 0.4),
}
MEMORY = 3 * 2**30  # bytes for a step of configs/airbench94_wide.py
REHEARSED_MEMORY = 300 * 2**20  # for its step on 64 images, in float32 on a CPU


@pytest.fixture(scope="module")
def optimizations(request):
    """Return a function that switches XLA's default optimizations on or, to compile faster in a rehearsal, off."""
    default = request.config.getoption("--default-optimizations")

    def switch(on):
        jax.config.update("jax_disable_most_optimizations", not (on or default))

    yield switch
    switch(False)


@pytest.fixture(scope="module", autouse=True)
def accelerator(compile_once):
    """Return the devices. Never load a compiled program: a repeated run compiles its own."""
    if jax.default_backend() == "cpu" and not REHEARSAL:
        pytest.skip("JAX finds no GPU or TPU. REHEARSE=1 runs these tests on the CPU")
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield jax.devices()
    jax.config.update(name, before)


@pytest.fixture(autouse=True)
def prepare_test(accelerator, optimizations, record_property):
    """Compile as users do, except in a rehearsal; let `pytest_terminal_summary` print the devices."""
    optimizations(not REHEARSAL)
    record_property("devices", f"{len(accelerator)} x {accelerator[0].device_kind} ({accelerator[0].platform})")


# First in the file, since the peak is that of the whole process.
def test_memory_of_a_step_is_bounded(accelerator):
    config = parse(
        ["--config", str(REPOSITORY / "configs" / "airbench94_wide.py"), "--config.train.steps_per_call=1"]
    ).config
    bound, size = (REHEARSED_MEMORY, 64) if REHEARSAL else (MEMORY, config.train.batch_size)
    config.train.batch_size = size
    task, init = setup(config, dataclasses.replace(INFO, num_examples=50_000), accelerator[:1])
    state = init(0, IMAGES.images)
    arrays = resident.put(IMAGES, task.layout)
    index = np.resize(np.arange(SIZE, dtype=np.int32), (1, size))
    inputs = task.layout.shard_batch(Indices(index, 0 * index, index >= 0), batch_axis=1)
    arguments = state, inputs, arrays.images, arrays.labels
    step = task.layout.compile(functools.partial(steps.train_steps, task), *arguments, batch_axis=1, donate=True)
    temporary = step.memory_analysis().temp_size_in_bytes
    _, values = step(*arguments)
    assert np.isfinite(values["loss"]).all()
    assert 2**20 < temporary < bound, f"{temporary / 2**20:,.0f} MiB"
    if stats := accelerator[0].memory_stats():
        assert stats["peak_bytes_in_use"] < bound, f"{stats['peak_bytes_in_use'] / 2**20:,.0f} MiB"


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """Return a function that makes a config of 20 deterministic steps: the CNN with Adam, or airbench with Muon.

    The images have independent colors. In gray ones, airbench has filters that respond to rounding errors only.
    """
    data = store_images(tmp_path_factory.mktemp("images"), train=1440, test=SIZE)

    def make(name):
        config = make_tiny_config()
        config.deterministic, config.data, config.model = True, dataclasses.replace(data), NETWORKS[name]
        config.train = TrainConfig(batch_size=144, epochs=2, log_every=1)
        config.optim = OptimConfig(name="adam", learning_rate=3e-3)
        if name == "airbench":
            config.train = dataclasses.replace(config.train, log_every=2, steps_per_call=2)
            config.optim = OptimConfig(name="muon", learning_rate=0.1, momentum=0.6)
        return config

    return make


def run(config, folder):
    """Train and return the state of the newest checkpoint, even if a signal stops the run."""
    trainer = Trainer(config)
    with contextlib.suppress(signals.Stopped), signals.signals_raise_stopped():
        loop.run(trainer, folder)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        return jax.device_get(checkpoints.restore(checkpoints.newest_step(), trainer.initial_state))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_config):
    """Return a function that trains a network once, without an interruption, and returns its workdir and state."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp("trained")
        return folder, run(run_config(name), folder)

    return get


@pytest.mark.parametrize("name", ["cnn", "airbench"])
def test_an_interrupted_run_and_its_repetition_equal_an_uninterrupted_run(
    trained, run_config, name, tmp_path, monkeypatch
):
    """Every run compiles its own programs, as separate processes do."""
    folder, expected = trained(name)
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 4)
        stopped = run(run_config(name), tmp_path)
    assert [stopped.step] == saved(tmp_path)
    assert 4 <= stopped.step < 10  # in the middle of the first epoch
    state = run(run_config(name), tmp_path)
    assert (expected.step, state.step) == (20, 20)
    # The lines before the signal are those of a repeated run, the others those of a resumed run.
    losses, repeated = ([(line["step"], line["loss"]) for line in read_metrics(path)] for path in (folder, tmp_path))
    assert repeated[: stopped.step // 2] == losses[: stopped.step // 2]
    assert repeated == losses
    train = [line["loss"] for line in read_metrics(folder) if line["split"] == "train"]
    assert train[-1] < train[0] - 0.2
    assert abs(train[0] - np.log(10)) > 0.05  # the loss of a network whose logits are all 0
    assert_trees_equal(state, expected)


def test_augmented_bytes_and_random_bits_equal_those_of_the_cpu(accelerator):
    found, expected = (call(*bits_of("cnn", devices)) for devices in (accelerator[:1], jax.devices("cpu")[:1]))
    assert_trees_equal(found, expected)
    moved, squares, kept = found
    assert np.mean(moved == batch_of(1).image) < 0.2
    assert (squares == 0).sum() == BATCH * 4 * 4 * 3
    assert 0.65 < kept.mean() < 0.75


@needs_tensorflow
def test_streaming_and_resident_pipelines_yield_the_same_bytes():
    config = make_tiny_config()
    streaming = dataclasses.replace(config, data=DataConfig(name="digits", pipeline="streaming"))
    trainer = Trainer(config)
    gathering = jax.jit(functools.partial(resident.gather, image_shape=trainer.info.image_shape))
    count = 0
    for one, other in zip(Trainer(streaming).inputs(3, 0), trainer.inputs(3, 0), strict=True):
        first = jax.tree.map(lambda rows: rows[0], other.inputs)
        assert_trees_equal(one.inputs, gathering(trainer.arrays.images, trainer.arrays.labels, first))
        count += 1
    assert count == trainer.total_steps > 30


@pytest.mark.parametrize(("name", "dtype"), PARITY)
def test_loss_and_gradient_equal_those_of_the_cpu(accelerator, name, dtype, optimizations):
    """Compare float32 at the highest precision, and bfloat16 at the default one, with float32 on the CPU.

    In a rehearsal, ResNet-18 is compiled without XLA's optimizations, which take long.
    """
    optimizations(name != "resnet18" or not REHEARSAL)
    state, (expected_loss, expected) = on_cpu(name)
    platform = "cuda" if REHEARSAL else None  # a rehearsal compares the two implementations of the layers
    task, _ = build(name, accelerator[:1], dtype=dtype, platform=platform)
    precision = "highest" if dtype == "float32" else None
    loss, gradient = loss_and_gradient(task, task.layout.replicate(state), precision)
    assert loss == pytest.approx(expected_loss, rel=PARITY[name, dtype][0])
    assert np.linalg.norm(gradient - expected) < PARITY[name, dtype][1] * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("backend", "several"),
    [("shard_map", False), ("pmap", False), ("jit", True), ("shard_map", True), ("pmap", True)],
)
def test_results_do_not_depend_on_the_layout(accelerator, backend, several):
    count = 1 << (len(accelerator).bit_length() - 1) if several else 1  # a power of 2, which divides the batch
    if several and count == 1:
        pytest.skip("needs several devices")
    losses, params, bits = three_steps(backend, count)
    expected_losses, expected_params, expected_bits = three_steps("jit", 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE), params, expected_params)
    assert_trees_equal(bits, expected_bits)


@pytest.mark.parametrize("on_device", [False, True])
def test_evaluation_counts_each_example_once_and_equals_numpy(accelerator, on_device):
    """The batches of 64 do not divide the 250 images."""
    task, state = build("cnn", accelerator[:1])
    (everything,) = evaluation_indices(all_examples(IMAGES), SIZE)
    weights, whole = (state.params, state.batch_stats), gather(IMAGES.images, IMAGES.labels, everything)
    logits = call(task, lambda weights, batch: steps._logits(task, weights, batch.image, "none"), weights, whole)
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    arrays = resident.put(IMAGES, task.layout) if on_device else IMAGES
    with jax.default_matmul_precision("highest"):
        evaluation = Evaluator(task, arrays, all_examples(IMAGES), BATCH)(state)
    summary, rows = evaluation.summary, np.arange(SIZE)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (IMAGES.labels, logits.argmax(axis=1)), 1)
    assert summary["num_examples"] == SIZE
    np.testing.assert_array_equal(np.sum(summary["confusion_matrix"], axis=1), np.bincount(IMAGES.labels))
    assert_same_counts(summary["confusion_matrix"], confusion)
    assert summary["accuracy"] == np.trace(summary["confusion_matrix"]) / SIZE
    assert summary["loss"] == pytest.approx(-np.log(expected[rows, IMAGES.labels]).mean(), rel=CLOSE)
    own = np.take_along_axis(logits, IMAGES.labels[:, None].astype(int), axis=1)
    assert summary["top5_accuracy"] == pytest.approx(np.mean((logits > own).sum(axis=1) < 5), abs=1.01 / SIZE)
    np.testing.assert_allclose(evaluation.probabilities, expected, rtol=0, atol=CLOSE)


def test_exported_program_and_predict_mode_agree(trained, tmp_path):
    """Both compute in the default precision, such as TensorFloat-32."""
    folder, _ = trained("cnn")
    config = saved_config(folder)
    images = sources.load(config.data, "test").images[:40]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    predict.predict(config, folder, [tmp_path], tmp_path / "found.json")
    predictions = json.loads((tmp_path / "found.json").read_text())["predictions"]
    found = np.array([list(one["probabilities"].values()) for one in predictions])
    exported = jax.export.deserialize(bytearray(program.stablehlo(restore(config, folder))))
    expected = np.asarray(jax.jit(exported.call)(images))
    assert_same_classes(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_export_passes_its_own_check_in_another_process(trained, tmp_path, capsys):
    folder, _ = trained("cnn")
    export.export(saved_config(folder), folder, tmp_path / "exported")
    assert "same classes as evaluation" in capsys.readouterr().out
