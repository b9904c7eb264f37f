"""Select the scalar metrics of an evaluation."""

from collections.abc import Collection, Mapping
from typing import Any

from cifar_flax.errors import UserError

_STANDARD = ("accuracy", "top5_accuracy", "loss", "expected_calibration_error")

# Names with another meaning in metrics.jsonl, eval.json or the report.
_RESERVED = {
    "step", "epoch", "split", "dataset", "tta", "tta_fraction", "tta_below", "learning_rate", "images_per_second",
    "input_wait_fraction", "skipped_steps", "checkpoint_blocked_seconds", "num_examples", "accuracy", "calibration",
    "calibration_error", "expected_calibration_error", "per_class", "confusion_matrix",
    "balanced_accuracy", "macro_f1",
}  # fmt: skip


def require_new_names(names: Collection[str]) -> None:
    """Raise `UserError` if one of `names`, of additional metrics, is reserved or not an identifier."""
    for name in names:
        if name in _RESERVED or not name.isidentifier():
            raise UserError(f"the metric {name!r}: must have another name, which is an identifier such as grad_norm")


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar metrics in `result`, the content of eval.json or a part of it."""
    settings = ("tta_fraction", "tta_below")  # the second one in files of earlier releases
    return {name: value for name, value in result.items() if isinstance(value, float) and name not in settings}


def other_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar metrics in `result` besides accuracy, top-5 accuracy, loss and calibration error."""
    return {name: value for name, value in scalars(result).items() if name not in _STANDARD}


def augmentation(result: Mapping[str, Any]) -> str:
    """Return the test-time augmentation of `result`, the content of eval.json, as the end of a line; "" if none."""
    if "tta" not in result:
        return ""
    fraction = result.get("tta_fraction", 1.0)
    images = f" of the {100 * fraction:g}% of the images with the lowest confidence" if fraction < 1 else ""
    return f", test-time augmentation {result['tta']}{images}"


def title(name: str) -> str:
    """Return the name of a metric as text: "grad_norm" becomes "grad norm", "top5_accuracy" "top-5 accuracy"."""
    return name.replace("top5", "top-5").replace("_f1", "_F1").replace("_", " ")


def is_fraction(name: str) -> bool:
    """Return whether a metric is printed and plotted as a percentage: an accuracy or F1."""
    return name.endswith(("accuracy", "_f1"))
