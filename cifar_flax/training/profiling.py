"""Trace training steps with the JAX profiler."""

from dataclasses import dataclass
from pathlib import Path

import jax

from cifar_flax.errors import one_line, require
from cifar_flax.runtime import processes
from cifar_flax.training.metrics import StepMetrics
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import Call, TrainCall


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    steps: tuple[int, int] = (0, 0)  # first and last step to trace, counted from 1; (0, 0) traces none

    def validate(self) -> None:
        first, last = self.steps
        allowed = "must be (first, last) with 1 <= first <= last, or (0, 0) for none"
        require(1 <= first <= last or self.steps == (0, 0), "profile.steps", self.steps, allowed)


class Profiled:
    """Wrap `train_call` and trace the calls that contain a step of `config.steps`."""

    def __init__(self, train_call: TrainCall, config: ProfileConfig, folder: Path, *, start: int):
        """`start` steps are finished. The trace is written to `folder`/profile."""
        self._train_call = train_call
        self._first, self._last = config.steps
        self._tracing = False
        self._folder = folder / "profile"
        if self._last > start:
            first = max(self._first, start + 1)
            processes.log(f"steps {first} to {self._last} will be traced to {self._folder}")
        elif self._last:
            processes.log(f"profile.steps={config.steps}: these steps are already finished; nothing will be traced")
        if jax.process_count() > 1:  # processes of one host would use the same file names
            self._folder /= f"process_{jax.process_index()}"

    def __call__(self, state: TrainState, call: Call) -> tuple[TrainState, StepMetrics]:
        step = call.start + 1
        if not self._tracing and self._first <= call.stop and step <= self._last:
            jax.block_until_ready(state)  # the device may still run earlier calls
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = self._train_call(state, call)
        if self._tracing and call.stop >= self._last:
            jax.block_until_ready(state)
            self.close()
        return state, values

    def close(self) -> None:
        """Write the trace if there is one that is not written yet. If that fails, log it; the run continues."""
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # of the disk or of the profiler
                processes.log(f"the trace could not be written ({one_line(error)})")
