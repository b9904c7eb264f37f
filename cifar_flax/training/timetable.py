"""When a run evaluates, saves and logs, and which steps a call of the compiled program runs."""

import bisect
import itertools
from collections.abc import Iterator

from cifar_flax.config import Config
from cifar_flax.data import order
from cifar_flax.training.steps import Task


class Timetable:
    """The evaluations, checkpoints and calls of a run.

    A call ends after `steps_per_call` steps or earlier: at a line of the log, an evaluation, a checkpoint, or a step at
    which another phase of `steps.phases` starts. Its end depends only on its start, so a resumed run makes the calls
    that are left.
    """

    def __init__(self, config: Config, num_examples: int, task: Task, pipeline: str):
        """`num_examples` is the size of the train split, `pipeline` what `pipelines.resolve` returns."""
        self.total_steps = task.total_steps
        self._batch_size, self._log_every = config.train.batch_size, config.train.log_every
        self._epoch_images = order.epoch_images(num_examples, self._batch_size, config.data.drop_last)
        self._stops = sorted(self._due(config.eval.every_epochs) | self._due(config.checkpoint.every_epochs))
        self._ends = sorted({*self._stops, *task.phase_starts})
        # A batch from the host is the input of one step. On a CPU, longer calls gain nothing and delay the response to
        # a signal, so only data.pipeline=resident makes them.
        is_single = pipeline == "streaming" or (config.data.pipeline == "auto" and task.layout.platform == "cpu")
        self._limit = 1 if is_single else config.train.steps_per_call
        self.steps_per_call = max(self.lengths())  # length of the longest call

    def epoch(self, step: int) -> float:
        """Return the number of finished epochs after `step` steps."""
        return step * self._batch_size / self._epoch_images

    def is_due(self, step: int, every_epochs: int) -> bool:
        """Return whether `step` is the last step or the first that completes a multiple of `every_epochs` epochs."""
        return step in self._due(every_epochs)

    def _due(self, every_epochs: int) -> set[int]:
        images = every_epochs * self._epoch_images
        multiples = self.total_steps * self._batch_size // images
        return {-(-images * number // self._batch_size) for number in range(1, multiples + 1)} | {self.total_steps}

    def stops(self, first: int) -> list[int]:
        """Return the steps from `first` on after which the loop evaluates or saves."""
        return [stop for stop in self._stops if stop >= first]

    def calls(self, start: int, stop: int) -> Iterator[int]:
        """Yield the number of finished steps after each call from step `start` to `stop`, one of the `stops`."""
        while start < stop:
            line = (start // self._log_every + 1) * self._log_every
            start = min(start + self._limit, line, self._ends[bisect.bisect_right(self._ends, start)])
            yield start

    def lengths(self, start: int = 0) -> set[int]:
        """Return the lengths, in steps, of the calls of a run from step 0 and of one that resumes at `start`."""
        if self._limit == 1:
            return {1}
        found = set()
        for begin in {0, start}:
            ends = [begin, *self.calls(begin, self.total_steps)]
            found |= {end - before for before, end in itertools.pairwise(ends)}
        return found
