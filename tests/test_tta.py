"""Test test-time augmentation (TTA): the average over TTA views, and the choice of images by confidence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_counts, make_tiny_config, widest_gap
from flax import nnx

from cifar_flax.data import resident, sources
from cifar_flax.data.augment import VIEWS, normalize, views
from cifar_flax.data.batches import Batch
from cifar_flax.errors import ConfigError
from cifar_flax.training import evaluator as evaluator_module
from cifar_flax.training import metrics, steps
from cifar_flax.training.evaluator import Evaluator, all_examples
from cifar_flax.training.trainer import Trainer

TEST = sources.load(make_tiny_config().data, "test")
COUNT = len(TEST.labels)


@pytest.fixture(scope="module")
def trained():
    """Return a task and a state after 12 steps, with high confidence in some of the images."""
    trainer = Trainer(make_tiny_config())
    state, inputs = trainer.initial_state, trainer.inputs(0, 0)
    step = trainer.compile(state)
    for _ in range(12):
        state, _ = step(state, next(inputs))
    return trainer.task, state


def plain_logits(trained, images):
    """Return the logits without test-time augmentation."""
    task, state = trained
    model = nnx.merge(task.graphdef, state.params, state.batch_stats)
    return np.asarray(jax.jit(lambda x: model(normalize(x, task.mean, task.std)))(jnp.asarray(images)))


def augmented_logits(trained, tta):
    return sum(
        weight * plain_logits(trained, view)
        for weight, view in zip(VIEWS[tta], np.asarray(views(jnp.asarray(TEST.images), tta)), strict=True)
    )


def summary_of(logits):
    sums = metrics.evaluation_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(TEST.labels), jnp.ones(COUNT, bool))
    return metrics.summarize(metrics.add(None, jax.device_get(sums)), TEST.class_names)


def evaluator(trained, **settings):
    return Evaluator(trained[0], TEST, all_examples(TEST), **{"batch_size": 100} | settings)


@pytest.mark.parametrize("tta", VIEWS)
def test_logits_are_weighted_means_over_views(trained, tta):
    result, expected = evaluator(trained, tta=tta)(trained[1]).summary, summary_of(augmented_logits(trained, tta))
    assert_same_counts(result["confusion_matrix"], expected["confusion_matrix"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def confidence(trained):
    return np.asarray(jax.nn.softmax(plain_logits(trained, TEST.images))).max(axis=1)


@pytest.mark.parametrize("batch_size", [1, 64, 355])
def test_only_images_below_the_confidence_are_augmented(trained, confidence, batch_size):
    below = widest_gap(confidence)
    plain, augmented = plain_logits(trained, TEST.images), augmented_logits(trained, "mirror_translate")
    expected = summary_of(np.where((confidence < below)[:, None], augmented, plain))
    result = evaluator(trained, tta="mirror_translate", tta_below=below, batch_size=batch_size)(trained[1]).summary
    assert result["num_examples"] == COUNT
    assert_same_counts(result["confusion_matrix"], expected["confusion_matrix"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert len({result["loss"], summary_of(plain)["loss"], summary_of(augmented)["loss"]}) == 3


@pytest.mark.parametrize(("below", "like", "unlike"), [(1e-3, "none", "mirror"), (1.0, "mirror", "none")])
def test_all_or_no_images_may_be_augmented(trained, below, like, unlike):
    result = evaluator(trained, tta="mirror", tta_below=below)(trained[1]).summary
    expected, other = (evaluator(trained, tta=tta)(trained[1]).summary for tta in (like, unlike))
    assert_same_counts(result["confusion_matrix"], expected["confusion_matrix"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["loss"] != pytest.approx(other["loss"], rel=1e-4)


def test_views_are_computed_only_below_the_confidence(trained, confidence, monkeypatch):
    """The second pass over the split has only the images below the confidence."""
    passes, positions_of = [], evaluator_module.evaluation_indices

    def recorded(examples, batch_size):
        passes.append(examples.tolist())
        return positions_of(examples, batch_size)

    below = widest_gap(confidence)
    partly = evaluator(trained, tta="mirror", tta_below=below)
    partly.compile(trained[1])
    monkeypatch.setattr(evaluator_module, "evaluation_indices", recorded)
    partly(trained[1])
    assert passes == [list(range(COUNT)), np.flatnonzero(confidence < below).tolist()]
    assert 0 < len(passes[1]) < COUNT


def test_a_split_on_the_device_gets_equal_results_without_transfers(trained, confidence):
    task, state = trained
    below = widest_gap(confidence)
    expected = evaluator(trained, tta="mirror", tta_below=below)(state).probabilities
    on_device = Evaluator(task, resident.put(TEST, task.layout), all_examples(TEST), 100, tta="mirror", tta_below=below)
    on_device.compile(state)
    with jax.transfer_guard_host_to_device("disallow"):  # allows device_put, which transfers positions
        result = on_device(state).probabilities
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_padding_is_not_counted(trained):
    task, state = trained
    index = np.zeros(4, np.int32)
    batch = Batch(TEST.images[:4], TEST.labels[:4], index, index, np.array([True, False, True, False]))
    for at_least, counted in (
        (0.0, [True, False, True, False]),
        (1e-3, [True, False, True, False]),
        (1.0, [False] * 4),
    ):
        step = jax.jit(functools.partial(steps.eval_step, task, at_least=at_least))
        assert step((state.params, state.batch_stats), batch)[2].tolist() == counted


@pytest.mark.parametrize(
    ("fields", "field", "keyword"),
    [
        ({"tta_below": 0.5}, "eval.tta_below=0.5", "eval.tta"),
        ({"tta": "mirror", "tta_below": 1.5}, "eval.tta_below=1.5", "1"),
    ],
)
def test_inconsistent_settings_are_refused(fields, field, keyword):
    config = make_tiny_config()
    config.eval = dataclasses.replace(config.eval, **fields)
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value).startswith(f"{field}: ")
    assert keyword in str(caught.value).partition(": ")[2]
