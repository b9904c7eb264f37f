"""Test-time augmentation: what is averaged, and of which images."""

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
    """A task and a state after some steps, which is sure of some images only."""
    trainer = Trainer(make_tiny_config())
    state, inputs = trainer.initial_state, trainer.inputs(0, 0)
    step = trainer.compile(state)
    for _ in range(12):
        state, _ = step(state, next(inputs))
    return trainer.task, state


def plain_logits(trained, images):
    """Written out: one view after the other."""
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
def test_logits_are_weighted_means_over_the_views(trained, tta):
    found, expected = evaluator(trained, tta=tta)(trained[1]).summary, summary_of(augmented_logits(trained, tta))
    assert_same_counts(found["confusion_matrix"], expected["confusion_matrix"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def confidence(trained):
    return np.asarray(jax.nn.softmax(plain_logits(trained, TEST.images))).max(axis=1)


@pytest.mark.parametrize("batch_size", [1, 64, 355])
def test_only_images_of_which_the_network_is_unsure_get_more_views(trained, confidence, batch_size):
    below = widest_gap(confidence)
    plain, augmented = plain_logits(trained, TEST.images), augmented_logits(trained, "mirror_translate")
    expected = summary_of(np.where((confidence < below)[:, None], augmented, plain))
    found = evaluator(trained, tta="mirror_translate", tta_below=below, batch_size=batch_size)(trained[1]).summary
    assert found["num_examples"] == COUNT
    assert_same_counts(found["confusion_matrix"], expected["confusion_matrix"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert len({found["loss"], summary_of(plain)["loss"], summary_of(augmented)["loss"]}) == 3


@pytest.mark.parametrize(("below", "like", "unlike"), [(1e-3, "none", "mirror"), (1.0, "mirror", "none")])
def test_all_and_none_may_be_unsure(trained, below, like, unlike):
    found = evaluator(trained, tta="mirror", tta_below=below)(trained[1]).summary
    expected, other = (evaluator(trained, tta=tta)(trained[1]).summary for tta in (like, unlike))
    assert_same_counts(found["confusion_matrix"], expected["confusion_matrix"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["loss"] != pytest.approx(other["loss"], rel=1e-4)


def test_views_are_computed_for_the_unsure_alone(trained, confidence, monkeypatch):
    """What the option is for: the second pass takes no others."""
    passes, positions_of = [], evaluator_module.evaluation_indices

    def watched(examples, batch_size):
        passes.append(examples.tolist())
        return positions_of(examples, batch_size)

    below = widest_gap(confidence)
    partly = evaluator(trained, tta="mirror", tta_below=below)
    partly.compile(trained[1])
    monkeypatch.setattr(evaluator_module, "evaluation_indices", watched)
    partly(trained[1])
    assert passes == [list(range(COUNT)), np.flatnonzero(confidence < below).tolist()]
    assert 0 < len(passes[1]) < COUNT


def test_a_split_on_the_device_gives_the_same_and_stays_there(trained, confidence):
    task, state = trained
    below = widest_gap(confidence)
    expected = evaluator(trained, tta="mirror", tta_below=below)(state).probabilities
    on_device = Evaluator(task, resident.put(TEST, task.layout), all_examples(TEST), 100, tta="mirror", tta_below=below)
    on_device.compile(state)
    with jax.transfer_guard_host_to_device("disallow"):  # but by device_put, as positions come
        found = on_device(state).probabilities
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_padding_is_never_counted(trained):
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
    ("fields", "message"),
    [
        ({"tta_below": 0.5}, "eval.tta_below=0.5: needs another eval.tta than none"),
        ({"tta": "mirror", "tta_below": 1.5}, "eval.tta_below=1.5: must be above 0 and at most 1"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    config = make_tiny_config()
    config.eval = dataclasses.replace(config.eval, **fields)
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value) == message
