"""Traces of training steps, by JAX's profiler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cifar_flax.errors import one_line, require
from cifar_flax.runtime import processes
from cifar_flax.training.metrics import StepMetrics
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import TrainCall


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    steps: tuple[int, int] = (0, 0)  # the first and the last that are traced, counted from 1; (0, 0): none are

    def validate(self) -> None:
        first, last = self.steps
        allowed = "must be (first, last) with 1 <= first <= last, or (0, 0) for none"
        require(1 <= first <= last or self.steps == (0, 0), "profile.steps", self.steps, allowed)


class Profiled:
    """The calls of a run; those that hold a step of `config.steps` are traced."""

    def __init__(self, train_call: TrainCall, config: ProfileConfig, folder: Path, *, start: int, per_call: int):
        """`start` steps are done, each call adds `per_call`. The trace will lie in the `folder` of the run."""
        self._train_call, self._done, self._per_call = train_call, start, per_call
        self._first, self._last = config.steps
        self._tracing = False
        self._folder = folder / "profile"
        if self._last > start:
            first = max(self._first, start + 1)
            processes.log(f"steps {first} to {self._last} will be traced, into {self._folder}")
        elif self._last:
            processes.log(f"profile.steps={config.steps}: these steps are done; nothing will be traced")
        if jax.process_count() > 1:  # those of one host would give their files the same name
            self._folder /= f"process_{jax.process_index()}"

    def __call__(self, state: TrainState, inputs: Any) -> tuple[TrainState, StepMetrics]:
        step, self._done = self._done + 1, self._done + self._per_call
        if not self._tracing and self._first <= self._done and step <= self._last:
            jax.block_until_ready(state)  # the device may be at work on earlier calls
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = self._train_call(state, inputs)
        if self._tracing and self._done >= self._last:
            jax.block_until_ready(state)
            self.close()
        return state, values

    def close(self) -> None:
        """Writes what has been traced, if that is still to be done. The run goes on where it cannot be written."""
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:
                processes.log(f"the trace could not be written ({one_line(error)})")
