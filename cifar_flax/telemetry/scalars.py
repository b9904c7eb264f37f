"""Select the scalar metrics of an evaluation."""

from collections.abc import Mapping
from typing import Any

_STANDARD = ("accuracy", "top5_accuracy", "loss", "expected_calibration_error")
_SETTINGS = ("tta_below",)


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar metrics in `result`, the content of eval.json or a part of it."""
    return {name: value for name, value in result.items() if isinstance(value, float) and name not in _SETTINGS}


def other_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar metrics in `result` besides accuracy, top-5 accuracy, loss and calibration error."""
    return {name: value for name, value in scalars(result).items() if name not in _STANDARD}


def title(name: str) -> str:
    """Return the name of a metric as text: "grad_norm" becomes "grad norm", "top5_accuracy" "top-5 accuracy"."""
    return name.replace("top5", "top-5").replace("_", " ")
