"""Test balanced sampling and class weights: frequencies, purity, resuming, the weighted loss, and their effect."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import final_state
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from orders import indices
from sklearn.utils.class_weight import compute_class_weight
from stops import stop_at, stopped

from cifar_flax.config import Config, TrainConfig
from cifar_flax.data import datasets, order
from cifar_flax.data.augment import Examples, normalize
from cifar_flax.data.batches import Indices, gather
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import UserError
from cifar_flax.models import CNNConfig
from cifar_flax.modes.train import train
from cifar_flax.training import loop, steps
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def splits(draw):
    """Draw the positions of the examples of a split, their classes, of which some may be empty, and a batch size."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
    classes = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    classes = np.random.default_rng(draw(st.integers(0, 99))).permutation(classes)
    return np.arange(5, 5 + 3 * len(classes), 3, dtype=np.int32), classes, draw(st.integers(1, len(classes)))


def pairs(index, epoch):
    return list(zip(index.ravel().tolist(), epoch.ravel().tolist(), strict=True))


@given(splits(), SEEDS)
def test_classes_are_equally_frequent_and_examples_of_a_class_too(split, seed):
    examples, classes, _ = split
    size, label = len(examples), dict(zip(examples.tolist(), classes.tolist(), strict=True))
    index, visit = indices(seed, examples, 1, 0, 3 * size, classes=classes)
    for e in range(3):
        drawn = [label[i] for i in index[e * size : (e + 1) * size, 0].tolist()]
        counts = [drawn.count(c) for c in set(label.values())]
        assert max(counts) - min(counts) <= 1
    assert len(set(pairs(index, visit))) == 3 * size
    for c in set(label.values()):
        times = [visit[index == i] for i in examples[classes == c]]
        assert max(map(len, times)) - min(map(len, times)) <= 1
        for own in times:
            assert sorted(own.tolist()) == list(range(len(own)))


@given(splits(), SEEDS, st.booleans(), st.data())
def test_a_row_depends_only_on_seed_and_position(split, seed, drop_last, data):
    examples, classes, batch_size = split
    stop = order.total_steps(4, len(examples), batch_size, drop_last)
    whole = indices(seed, examples, batch_size, 0, stop, drop_last, classes)
    assert len(set(pairs(*whole))) == whole[0].size
    first = data.draw(st.integers(0, stop))
    last = data.draw(st.integers(first, stop))
    part = indices(seed, examples, batch_size, first, last, drop_last, classes)
    for full, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(full[first:last], some)


