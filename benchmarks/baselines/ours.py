"""This project: the pipeline, the step and the loop that `main.py` runs."""

import dataclasses
import functools
import json

import jax

from benchmarks.contestant import EVAL_BATCHES, Setting
from cifar_flax import compilation, evaluate, experiment, models, steps
from cifar_flax import config as configs
from cifar_flax.data.batches import empty_batch, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.data.streaming import training_batches
from cifar_flax.evaluate import Evaluator
from cifar_flax.experiment import DatasetInfo
from cifar_flax.loop import run_calls

VERSIONS = {"jax": jax.__version__}


class Contestant:
    def __init__(self, setting: Setting):
        compilation.keep_programs()
        config = configs.from_dict(json.loads(json.dumps(setting.config, default=vars)))
        names = tuple("0123456789")
        train = Arrays(setting.train_images, setting.train_labels, names, "benchmark")
        test = Arrays(setting.test_images, setting.test_labels, names, "benchmark")
        examples = evaluate.all_examples(train)
        info = dataclasses.replace(
            DatasetInfo.of(train, examples, "unit"), mean=tuple(setting.mean), std=tuple(setting.std)
        )
        sample = train.images[: models.sample_size(config.model)]
        task, init = experiment.build(config, info)
        self._state = init(config.seed, sample if len(sample) else None)
        self._evaluators = {size: Evaluator(task, test, evaluate.all_examples(test), size) for size in EVAL_BATCHES}
        batch = task.layout.split(empty_batch(config.train.batch_size, info.image_shape))
        self._step = task.layout.compile(functools.partial(steps.train_step, task), self._state, batch, donate=True)
        self._batches = to_device(
            training_batches(
                train,
                examples,
                batch_size=config.train.batch_size,
                seed=config.seed,
                start=0,
                stop=len(setting.learning_rates),
            ),
            task.layout.split,
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
