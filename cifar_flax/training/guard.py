"""The check that the loss and the gradient of every step are finite."""

import math

from cifar_flax.errors import DivergedError
from cifar_flax.training.metrics import StepMetrics


class NonFiniteGuard:
    """End the run at a non-finite loss or gradient, or after too many consecutive skipped steps."""

    def __init__(self, max_skipped: int, loss: float | None = None, skipped: int = 0):
        """`max_skipped` is 0 if steps are never skipped. `skipped` counts the steps since the last finite `loss`."""
        self._max_skipped, self.loss, self.skipped = max_skipped, loss, skipped

    def check(self, first_step: int, values: StepMetrics) -> None:
        """Raise `DivergedError` if one of the steps from `first_step` on, whose metrics are `values`, ends the run."""
        for step, loss in enumerate(values["loss"].tolist(), start=first_step):
            if values["finite"][step - first_step]:
                self.loss, self.skipped = loss, 0
                continue
            self.skipped += 1
            if self.skipped >= self._max_skipped:
                rate = values["learning_rate"][step - first_step]
                reason = f"the loss is {loss}"
                if math.isfinite(loss):
                    which = "gradient or the new state" if self._max_skipped else "gradient"
                    reason = f"the {which} is not finite, with a loss of {loss:.6g}"
                last = "" if self.loss is None else f" (last finite loss: {self.loss:.6g})"
                many = f" after {self.skipped} consecutive skipped steps" if self._max_skipped else ""
                skip = "" if self._max_skipped else ", or use on_nonfinite=skip"
                advice = f"Lower optim.learning_rate (now {rate:g}) or set optim.clip_norm{skip}, in a new --workdir."
                raise DivergedError(f"step {step}: {reason}{last}{many}. {advice}")