def test_seeds_classes_and_repetitions_have_their_own_orders():
    examples, classes = np.arange(60, dtype=np.int32), np.repeat([0, 1, 2], 20)
    orders = set()
    for seed in range(3):
        index, visit = (row.ravel() for row in indices(seed, examples, 60, 0, 3, classes=classes))
        orders |= {tuple(index[(index // 20 == c) & (visit == v)] % 20) for c in range(3) for v in range(3)}
    assert len(orders) == 27


def test_drop_last_keeps_the_length_of_an_epoch_and_the_balance():
    classes = np.repeat([0, 1], [90, 13])
    examples = np.arange(103, dtype=np.int32)
    index, _ = indices(3, examples, 20, 0, 500, True, classes)  # 100 epochs, each without 3 of 103 draws
    assert np.mean(index >= 90) == pytest.approx(0.5, abs=0.02)


def test_balanced_order_is_pinned():
    """A run may be resumed with another version of NumPy; computed with NumPy 2.4."""
    classes = (np.arange(5000) ** 2 // 7 % 13).astype(np.int32)
    index, epoch = indices(7, np.arange(5000, dtype=np.int32), 256, 15, 45, False, classes)
    assert (
        hashlib.sha256(index.astype("<i4").tobytes() + epoch.astype("<i4").tobytes()).hexdigest()[:16]
        == "7daacb80e0116967"
    )


@pytest.mark.slow
def test_a_stopped_run_resumes_bitwise(tiny_config, tmp_path, monkeypatch):
    tiny_config.data.sampling = "balanced"
    expected = trained(Trainer(tiny_config))
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 13)
        stopped(tiny_config, tmp_path / "run")
    train(tiny_config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_state(tiny_config, tmp_path / "run"), expected)


# Class c of the made-up dataset has a brightness of 110 + 50 c with a standard deviation of 25, so that the best
# balanced accuracy is 84 %. The classifier with the best accuracy, at frequencies of 75 to 1, reaches 56 %.
SIZES = (1500, 20, 0)

MODEL = CNNConfig(width=4, hidden=16, conv_dropout=0.0, hidden_dropout=0.0)


def read_made_up(split, data_dir):
    rng = np.random.default_rng(split == "test")
    labels = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), SIZES if split == "train" else (200, 200, 0)))
    images = (110 + 50 * labels + rng.normal(0, 25, len(labels)))[:, None, None, None] + rng.normal(0, 5, (1, 8, 8, 1))
    return Arrays(np.clip(images, 0, 255).astype(np.uint8), labels, ("often", "seldom", "never"), "made_up")


@pytest.fixture
def trainer(monkeypatch):
    """Return a function that builds the `Trainer` of the made-up dataset with other settings."""
    monkeypatch.setitem(datasets.DATASETS, "made_up", datasets.Dataset(read=read_made_up))

    def build(sampling="shuffled", class_weights="none", **data):
        return Trainer(
            Config(
                data=DataConfig(name="made_up", pipeline="resident", sampling=sampling, **data),
                model=MODEL,
                optim=OptimConfig(name="adam", learning_rate=0.01),
                train=TrainConfig(batch_size=152, epochs=60, class_weights=class_weights, steps_per_call=600),
            )
        )

    return build


def trained(trainer):
    """Return the final state of an uninterrupted run."""
    state, calls = trainer.initial_state, trainer.compile(trainer.initial_state)
    for call in trainer.inputs(trainer.config.seed, 0):
        state, _ = calls(state, call)
    return state


def balanced_accuracy(trainer):
    """Train, and return the balanced accuracy on the test split."""
    return trainer.evaluator(trained(trainer)).summary["balanced_accuracy"]


@pytest.mark.slow
def test_both_corrections_raise_the_balanced_accuracy(trainer):
    plain = balanced_accuracy(trainer())
    for settings in ({"sampling": "balanced"}, {"class_weights": "balanced"}):
        assert balanced_accuracy(trainer(**settings)) > plain + 0.1


def test_balanced_sampling_does_not_show_the_validation_split(trainer):
    built = trainer(sampling="balanced", validation_fraction=0.25)
    labels = read_made_up("train", "").labels
    assert built.info.class_counts == tuple(np.bincount(labels[built.examples], minlength=3))
    rows = [call.inputs for call in built.inputs(0, 0)]
    shown = np.concatenate([np.asarray(row.index)[np.asarray(row.mask)] for row in rows])
    assert set(shown.tolist()) <= set(built.examples.tolist())
    assert np.bincount(labels[shown]).tolist() == [len(shown) / 2] * 2


def test_class_weights_equal_those_of_scikit_learn(trainer):
    labels, task = read_made_up("train", "").labels, trainer(class_weights="balanced").task
    expected = compute_class_weight("balanced", classes=np.arange(2), y=labels)
    np.testing.assert_allclose(task.class_weights, [*expected, 0])
    assert trainer().task.class_weights == ()


@pytest.mark.parametrize("mixed", [False, True])
def test_the_weighted_loss_equals_its_definition(monkeypatch, mixed):
    """With label smoothing; also if an augmentation mixes each image, and its target, with the next one."""
    rng, weights = np.random.default_rng(0), np.array([0.5, 0.0, 4.0], np.float32)
    images, labels = rng.integers(0, 256, (16, 8, 8, 1), np.uint8), rng.integers(0, 3, 16).astype(np.int32)
    arrays = Arrays(images, labels, ("a", "b", "c"), "noise")
    config = Config(model=MODEL, train=TrainConfig(batch_size=16, label_smoothing=0.3))
    task, init = setup(config, DatasetInfo.of(arrays, np.arange(16, dtype=np.int32), "standard"))
    task, state = dataclasses.replace(task, class_weights=tuple(weights.tolist())), init(0, None)

    def augment(examples, context, mean, std):
        parts = normalize(examples.image, mean, std), examples.target
        return Examples(*((part + context.next_row(part)) / 2 if mixed else part for part in parts))

    monkeypatch.setattr(steps, "augment", augment)
    batch = gather(images, labels, Indices(np.arange(16, dtype=np.int32), np.zeros(16, np.int32), np.ones(16, bool)))
    _, values = jax.jit(functools.partial(steps.train_step, task))(state, jax.device_put(batch))

    image = normalize(jnp.asarray(images), task.mean, task.std)
    image = (image + jnp.roll(image, -1, axis=0)) / 2 if mixed else image
    keys = steps.example_keys(state.seed, jnp.asarray(batch.epoch), jnp.asarray(batch.index))
    logits = nnx.merge(task.graphdef, state.params, state.batch_stats)(image, keys)
    negative = -np.asarray(jax.nn.log_softmax(logits))

    def loss(labels):
        smoothed = 0.7 * negative[np.arange(16), labels] + 0.3 * negative.mean(axis=1)
        return float(np.mean(weights[labels] * smoothed))

    expected = (loss(labels) + loss(np.roll(labels, -1))) / 2 if mixed else loss(labels)
    assert float(values["loss"]) == pytest.approx(expected, rel=1e-5)


def test_checkpoints_of_other_class_counts_are_refused(trainer):
    """Checkpoints of earlier releases, which record no class counts, are accepted."""
    built = trainer()
    saved = built.info.to_dict()
    built.require_same_data(saved)
    with pytest.raises(UserError, match=r"class_counts.*--workdir"):
        built.require_same_data(saved | {"class_counts": [1500, 19, 1]})
    del saved["class_counts"]
    built.require_same_data(saved)
