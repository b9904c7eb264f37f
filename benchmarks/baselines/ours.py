"""This project: the same input pipeline, training step and loop as in `main.py`."""

import dataclasses
import functools
import json

import jax

from benchmarks.runner import EVAL_BATCHES, Workload
from cifar_flax import config as configs
from cifar_flax import models
from cifar_flax.data.batches import empty_batch, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.data.streaming import training_batches
from cifar_flax.runtime import compilation
from cifar_flax.training import evaluator, steps
from cifar_flax.training.evaluator import Evaluator
from cifar_flax.training.loop import run_calls
from cifar_flax.training.setup import setup

VERSIONS = {"jax": jax.__version__}


class Runner:
    def __init__(self, workload: Workload):
        compilation.enable_cache()
        config = configs.from_dict(json.loads(json.dumps(workload.config, default=vars)))
        names = tuple("0123456789")
        train = Arrays(workload.train_images, workload.train_labels, names, "benchmark")
        test = Arrays(workload.test_images, workload.test_labels, names, "benchmark")
        examples = evaluator.all_examples(train)
        info = dataclasses.replace(
            DatasetInfo.of(train, examples, "unit"), mean=tuple(workload.mean), std=tuple(workload.std)
        )
        sample = train.images[: models.network_class(config.model).sample_size]
        task, init = setup(config, info)
        self._state = init(config.seed, sample if len(sample) else None)
        self._evaluators = {size: Evaluator(task, test, evaluator.all_examples(test), size) for size in EVAL_BATCHES}
        batch = task.layout.shard_batch(empty_batch(config.train.batch_size, info.image_shape))
        self._step = task.layout.compile(functools.partial(steps.train_step, task), self._state, batch, donate=True)
        self._batches = to_device(
            training_batches(
                train,
                examples,
                batch_size=config.train.batch_size,
                seed=config.seed,
                start=0,
                stop=len(workload.learning_rates),
            ),
            task.layout.shard_batch,
        )
        self._done = 0

    def train(self, steps: int) -> None:
        start, self._done = self._done, self._done + steps
        calls = range(start + 1, self._done + 1)
        self._state = run_calls(
            self._step, self._state, self._batches, calls, lambda step, values: jax.device_get(values)
        )

    def evaluate(self, batch_size: int) -> float:
        return self._evaluators[batch_size](self._state).summary["accuracy"]
