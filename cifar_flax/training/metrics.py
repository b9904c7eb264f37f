"""Metrics of evaluations, from sums over batches, and of training, from the metrics of the steps."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from cifar_flax.data.batches import InputTimer
from cifar_flax.telemetry.scalars import require_new_names

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017
_STEP_METRICS = {"loss", "accuracy", "learning_rate", "finite"}  # of every step; their summary is not always the mean
_SUMS = {"loss", "top5_accuracy", "confusion", "bin_count", "bin_confidence", "bin_correct"}  # of every evaluation

StepMetrics = dict[str, Any]  # name -> metric of each step in one call, as `train_step` returns them
Sums = dict[str, Any]  # name -> array, a sum over examples


def evaluation_sums(
    logits: Float[Array, "batch classes"], label: Int[Array, " batch"], mask: Bool[Array, " batch"]
) -> Sums:
    """Return the sums of the metrics over a batch, without the examples whose `mask` is False.

    The mean of any additional scalar in the returned dict is logged, saved in eval.json, plotted and compared.
    """
    num_classes = logits.shape[-1]
    weight = mask.astype(jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    probability = jax.nn.softmax(logits)
    prediction = jnp.argmax(logits, axis=-1)
    confidence = jnp.max(probability, axis=-1)
    # If logits are equal, the lower class ranks first, as in argmax.
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    lower = jnp.arange(num_classes)[None, :] < label[:, None]
    # `not <=` rather than `>`, so that logits of NaN count as errors.
    rank = jnp.sum(~(logits <= own) | ((logits == own) & lower), axis=-1)
    bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1)
    is_in_bin = bins[:, None] == jnp.arange(CALIBRATION_BINS)[None, :]

    def sum_per_bin(values: Float[Array, " batch"]) -> Float[Array, " bins"]:
        # On a GPU, adding to array elements by index (scatter-add) sums in an order that varies.
        return jnp.sum(jnp.where(is_in_bin & mask[:, None], values[:, None], 0.0), axis=0)

    return {
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "top5_accuracy": jnp.sum(weight * (rank < 5)),
        "confusion": jnp.zeros((num_classes, num_classes), jnp.int32).at[label, prediction].add(weight),
        "bin_count": sum_per_bin(jnp.ones_like(confidence)),
        "bin_confidence": sum_per_bin(confidence),
        "bin_correct": sum_per_bin((prediction == label).astype(jnp.float32)),
    }


def add(total: Sums | None, sums: Sums) -> Sums:
    """Return the sum of both, in double precision on the host."""
    wide = {
        name: np.asarray(value, np.int64 if value.dtype.kind in "biu" else np.float64) for name, value in sums.items()
    }
    return wide if total is None else {name: total[name] + wide[name] for name in wide}


def summarize(sums: Sums, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return accuracy, loss, calibration and per-class metrics of a whole split, as JSON types.

    `confusion_matrix[i][j]` counts examples of class i that were classified as class j. `calibration` has, for each bin
    of `expected_calibration_error`, the number of examples, their mean confidence and their accuracy. Precision is 0
    for classes that are never predicted, and recall is 0 for classes without examples. `balanced_accuracy` is the mean
    recall of the classes with examples; `macro_f1` is the mean F1 of the classes with examples or predictions.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2 (expected calibration error).
    """
    confusion = sums["confusion"]
    count = int(confusion.sum())
    correct = np.diag(confusion)
    precision = correct / np.maximum(confusion.sum(axis=0), 1)
    recall = correct / np.maximum(confusion.sum(axis=1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    has_examples = confusion.sum(axis=1) > 0
    # |accuracy - confidence| of each bin, weighted by its fraction of the examples.
    calibration_error = np.abs(sums["bin_correct"] - sums["bin_confidence"]).sum() / count
    require_new_names(sums.keys() - _SUMS)
    means: dict[str, float | None] = {name: float(value) / count for name, value in sums.items() if value.ndim == 0}
    for name in means.keys() - _SUMS:
        if not math.isfinite(means[name] or 0):
            means[name] = None  # JSON has no infinity
    bins = zip(sums["bin_count"], sums["bin_confidence"], sums["bin_correct"], strict=True)
    return {
        "num_examples": count,
        "accuracy": int(correct.sum()) / count,
        "balanced_accuracy": float(recall[has_examples].mean()),
        "macro_f1": float(f1[has_examples | (confusion.sum(axis=0) > 0)].mean()),
        **means,
        "expected_calibration_error": float(calibration_error),
        "calibration": [
            {
                "count": int(size),
                "confidence": float(confidence / size) if size else None,
                "accuracy": float(right / size) if size else None,
            }
            for size, confidence, right in bins
        ],
        "per_class": {
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i])}
            for i, name in enumerate(class_names)
        },
        "confusion_matrix": confusion.tolist(),
    }


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion, given `correct` of `count` trials.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    proportion = correct / count
    center = proportion + z**2 / (2 * count)
    half = z * math.sqrt(proportion * (1 - proportion) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


class MetricsAccumulator:
    """Accumulate the metrics of the steps since the last line of metrics.jsonl.

    `blocked` returns the total seconds that the loop has waited for checkpoints. `values` are the step metrics since
    that line from before a restart; they count in the means, but not in the rates.
    """

    def __init__(self, inputs: InputTimer, blocked: Callable[[], float], values: Mapping[str, list[Any]]):
        self._inputs, self._blocked = inputs, blocked
        self._values = [{name: np.asarray(column) for name, column in values.items()}] if values else []
        self._blocked_before = 0.0
        self.resume()

    def resume(self) -> None:
        """Restart the clock: evaluations and saves do not count as training time."""
        self._begin, self._waited, self._timed = time.perf_counter(), self._inputs.seconds, 0

    def add(self, values: StepMetrics) -> None:
        """Add the metrics of the steps in one call."""
        require_new_names(values.keys() - _STEP_METRICS)
        self._values.append(values)
        self._timed += len(values["loss"])

    def values(self) -> dict[str, list[Any]]:
        """Return the metrics of the accumulated steps, which JSON stores exactly; empty if there are none."""
        return {name: column.tolist() for name, column in self._columns().items()} if self._values else {}

    def summarize(self, batch_size: int) -> dict[str, Any]:
        """Return the means over the accumulated steps that were not skipped, and reset."""
        seconds = time.perf_counter() - self._begin
        values, blocked = self._columns(), self._blocked()
        taken = values["finite"].astype(bool)
        metrics = {
            "loss": _mean(values["loss"][taken]),
            "accuracy": _mean(values["accuracy"][taken]),
            **{name: _mean(values[name][taken]) for name in values if name not in _STEP_METRICS},
            "learning_rate": float(values["learning_rate"][-1]),
            "skipped_steps": int(np.sum(~taken)),
            "images_per_second": self._timed * batch_size / seconds,
            "input_wait_fraction": (self._inputs.seconds - self._waited) / seconds,
            "checkpoint_blocked_seconds": blocked - self._blocked_before,
        }
        self._values, self._blocked_before = [], blocked
        self.resume()
        return metrics

    def _columns(self) -> dict[str, np.ndarray]:
        # A new version of the code may return more metrics than the values saved before a restart have.
        names = set(self._values[0]).intersection(*self._values)
        return {name: np.concatenate([values[name] for values in self._values]) for name in sorted(names)}


def _mean(column: np.ndarray) -> float | None:
    mean = column.astype(np.float64).mean() if len(column) else math.nan
    return float(mean) if math.isfinite(mean) else None  # JSON has no NaN
