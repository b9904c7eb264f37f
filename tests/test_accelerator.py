"""Tests on a GPU or TPU: `python -m pytest -m accelerator`. With REHEARSE=1, they run on a CPU.

They compare the accelerator with itself, with the CPU of the same machine, and with NumPy. Unless a test names another
tolerance, products are in float32 precision and results agree to `CLOSE`. Random bits, bytes and counts are equal.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY, assert_same_classes, assert_same_counts, make_tiny_config, read_metrics
from PIL import Image
from stops import saved, stop_at

from cifar_flax.arguments import parse
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.config import Config, DataConfig, TrainConfig
from cifar_flax.data import resident, sources
from cifar_flax.data.augment import AugmentConfig, Context, Examples, cutout, flip_and_crop
from cifar_flax.data.batches import Indices, evaluation_indices, gather
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.export import program
from cifar_flax.models import AirbenchConfig, CNNConfig, ResNetConfig
from cifar_flax.models.layers import dropout
from cifar_flax.modes import export, predict
from cifar_flax.restore import restore, saved_config
from cifar_flax.runtime import compilation, signals
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training import loop, steps
from cifar_flax.training.evaluator import Evaluator, all_examples
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer

pytestmark = pytest.mark.accelerator

REHEARSAL = os.environ.get("REHEARSE") == "1"
CLOSE = 1e-5
# Largest difference between accelerator and CPU: of the loss, and of the gradient relative to its norm.
PARITY = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.1)}
MEMORY = 3 * 2**30  # bytes for a step of configs/airbench94.py, and for a 30 times smaller one in a rehearsal
REHEARSED_MEMORY = MEMORY // 30

BATCH, SIZE = 64, 250
NETWORKS = {
    "cnn": CNNConfig(width=8, hidden=32),
    "airbench": AirbenchConfig(widths=(8, 16, 16)),
    "resnet18": ResNetConfig(width=8),
}


@pytest.fixture(scope="module", autouse=True)
def accelerator(compile_once, request):
    """Return the devices. Compile as users do, and never load a program: a repeated run compiles its own."""
    if jax.default_backend() == "cpu" and not REHEARSAL:
        pytest.skip("JAX finds no GPU or TPU. REHEARSE=1 runs these tests on the CPU")
    few = not request.config.getoption("--default-optimizations")
    jax.config.update("jax_disable_most_optimizations", few and REHEARSAL)
    with compilation.cache_writes_disabled():
        yield jax.devices()
    jax.config.update("jax_disable_most_optimizations", few)


@pytest.fixture(autouse=True)
def name_the_device(accelerator, record_property):
    """Let `pytest_terminal_summary` print on which devices the tests ran."""
    record_property("devices", f"{len(accelerator)} x {accelerator[0].device_kind} ({accelerator[0].platform})")


def make_images():
    """Return random images of CIFAR-10's shape, brighter in higher classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, SIZE).astype(np.int32)
    images = rng.integers(0, 160, (SIZE, 32, 32, 3)) + 9 * labels[:, None, None, None]
    return Arrays(images.astype(np.uint8), labels, tuple("0123456789"), "noise")


IMAGES = make_images()
INFO = DatasetInfo.of(IMAGES, all_examples(IMAGES), "standard")


def build(name, devices, *, dtype="float32", platform=None, **parallel):
    """Return the task and the initial state of a network with all augmentations and, in the CNN, dropout."""
    config = Config(
        deterministic=True,
        augment=AugmentConfig(flip="alternating", crop_padding=2, cutout=4),
        model=dataclasses.replace(NETWORKS[name], dtype=dtype),
        optim=OptimConfig(name="sgd", learning_rate=1e-3, momentum=0.9),
        train=TrainConfig(batch_size=BATCH, epochs=2),
        parallel=ParallelConfig(**parallel),
    )
    task, init = setup(config, INFO, devices, platform=platform)
    return task, init(0, IMAGES.images)


def batch_of(number):
    index = np.arange(BATCH * number, BATCH * (number + 1), dtype=np.int32) % SIZE
    epoch = (np.arange(BATCH, dtype=np.int32) + number) % 3
    return gather(IMAGES.images, IMAGES.labels, Indices(index, epoch, index >= 0))


def call(task, step, state, inputs, precision="highest"):
    """Compile `step` with the task's layout and run it; `inputs` are on the host."""
    inputs = task.layout.shard_batch(inputs)
    with jax.default_matmul_precision(precision):
        return jax.device_get(task.layout.compile(step, state, inputs)(state, inputs))


def random_bits(task, state, batch):
    """Return the results of random bits in a step: the augmented bytes, the squares of cutout, and a dropout mask."""
    keys, dropout_keys = steps._keys(state, batch, batch.epoch)
    first_epoch_keys, _ = steps._keys(state, batch, jnp.zeros_like(batch.epoch))
    context = Context(
        config=task.augment, epoch=batch.epoch, epoch_keys=keys, first_epoch_keys=first_epoch_keys,
        next_row=functools.partial(steps.next_row, task),
    )  # fmt: skip
    target = jax.nn.one_hot(batch.label, task.num_classes)
    moved = flip_and_crop(Examples(batch.image, target), context).image
    squares = cutout(Examples(jnp.ones(batch.image.shape), target), context).image
    kept = dropout(jnp.ones((len(batch.label), 1000)), dropout_keys, 0.3)
    return [steps.all_gather(task, array.astype(jnp.int32)) for array in (moved, squares, kept > 0)]


def assert_trees_equal(*trees):
    jax.tree.map(np.testing.assert_array_equal, *trees)


