"""Measures one contestant in this process and prints one line of JSON; `benchmarks.compare` starts it."""

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
from typing import Any

import numpy as np

CHUNK_SECONDS = 5.0  # of training between two looks at the clock; Keras pays 0.1 s for its call of `fit` in each
EVAL_BATCHES = (32, 128, 512)  # images; the fastest of them counts
TARGET = 0.73  # test accuracy


@dataclass(frozen=True)
class Setting:
    """What `benchmarks.setting` wrote."""

    config: Any  # the fields of cifar_flax.config.Config
    mean: tuple[float, ...]  # per channel, in units of the stored bytes
    std: tuple[float, ...]
    learning_rates: np.ndarray  # of every step
    train_images: np.ndarray  # uint8 [N, 32, 32, 3]
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Setting":
        text = (folder / "setting.json").read_text()
        values = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
        return cls(**vars(values), **{path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")})


def speed(contestant: Any, setting: Setting, seconds: float) -> dict[str, Any]:
    """Training: the median over chunks of some seconds. Evaluation: at the batch size that suits it best."""
    contestant.train(1)
    first_step = since_start()
    contestant.train(2)
    few, more = (timed(lambda steps=steps: contestant.train(steps)) for steps in (2, 7))
    steps = max(1, round(CHUNK_SECONDS * 5 / max(more - few, 1e-3)))
    rates: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(rates) < 3:
        rates.append(steps * setting.config.train.batch_size / timed(lambda: contestant.train(steps)))
    memory = peak_memory()
    evaluations: dict[int, float] = {}
    for size in EVAL_BATCHES:
        contestant.evaluate(size)
        times = [timed(lambda size=size: contestant.evaluate(size)) for _ in range(3)]
        evaluations[size] = len(setting.test_labels) / statistics.median(times)
    return {
        "train_images_per_second": statistics.median(rates),
        "evaluate_images_per_second": max(evaluations.values()),
        "evaluation_batch_size": max(evaluations, key=evaluations.__getitem__),
        "seconds_to_first_step": first_step,
        "peak_memory_mib": memory,
    }


def accuracy(contestant: Any, setting: Setting) -> dict[str, Any]:
    """Trains, evaluating after each epoch, until the target is reached or the run is at its end."""
    images_per_step, done = setting.config.train.batch_size, 0
    curve: list[float] = []
    while done < len(setting.learning_rates) and (not curve or curve[-1] < TARGET):
        epoch_end = round((len(curve) + 1) * len(setting.train_labels) / images_per_step)
        steps = min(epoch_end, len(setting.learning_rates)) - done
        contestant.train(steps)
        done += steps
        curve.append(contestant.evaluate(EVAL_BATCHES[-1]))
    return {"seconds_to_73_percent": since_start() if curve[-1] >= TARGET else None, "accuracy_per_epoch": curve}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def since_start() -> float:
    """Seconds since `benchmarks.compare` started this process."""
    return time.time() - float(os.environ["STARTED"])


def peak_memory() -> float:
    """The most resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    peer, folder, task, seconds = sys.argv[1:]
    setting = Setting.read(Path(folder))
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    contestant = module.Contestant(setting)
    result = speed(contestant, setting, float(seconds)) if task == "speed" else accuracy(contestant, setting)
    print(json.dumps(result | {"versions": {"python": platform.python_version()} | module.VERSIONS}))


if __name__ == "__main__":
    main()
