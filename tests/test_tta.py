"""Test test-time augmentation (TTA): the average over TTA views, and for a fraction of the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_counts, make_tiny_config, widest_gap
from flax import nnx

from cifar_flax.data import resident, sources
from cifar_flax.data.augment import VIEWS, normalize, views
from cifar_flax.errors import UserError
from cifar_flax.training import evaluator as evaluator_module
from cifar_flax.training import metrics, steps
from cifar_flax.training.evaluator import Evaluator, all_examples, evaluation_passes
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


@pytest.fixture(scope="module")
def least(confidence):
    """Return the positions of about half of the images, those of lowest confidence, which rounding does not change."""
    return np.flatnonzero(confidence < widest_gap(confidence))


@pytest.mark.parametrize("batch_size", [1, 64, 355])
def test_a_fraction_of_tta_is_for_the_least_confident_images(trained, least, batch_size):
    logits, augmented = plain_logits(trained, TEST.images), augmented_logits(trained, "mirror_translate")
    plain, is_least = summary_of(logits), np.isin(np.arange(COUNT), least)
    logits = np.where(is_least[:, None], augmented, logits)
    expected = summary_of(logits)
    evaluate = evaluator(trained, tta="mirror_translate", tta_fraction=len(least) / COUNT, batch_size=batch_size)
    found = evaluate(trained[1])
    np.testing.assert_allclose(found.probabilities, np.asarray(jax.nn.softmax(logits)), rtol=0, atol=1e-5)
    assert_same_counts(found.summary["confusion_matrix"], expected["confusion_matrix"])
    assert found.summary.keys() == expected.keys()
    assert found.summary["num_examples"] == COUNT
    for name, one in (("loss", 1e-4), ("top5_accuracy", 1e-2), ("expected_calibration_error", 2e-2)):
        assert found.summary[name] == pytest.approx(expected[name], rel=one), name
    assert sum(row["count"] for row in found.summary["calibration"]) == COUNT
    assert evaluate.accuracy(trained[1]) == found.summary["accuracy"]
    assert len({plain["loss"], expected["loss"], summary_of(augmented)["loss"]}) == 3


def test_passes_of_an_evaluation():
    assert evaluation_passes(1000, "mirror", 0.25) == [(1000, "none"), (250, "mirror")]
    assert evaluation_passes(1000, "mirror", 1e-4) == [(1000, "none"), (1, "mirror")]
    assert evaluation_passes(1000, "mirror", 1.0) == [(1000, "mirror")]
    assert evaluation_passes(1000, "none", 0.25) == [(1000, "none")]


def test_a_fraction_that_rounds_to_all_images_needs_one_pass(trained):
    found, expected = (evaluator(trained, tta="mirror", tta_fraction=value)(trained[1]) for value in (0.999, 1.0))
    assert found.summary == expected.summary
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


def test_only_the_views_of_the_chosen_images_are_computed(trained, monkeypatch):
    """Count the images that the network gets: 355 and, in two batches of 50, six TTA views of 100."""
    counted, images = [], steps.normalize

    def counting(image, mean, std):
        jax.debug.callback(lambda: counted.append(len(image)))
        return images(image, mean, std)

    monkeypatch.setattr(steps, "normalize", counting)
    evaluator(trained, tta="mirror_translate", tta_fraction=100 / COUNT, batch_size=71)(trained[1])
    jax.effects_barrier()
    assert sum(counted) == 355 + 6 * 100
    of_passes = evaluation_passes(COUNT, "mirror_translate", 100 / COUNT)
    assert sum(count * len(VIEWS[tta]) for count, tta in of_passes) == sum(counted)


def test_the_first_of_equally_confident_images_are_chosen(trained, monkeypatch):
    """With weights of zero, all confidences are 0.1."""
    task, state = trained
    chosen, indices = [], evaluator_module.evaluation_indices

    def recorded(examples, batch_size):
        chosen.append(examples.tolist())
        return indices(examples, batch_size)

    evaluate = Evaluator(task, TEST, all_examples(TEST)[::-1].copy(), 100, tta="mirror", tta_fraction=0.25)
    evaluate.compile(state)
    monkeypatch.setattr(evaluator_module, "evaluation_indices", recorded)
    evaluate(state._replace(params=jax.tree.map(jnp.zeros_like, state.params)))
    assert chosen == [list(range(COUNT))[::-1], list(range(COUNT))[: -round(COUNT / 4) - 1 : -1]]


def test_a_split_on_the_device_gets_equal_results_without_transfers(trained, least):
    task, state = trained
    settings = {"tta": "mirror", "tta_fraction": len(least) / COUNT}
    expected = evaluator(trained, **settings)(state).probabilities
    on_device = Evaluator(task, resident.put(TEST, task.layout), all_examples(TEST), 100, **settings)
    on_device.compile(state)
    with jax.transfer_guard_host_to_device("disallow"):  # allows device_put, which transfers positions
        result = on_device(state).probabilities
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_an_evaluation_of_nan_is_an_error(trained):
    _, state = trained
    nan = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    evaluate = evaluator(trained, tta="mirror", tta_fraction=0.5)
    for call in (evaluate, evaluate.accuracy):
        with pytest.raises(UserError, match="evaluation loss"):
            call(nan)