# First in the file, since the peak is that of the whole process.
def test_memory_of_a_step_is_bounded(accelerator):
    config = parse(
        ["--config", str(REPOSITORY / "configs" / "airbench94.py"), "--config.train.steps_per_call=1"]
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


def make_run_config(name):
    """Return a config of 20 deterministic steps on digits: the CNN with Adam, or airbench with Muon."""
    config = make_tiny_config()
    config.deterministic, config.data.drop_last, config.model = True, True, NETWORKS[name]
    config.train = TrainConfig(batch_size=144, epochs=2, log_every=1)
    config.optim = OptimConfig(name="adam", learning_rate=3e-3)
    if name == "airbench":
        config.train = dataclasses.replace(config.train, log_every=2, steps_per_call=2)
        config.optim = OptimConfig(name="muon", learning_rate=0.1, momentum=0.6)
    return config


def run(config, folder):
    """Train and return the state of the newest checkpoint, even if a signal stops the run."""
    trainer = Trainer(config)
    with contextlib.suppress(signals.Stopped), signals.signals_raise_stopped():
        loop.run(trainer, folder)
    with Checkpoints(folder / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore(checkpoints.newest_step(), trainer.initial_state))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a network once, without an interruption, and returns its workdir and state."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp("trained")
        return folder, run(make_run_config(name), folder)

    return get


@pytest.mark.parametrize("name", ["cnn", "airbench"])
def test_an_interrupted_run_and_its_repetition_equal_an_uninterrupted_run(trained, name, tmp_path, monkeypatch):
    """Every run compiles its own programs, as separate processes do."""
    folder, expected = trained(name)
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 4)
        stopped = run(make_run_config(name), tmp_path)
    assert [stopped.step] == saved(tmp_path)
    assert 4 <= stopped.step < 10  # in the middle of the first epoch
    state = run(make_run_config(name), tmp_path)
    assert (expected.step, state.step) == (20, 20)
    # The lines before the signal are those of a repeated run, the others those of a resumed run.
    losses, repeated = ([(line["step"], line["loss"]) for line in read_metrics(path)] for path in (folder, tmp_path))
    assert repeated[: stopped.step // 2] == losses[: stopped.step // 2]
    assert repeated == losses
    assert_trees_equal(state, expected)


def test_augmented_bytes_and_random_bits_equal_those_of_the_cpu(accelerator):
    found, expected = (call(*bits_of("cnn", devices)) for devices in (accelerator[:1], jax.devices("cpu")[:1]))
    assert_trees_equal(found, expected)
    moved, squares, kept = found
    assert np.mean(moved == batch_of(1).image) < 0.2
    assert (squares == 0).sum() == BATCH * 4 * 4 * 3
    assert 0.65 < kept.mean() < 0.75


def bits_of(name, devices, **parallel):
    """Return the arguments of `call` for the random bits of a batch."""
    task, state = build(name, devices, **parallel)
    return task, functools.partial(random_bits, task), state, batch_of(1)


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
def test_streaming_and_resident_pipelines_yield_the_same_bytes():
    config = make_tiny_config()
    streaming = dataclasses.replace(config, data=DataConfig(name="digits", pipeline="streaming"))
    gathering, trainer = jax.jit(gather), Trainer(config)
    count = 0
    for batch, indices in zip(Trainer(streaming).inputs(3, 0), trainer.inputs(3, 0), strict=True):
        first = jax.tree.map(lambda rows: rows[0], indices)
        assert_trees_equal(batch, gathering(trainer.arrays.images, trainer.arrays.labels, first))
        count += 1
    assert count == trainer.total_steps > 30


def loss_and_gradient(task, state, precision):
    """Return the loss of a training step and its gradient, as one vector."""
    task = dataclasses.replace(task, optimizer=optax.trace(decay=0.0))  # keeps the gradient in its state
    state = state._replace(opt_state=task.optimizer.init(state.params))
    state, values = call(task, functools.partial(steps.train_step, task), state, batch_of(0), precision)
    return float(values["loss"]), np.concatenate([x.ravel() for x in jax.tree.leaves(state.opt_state)])


@functools.cache
def on_cpu(name):
    """Return the initial state, on the host, and the loss and gradient on the CPU, in float32."""
    task, state = build(name, jax.devices("cpu")[:1])
    return jax.device_get(state), loss_and_gradient(task, state, "highest")


@pytest.mark.parametrize("dtype", PARITY)
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradient_equal_those_of_the_cpu(accelerator, name, dtype):
    """Compare float32 at the highest precision, and bfloat16 at the default one, with float32 on the CPU."""
    state, (expected_loss, expected) = on_cpu(name)
    platform = "cuda" if REHEARSAL else None  # a rehearsal compares the two implementations of the layers
    task, _ = build(name, accelerator[:1], dtype=dtype, platform=platform)
    precision = "highest" if dtype == "float32" else None
    loss, gradient = loss_and_gradient(task, task.layout.replicate(state), precision)
    assert loss == pytest.approx(expected_loss, rel=PARITY[dtype][0])
    assert np.linalg.norm(gradient - expected) < PARITY[dtype][1] * np.linalg.norm(expected)


@functools.cache
def three_steps(backend, count):
    """Return the losses, the parameters and the random bits on `count` devices."""
    devices = jax.devices()[:count]
    bits = call(*bits_of("cnn", devices, backend=backend))
    task, state = build("cnn", devices, backend=backend)
    inputs = task.layout.shard_batch(batch_of(0))
    with jax.default_matmul_precision("highest"):
        step = task.layout.compile(functools.partial(steps.train_step, task), state, inputs, donate=True)
    losses = []
    for number in range(3):
        state, values = step(state, task.layout.shard_batch(batch_of(number)))
        losses.append(float(values["loss"]))
    return losses, jax.device_get(state.params), bits


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
