"""The loop that runs compiled calls, each of one training step or many."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cifar_flax.data.batches import Batch, InputTimer, Positions
from cifar_flax.state import TrainState

# A call's metrics are read when this many later calls have been given to the device, so it never waits for the host.
READ_LAG = 2

Values = dict[str, Any]  # what `train_step` reports, of the steps of one call
Inputs = Batch | Positions  # of one call
TrainCall = Callable[[TrainState, Any], tuple[TrainState, Values]]


def run_calls(
    train_call: TrainCall,
    state: TrainState,
    inputs: Iterator[Inputs],
    calls: range,
    read: Callable[[int, Values], None],
) -> TrainState:
    """Runs the calls, each given as the number of steps done after it, and calls `read` with it and its metrics.

    They are read `READ_LAG` calls late, the last ones when there is nothing more to run.

    Nothing but inputs and metrics crosses between host and device: the transfer guard stops what does by accident.
    """
    in_flight: deque[tuple[int, Values]] = deque()
    with jax.transfer_guard("disallow"):
        for step in calls:
            state, values = train_call(state, next(inputs))
            in_flight.append((step, values))
            if len(in_flight) > READ_LAG:
                read(*in_flight.popleft())
        while in_flight:
            read(*in_flight.popleft())
    return state


class Interval:
    """Means and rates of the steps since the last line of the log."""

    def __init__(self, inputs: InputTimer):
        self._inputs = inputs
        self.open()

    def open(self) -> None:
        self._values: list[Values] = []
        self._begin, self._waited = time.perf_counter(), self._inputs.seconds

    def add(self, values: Values) -> None:
        self._values.append(values)

    def close(self, batch_size: int) -> dict[str, Any]:
        """The means over the steps added; opens the next interval."""
        seconds = time.perf_counter() - self._begin
        values = {name: np.concatenate([some[name] for some in self._values]) for name in self._values[0]}
        figures = {
            "loss": float(values["loss"].mean(dtype=np.float64)),
            "accuracy": float(values["accuracy"].mean(dtype=np.float64)),
            "learning_rate": float(values["learning_rate"][-1]),
            "images_per_second": len(values["loss"]) * batch_size / seconds,
            "input_wait_fraction": (self._inputs.seconds - self._waited) / seconds,
        }
        self.open()
        return figures
