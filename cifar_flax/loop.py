"""The loop that runs compiled calls, each of one training step or many."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cifar_flax.data.batches import Batch, InputTimer, Positions
from cifar_flax.errors import UserError
from cifar_flax.state import TrainState

# An accelerator's metrics are read when this many later calls have been given to it, so it never waits for the host.
READ_LAG = 2

Values = dict[str, Any]  # what `train_step` reports, of the steps of one call
Inputs = Batch | Positions  # of one call
TrainCall = Callable[[TrainState, Any], tuple[TrainState, Values]]


def read_lag(platform: str, steps_per_call: int) -> int:
    """How many calls a training run gives to the device ahead of the one that it reads.

    A signal has to wait for all that have been given. Those of many steps, and those of a CPU, take so long that the
    host's word between two of them hardly counts (0.4 % of the reference network's step on two cores): none is ahead.
    """
    return READ_LAG if steps_per_call == 1 and platform != "cpu" else 0


def run_calls(
    train_call: TrainCall,
    state: TrainState,
    inputs: Iterator[Inputs],
    calls: range,
    read: Callable[[int, Values], None],
    stopping: Callable[[], int] = lambda: 0,
    lag: int = READ_LAG,
) -> TrainState:
    """Runs the calls, each given as the number of steps done after it, and calls `read` with it and its metrics.

    They are read `lag` calls late, the last ones when there is nothing more to run, or when `stopping`, which is asked
    before each call, says so.

    Nothing but inputs and metrics crosses between host and device: the transfer guard stops what does by accident.
    """
    in_flight: deque[tuple[int, Values]] = deque()
    with jax.transfer_guard("disallow"):
        for step in calls:
            if stopping():
                break
            state, values = train_call(state, next(inputs))
            in_flight.append((step, values))
            if len(in_flight) > lag:
                read(*in_flight.popleft())
        while in_flight:
            read(*in_flight.popleft())
    return state


class Interval:
    """Means and rates of the steps since the last line of the log.

    `blocked` says for how many seconds in all the loop has waited for checkpoints. `values` are those of steps that an
    earlier start of the run has done since that line: they count in the means, not in the rates.
    """

    def __init__(self, inputs: InputTimer, blocked: Callable[[], float], values: Mapping[str, list[Any]]):
        self._inputs, self._blocked = inputs, blocked
        self._values = [{name: np.asarray(column) for name, column in values.items()}] if values else []
        self._blocked_before = 0.0
        self.resume()

    def resume(self) -> None:
        """The clock starts: what the loop has done besides training does not count."""
        self._begin, self._waited, self._timed = time.perf_counter(), self._inputs.seconds, 0

    def add(self, values: Values) -> None:
        self._values.append(values)
        self._timed += len(values["loss"])

    def values(self) -> dict[str, list[Any]]:
        """Those of the steps added, exact in JSON; empty where there are none."""
        return {name: column.tolist() for name, column in self._columns().items()} if self._values else {}

    def close(self, batch_size: int) -> dict[str, Any]:
        """The means over the steps added but for those that were skipped; opens the next interval."""
        seconds = time.perf_counter() - self._begin
        values, blocked = self._columns(), self._blocked()
        taken = values["finite"].astype(bool)
        figures = {
            "loss": _mean(values["loss"][taken]),
            "accuracy": _mean(values["accuracy"][taken]),
            "learning_rate": float(values["learning_rate"][-1]),
            "skipped_steps": int(np.sum(~taken)),
            "images_per_second": self._timed * batch_size / seconds,
            "input_wait_fraction": (self._inputs.seconds - self._waited) / seconds,
            "checkpoint_blocked_seconds": blocked - self._blocked_before,
        }
        self._values, self._blocked_before = [], blocked
        self.resume()
        return figures

    def _columns(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([some[name] for some in self._values]) for name in self._values[0]}


def _mean(column: np.ndarray) -> float | None:
    return float(column.astype(np.float64).mean()) if len(column) else None


class Divergence:
    """Ends a run whose loss or gradient is not finite, unless such steps are skipped and there are not too many."""

    def __init__(self, max_skipped: int, loss: float | None = None, skipped: int = 0):
        """`max_skipped` is 0 where none is; `loss` is the last that was finite, `skipped` the steps since."""
        self._max_skipped, self.loss, self.skipped = max_skipped, loss, skipped

    def check(self, first_step: int, values: Values) -> None:
        """Raises `UserError` at the first step that ends the run, of those whose `values` these are."""
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
