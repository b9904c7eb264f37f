"""Evaluation metrics against scikit-learn and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from cifar_flax.data.batches import InputTimer
from cifar_flax.errors import UserError
from cifar_flax.training import metrics

CLASSES = tuple("abcdefg")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (400, 7)).astype(np.float32)
# Remove examples whose confidence lies so close to the edge of a bin that rounding errors choose the bin.
POSITIONS = np.asarray(jax.nn.softmax(LOGITS)).max(axis=1) * metrics.CALIBRATION_BINS
LOGITS = LOGITS[np.abs(POSITIONS - POSITIONS.round()) > 1e-3][:300]
LABELS = RNG.integers(0, 7, 300).astype(np.int32)


def evaluate(logits, labels, batch_size=300, mask=None):
    mask = np.ones(len(labels), bool) if mask is None else mask
    total, sums = None, jax.jit(metrics.evaluation_sums)
    for i in range(0, len(labels), batch_size):
        batch = (jnp.asarray(x[i : i + batch_size]) for x in (logits, labels, mask))
        total = metrics.add(total, jax.device_get(sums(*batch)))
    return metrics.summarize(total, CLASSES)


def test_metrics_equal_those_of_scikit_learn():
    result = evaluate(LOGITS, LABELS)
    prediction = LOGITS.argmax(axis=1)
    probability = np.exp(LOGITS.astype(np.float64))
    probability /= probability.sum(axis=1, keepdims=True)
    matrix = confusion_matrix(LABELS, prediction)
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["num_examples"] == 300
    assert result["accuracy"] == np.mean(prediction == LABELS)
    assert result["top5_accuracy"] == pytest.approx(top_k_accuracy_score(LABELS, LOGITS, k=5), abs=1e-12)
    assert result["loss"] == pytest.approx(log_loss(LABELS, probability), rel=1e-5)
    precision, recall, f1, _ = precision_recall_fscore_support(LABELS, prediction)
    for i, name in enumerate(CLASSES):
        row = result["per_class"][name]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[i], recall[i], f1[i]))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(LABELS, prediction))
    assert result["macro_f1"] == pytest.approx(f1_score(LABELS, prediction, average="macro"))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_means_over_classes_leave_out_absent_ones():
    """Classes 2 to 4 have examples. Class 0 is predicted only, class 4 is never predicted, 1, 5 and 6 are absent."""
    labels = (2 + np.arange(300) % 3).astype(np.int32)
    logits = np.where(np.isin(np.arange(7), [0, 2, 3]), LOGITS, -99)
    result, prediction = evaluate(logits, labels), logits.argmax(axis=1)
    assert set(prediction) == {0, 2, 3}
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, prediction))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, prediction, average="macro"))


def test_calibration_error_equals_its_definition():
    probability = np.asarray(jax.nn.softmax(LOGITS), np.float64)
    confidence, correct = probability.max(axis=1), LOGITS.argmax(axis=1) == LABELS
    result, expected = evaluate(LOGITS, LABELS), 0.0
    for low in range(metrics.CALIBRATION_BINS):
        inside = (confidence > low / metrics.CALIBRATION_BINS) & (confidence <= (low + 1) / metrics.CALIBRATION_BINS)
        found = result["calibration"][low]
        assert found["count"] == inside.sum()
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
            assert found["accuracy"] == correct[inside].mean()
            assert found["confidence"] == pytest.approx(confidence[inside].mean(), rel=1e-5)
        else:
            assert found == {"count": 0, "confidence": None, "accuracy": None}
    assert result["expected_calibration_error"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 299])
def test_metrics_do_not_depend_on_the_batch_size(batch_size):
    whole, parts = evaluate(LOGITS, LABELS), evaluate(LOGITS, LABELS, batch_size)
    assert parts["confusion_matrix"] == whole["confusion_matrix"]
    assert parts["top5_accuracy"] == whole["top5_accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert parts["expected_calibration_error"] == pytest.approx(whole["expected_calibration_error"], rel=1e-5)


def test_masked_examples_do_not_count():
    mask = RNG.random(300) < 0.7
    garbage = np.where(mask[:, None], LOGITS, np.nan)
    kept = evaluate(LOGITS[mask], LABELS[mask])
    masked = evaluate(garbage, LABELS, mask=mask)
    for name in ("num_examples", "accuracy", "top5_accuracy", "confusion_matrix", "per_class"):
        assert masked[name] == kept[name]
    assert [row["count"] for row in masked["calibration"]] == [row["count"] for row in kept["calibration"]]
    assert masked["loss"] == pytest.approx(kept["loss"], rel=1e-6)
    assert masked["expected_calibration_error"] == pytest.approx(kept["expected_calibration_error"], rel=1e-5)


def test_equal_logits_rank_lower_classes_first():
    result = evaluate(np.zeros((7, 7), np.float32), np.arange(7, dtype=np.int32))
    assert result["accuracy"] == 1 / 7
    assert result["top5_accuracy"] == 5 / 7


def test_logits_of_nan_are_errors():
    result = evaluate(np.full((7, 7), np.nan, np.float32), np.arange(7, dtype=np.int32))
    assert result["top5_accuracy"] == 0


def test_classes_without_examples_or_predictions_have_metrics_of_zero():
    result = evaluate(LOGITS, np.zeros(300, np.int32))
    assert result["per_class"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (7550, 10_000, 0.74647, 0.76333)],
)
def test_wilson_interval(correct, count, low, high):
    assert metrics.wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_step_metrics_of_any_name_are_averaged():
    accumulator = metrics.MetricsAccumulator(InputTimer(iter(())), lambda: 0.0, {})
    rate = np.array([0.1, 0.2, 0.3])
    values = {"loss": rate, "accuracy": rate, "learning_rate": rate, "finite": np.array([True, False, True])}
    accumulator.add(values | {"grad_norm": np.array([1.0, np.nan, 4.0]), "broken": np.array([1.0, 1.0, np.inf])})
    line = accumulator.summarize(batch_size=1)
    assert line["grad_norm"] == 2.5  # without the skipped step
    assert line["broken"] is None
    assert line["learning_rate"] == 0.3
    assert line["skipped_steps"] == 1


@pytest.mark.parametrize("name", ["epoch", "split", "macro_f1", "accuracy", "grad_norm/head"])
def test_names_of_additional_metrics_must_be_new_identifiers(name):
    with pytest.raises(UserError, match=f"metric '{name}'"):
        metrics.require_new_names({"grad_norm", name})


def test_reserved_names_are_refused_in_training_and_in_evaluation():
    accumulator = metrics.MetricsAccumulator(InputTimer(iter(())), lambda: 0.0, {})
    with pytest.raises(UserError, match="metric 'epoch'"):
        accumulator.add(dict.fromkeys(("loss", "accuracy", "learning_rate", "finite", "epoch"), np.ones(1)))
    sums = jax.device_get(metrics.evaluation_sums(*map(jnp.asarray, (LOGITS, LABELS, np.ones(300, bool)))))
    with pytest.raises(UserError, match="metric 'split'"):
        metrics.summarize(metrics.add(None, sums | {"split": np.float32(1)}), CLASSES)


@pytest.mark.parametrize(("total", "mean"), [(np.float32(150), 0.5), (jnp.bfloat16(0.75), 0.0025), (np.inf, None)])
def test_evaluation_metrics_of_any_name_are_means_over_the_examples(total, mean):
    sums = jax.device_get(metrics.evaluation_sums(*map(jnp.asarray, (LOGITS, LABELS, np.ones(300, bool)))))
    result = metrics.summarize(metrics.add(None, sums | {"own": np.asarray(total)}), CLASSES)
    assert result["own"] == mean


def test_a_metric_may_be_new_after_a_restart():
    old = {name: [0.5, 0.5] for name in ("loss", "accuracy", "learning_rate", "finite")}
    accumulator = metrics.MetricsAccumulator(InputTimer(iter(())), lambda: 0.0, old)
    accumulator.add({name: np.array([1.5, 1.5]) for name in (*old, "grad_norm")})
    line = accumulator.summarize(batch_size=1)
    assert line["loss"] == 1.0
    assert "grad_norm" not in line
    accumulator.add({name: np.array([1.5, 1.5]) for name in (*old, "grad_norm")})
    assert accumulator.summarize(batch_size=1)["grad_norm"] == 1.5


def test_wilson_interval_covers_the_probability_in_95_percent_of_the_cases():
    rng = np.random.default_rng(0)
    for probability in (0.1, 0.5, 0.94):
        intervals = [metrics.wilson_interval(int(k), 200) for k in rng.binomial(200, probability, 4000)]
        assert 0.93 < np.mean([low <= probability <= high for low, high in intervals]) < 0.97
