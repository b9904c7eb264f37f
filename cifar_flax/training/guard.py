"""The check that the loss and the gradient of every step are finite."""

import math

from cifar_flax.errors import UserError
from cifar_flax.training.metrics import StepMetrics


class NonFiniteGuard:
    """Ends a run at a loss or gradient that is not finite, or after too many skipped steps in a row."""

    def __init__(self, max_skipped: int, loss: float | None = None, skipped: int = 0):
        """`max_skipped`: 0 if no step is skipped; `loss`: the last finite loss; `skipped`: the steps since then."""
        self._max_skipped, self.loss, self.skipped = max_skipped, loss, skipped

    def check(self, first_step: int, values: StepMetrics) -> None:
        """Raise `UserError` if one of the steps from `first_step` on, with the metrics `values`, ends the run."""
        for step, loss in enumerate(values["loss"].tolist(), start=first_step):
            if values["finite"][step - first_step]:
                self.loss, self.skipped = loss, 0
                continue
            self.skipped += 1
            if self.skipped >= self._max_skipped:
                rate = values["learning_rate"][step - first_step]
                what = f"the loss of step {step} is {loss}"
                if math.isfinite(loss):
                    which = "gradient, or the state that it leads to," if self._max_skipped else "gradient"
                    what = f"of step {step}, whose loss is {loss:.6g}, the {which} is not finite"
                before = "" if self.loss is None else f", {self.loss:.6g} before"
                many = f"; it is the last of {self.skipped} skipped in a row" if self._max_skipped else ""
                skip = "" if self._max_skipped else "on_nonfinite=skip leaves such steps out; "
                raise UserError(
                    f"{what} at a learning rate of {rate:g}{before}{many}; nothing of it is saved; {skip}"
                    "a lower optim.learning_rate or optim.clip_norm, in another --workdir, may keep it finite"
                )
