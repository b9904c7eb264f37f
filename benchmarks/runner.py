"""Measure one runner in this process and print one line of JSON; `benchmarks.compare` starts it."""

import importlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

CHUNK_SECONDS = 5.0  # of training per timed chunk, to amortise the 0.1 s overhead of Keras' `fit`
EVAL_BATCHES = (32, 128, 512)  # batch sizes; the rate of the fastest is reported
TARGET = 0.73  # test accuracy


@dataclass(frozen=True)
class Workload:
    """Config, data and learning rates, as written by `benchmarks.workload`."""

    config: Any  # the fields of cifar_flax.config.Config
    mean: tuple[float, ...]  # per channel, in units of the stored bytes
    std: tuple[float, ...]
    learning_rates: np.ndarray  # one per step
    train_images: np.ndarray  # uint8 [N, 32, 32, 3]
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Workload":
        text = (folder / "workload.json").read_text()
        values = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
        return cls(**vars(values), **{path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")})


class Runner(Protocol):
    """Train and evaluate one workload; most modules of `benchmarks.baselines` define a class with this interface."""

    def __init__(self, workload: Workload) -> None: ...

    def train(self, steps: int) -> None:
        """Train for `steps` more steps and wait until they are finished."""

    def evaluate(self, batch_size: int) -> float:
        """Return the accuracy on the test split."""


def speed(runner: Runner, workload: Workload, seconds: float) -> dict[str, Any]:
    """Return images per second of training (median over chunks) and of evaluation (best of `EVAL_BATCHES`)."""
    runner.train(1)
    first_step = since_start()
    runner.train(2)
    few, more = (timed(lambda steps=steps: runner.train(steps)) for steps in (2, 7))
    steps = max(1, round(CHUNK_SECONDS * 5 / max(more - few, 1e-3)))
    rates: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(rates) < 3:
        rates.append(steps * workload.config.train.batch_size / timed(lambda: runner.train(steps)))
    memory = peak_memory()
    evaluations: dict[int, float] = {}
    for size in EVAL_BATCHES:
        runner.evaluate(size)
        times = [timed(lambda size=size: runner.evaluate(size)) for _ in range(3)]
        evaluations[size] = len(workload.test_labels) / statistics.median(times)
    return {
        "train_images_per_second": statistics.median(rates),
        "evaluate_images_per_second": max(evaluations.values()),
        "evaluation_batch_size": max(evaluations, key=evaluations.__getitem__),
        "seconds_to_first_step": first_step,
        "peak_memory_mib": memory,
    }


def accuracy(runner: Runner, workload: Workload) -> dict[str, Any]:
    """Train, evaluating after each epoch, until the accuracy reaches `TARGET` or the run ends."""
    images_per_step, done = workload.config.train.batch_size, 0
    curve: list[float] = []
    while done < len(workload.learning_rates) and (not curve or curve[-1] < TARGET):
        epoch_end = round((len(curve) + 1) * len(workload.train_labels) / images_per_step)
        steps = min(epoch_end, len(workload.learning_rates)) - done
        runner.train(steps)
        done += steps
        curve.append(runner.evaluate(EVAL_BATCHES[-1]))
    return {"seconds_to_73_percent": since_start() if curve[-1] >= TARGET else None, "accuracy_per_epoch": curve}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def since_start() -> float:
    """Return the seconds since `benchmarks.compare` started this process."""
    return time.time() - float(os.environ["STARTED"])


def peak_memory() -> float:
    """Return the peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    baseline, folder, task, seconds = sys.argv[1:]
    workload = Workload.read(Path(folder))
    module = importlib.import_module(f"benchmarks.baselines.{baseline}")
    runner = module.Runner(workload)
    result = speed(runner, workload, float(seconds)) if task == "speed" else accuracy(runner, workload)
    print(json.dumps(result | {"versions": {"python": platform.python_version()} | module.VERSIONS}))


if __name__ == "__main__":
    main()
