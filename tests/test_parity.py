"""Compare training steps with PyTorch, from the same weights and images.

The reference is `fixtures/pytorch_step.npz`, which `fixtures/pytorch_step.py` writes with PyTorch in float64.
"""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from conftest import REPOSITORY
from flax import nnx

from cifar_flax.config import from_dict
from cifar_flax.data.augment import normalize
from cifar_flax.data.batches import Batch
from cifar_flax.data.info import DatasetInfo
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

with np.load(REPOSITORY / "tests" / "fixtures" / "pytorch_step.npz", allow_pickle=False) as file:
    FIXTURE = dict(file)
SETTINGS = json.loads(str(FIXTURE["settings"]))
CASES = [(name, optimizer) for name, network in SETTINGS["networks"].items() for optimizer in network["optimizers"]]
# Largest allowed difference, as a fraction of a tensor's largest element. Rounding to float32 causes up to 2e-5 (with
# SSE, AVX2 and AVX-512; Winograd's algorithm included). In the CNN, another momentum, epsilon or weight decay causes
# over 1e-3.
TOLERANCE = 1e-4

# Flax layer -> its index in PyTorch's `nn.Sequential`. A block of airbench is convolution, max-pool, BatchNorm, GELU,
# convolution, BatchNorm, GELU.
LAYERS = {
    "cnn": {"conv": 0, "norm": 3, "hidden": 6, "head": 9},
    "airbench": {"whitening": 0, "head": 25}
    | {f"blocks/{block}/convs/{i}": 2 + 7 * block + (0, 4)[i] for block in range(3) for i in range(2)}
    | {f"blocks/{block}/norms/{i}/norm": 2 + 7 * block + (2, 5)[i] for block in range(3) for i in range(2)},
}
VARIABLES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def read(network, prefix, like):
    """Return the fixture's arrays under `prefix` as a tree with the structure and the array layout of `like`.

    Kernels are [height, width, in, out] and [in, out] in Flax, [out, in, height, width] and [out, in] in PyTorch.
    """

    def leaf(path, ours):
        layer, _, variable = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        array = FIXTURE[f"{network}/{prefix}/{LAYERS[network][layer]}.{VARIABLES[variable]}"]
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif layer == "hidden" and array.ndim == 2:  # of flattened images: channels are last in Flax, first in PyTorch
            channels = SETTINGS["networks"][network]["model"]["width"]
            side = round((array.shape[1] / channels) ** 0.5)
            array = array.reshape(-1, channels, side, side).transpose(2, 3, 1, 0).reshape(-1, len(array))
        elif array.ndim == 2:
            array = array.T
        assert array.shape == ours.shape
        return array

    return jax.tree.map_with_path(leaf, like)


def make(network, optimizer):
    """Return the task and the state that `setup` builds for the fixture's settings, with the fixture's weights."""
    settings = SETTINGS["networks"][network]
    config = from_dict(
        {
            "model": {"name": network} | settings["model"],
            "optim": {"name": optimizer} | settings["optimizers"][optimizer],
            "train": {"batch_size": settings["batch_size"], "label_smoothing": SETTINGS["label_smoothing"]},
        }
    )
    info = DatasetInfo(
        name="fixture",
        image_shape=(settings["image_size"], settings["image_size"], 3),
        class_names=tuple("0123456789"),
        num_examples=1000,
        mean=tuple(SETTINGS["mean"]),
        std=tuple(SETTINGS["std"]),
    )
    task, init = setup(config, info)
    state = init(0, None)
    params, batch_stats = jax.device_put([read(network, "initial", tree) for tree in (state.params, state.batch_stats)])
    return task, state._replace(params=params, batch_stats=batch_stats)


def batches(network):
    for images, labels in zip(FIXTURE[f"{network}/images"], FIXTURE[f"{network}/labels"], strict=True):
        index = np.arange(len(labels), dtype=np.int32)
        yield jax.device_put(Batch(images, labels, index, np.zeros_like(index), np.ones(len(labels), bool)))


def assert_close(ours, theirs):
    """Assert that tensors agree within `TOLERANCE`: the order of float32 summation depends on the CPU."""

    def compare(path, one, other):
        error = np.max(np.abs(np.asarray(one) - other)) / np.max(np.abs(other))
        assert error <= TOLERANCE, f"{jax.tree_util.keystr(path)} differs by {error:.1e} of its largest element"

    jax.tree.map_with_path(compare, ours, theirs)


@pytest.fixture(autouse=True)
def optimized_programs():
    """Compile as training does: conftest.py disables most of XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_logits_equal_pytorch():
    task, state = make("cnn", "sgd")
    batch = next(batches("cnn"))

    def forward(params, batch_stats):
        model = nnx.merge(task.graphdef, params, batch_stats)
        keys = steps.example_keys(state.seed, batch.epoch, batch.index)  # keys select training mode
        return model(normalize(batch.image, task.mean, task.std), keys)

    assert_close(jax.jit(forward)(state.params, state.batch_stats), FIXTURE["cnn/logits"])


@pytest.mark.parametrize(("network", "optimizer"), CASES)
def test_two_steps_equal_pytorch(network, optimizer, monkeypatch):
    """Compare losses, accuracies, gradients, parameters, running statistics, and the probabilities after two steps."""
    task, state = make(network, optimizer)
    first, second = batches(network)
    # This transformation returns the gradients unchanged and keeps them as its state.
    keep = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, grads))
    ours = steps.Task.optimizer.fget
    monkeypatch.setattr(steps.Task, "optimizer", property(lambda task: optax.chain(keep, ours(task))))
    state = state._replace(opt_state=task.optimizer.init(state.params))
    step = task.layout.compile(functools.partial(steps.train_step, task), state, first)

    state, values = step(state, first)
    assert_close(state.opt_state[0], read(network, "gradients", state.params))
    state, more_values = step(state, second)
    for name in ("loss", "accuracy"):
        ours = np.stack([values[name], more_values[name]])
        np.testing.assert_allclose(ours, FIXTURE[f"{network}/{optimizer}/{name}"], rtol=TOLERANCE)
    for tree in (state.params, state.batch_stats):
        assert_close(tree, read(network, f"{optimizer}/final", tree))
    predict_step = jax.jit(functools.partial(steps.predict_step, task))
    probabilities = predict_step((state.params, state.batch_stats), first.image)
    assert_close(probabilities, FIXTURE[f"{network}/{optimizer}/probabilities"])
