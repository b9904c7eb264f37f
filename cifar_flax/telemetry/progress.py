"""Progress of a training run: a bar on a terminal, otherwise one line per evaluation."""

import time

from cifar_flax.runtime.progress import ProgressBar
from cifar_flax.telemetry.metrics_log import Metrics


class Progress(ProgressBar):
    """Show a progress bar on a terminal, otherwise one line per evaluation; in the main process only."""

    def __init__(self, *, start: int, total: int, epochs: float):
        super().__init__(total, "step", start)
        self._start, self._total, self._epochs = start, total, epochs
        self._begin = time.monotonic()
        self._train: Metrics = {}

    def show_training(self, metrics: Metrics) -> None:
        self._train = metrics
        if self.tqdm is not None:
            self.tqdm.set_description(f"epoch {metrics['epoch']:.1f}/{self._epochs:g}", refresh=False)
            self.tqdm.set_postfix_str(f"{_training(metrics)}, {metrics['images_per_second']:,.0f} images/s")

    def show_evaluation(self, metrics: Metrics) -> None:
        train, step = self._train, metrics["step"]
        columns = [
            f"epoch {metrics['epoch']:.1f}/{self._epochs:g}",
            f"{metrics['split']} loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.2%}",
        ]
        if train:  # empty if a resumed run starts with an evaluation
            left = (time.monotonic() - self._begin) * (self._total - step) / (step - self._start)
            columns.insert(1, _training(train))
            columns += [
                f"{train['images_per_second']:,.0f} images/s",
                f"{train['input_wait_fraction']:.2%} of the time waiting for input",
                f"{left:.0f} s left",
            ]
        self.write(" | ".join(columns))


def _training(metrics: Metrics) -> str:
    skipped = f", {metrics['skipped_steps']} steps skipped" if metrics["skipped_steps"] else ""
    if metrics["loss"] is None:
        return f"train{skipped}"
    return f"train loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.2%}{skipped}"
