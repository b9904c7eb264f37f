"""Count the floating-point operations of a run, without running it. `docs/records.md` states the rules."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from cifar_flax import models
from cifar_flax.config import Config
from cifar_flax.data.batches import empty_batch
from cifar_flax.data.info import DatasetInfo
from cifar_flax.models.flops import matrix_flops
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training import steps
from cifar_flax.training.evaluator import evaluation_passes
from cifar_flax.training.setup import Init, setup
from cifar_flax.training.steps import Task


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run."""

    name: str
    number: int  # of the units
    unit: str  # steps | images
    flops: int  # of all units together


def parts(config: Config, info: DatasetInfo, num_test: int) -> list[Part]:
    """Return the operations of initialization, of each training phase, and of the evaluation of `num_test` images.

    The network's kernels are those for a TPU, where each convolution is one operation, whatever the device. Operations
    that several devices repeat, such as those of an optimizer, count once; the padding of the last evaluation batch and
    evaluations between epochs do not count.
    """
    task, init = on_one_device(config, info)
    sample_size = min(models.network_class(config.model).sample_size, info.num_examples)
    sample = jax.ShapeDtypeStruct((sample_size, *info.image_shape), "uint8") if sample_size else None
    found = [Part("initialization", sample_size, "images", _count(functools.partial(init, 0), sample))]
    state, batch = jax.eval_shape(lambda: init(0, None)), empty_batch(config.train.batch_size, info.image_shape)
    for first, count, phase in phases(task):
        each = _count(functools.partial(steps.train_step, phase), state, batch)
        found.append(Part(f"training from step {first}", count, "steps", count * each))
    weights, image = state.evaluated(task.averaging), empty_batch(1, info.image_shape)
    for count, tta in evaluation_passes(num_test, config.eval.tta, config.eval.tta_fraction):
        each = _count(functools.partial(steps.eval_step, task, tta=tta), weights, image)
        found.append(Part(f"final evaluation, TTA {tta}", count, "images", count * each))
    return found


def run_flops(config: Config, info: DatasetInfo, num_test: int) -> int:
    """Return the operations of all `parts` together."""
    return sum(part.flops for part in parts(config, info, num_test))


def pflop(flops: float) -> str:
    """Return a number of operations in PFLOP, with three digits."""
    return f"{f'{flops / 1e15:#.3g}'.rstrip('.')} PFLOP"


def on_one_device(config: Config, info: DatasetInfo) -> tuple[Task, Init]:
    """Return what `setup` returns for one device and the kernels of a TPU."""
    config = dataclasses.replace(config, parallel=ParallelConfig(), deterministic=False)
    return setup(config, info, jax.local_devices()[:1], platform="tpu")


def phases(task: Task) -> Iterator[tuple[int, int, Task]]:
    """Yield the first step, the number of steps and the task of each phase of a run."""
    found = steps.phases(task)
    ends = itertools.chain((first for first, _ in found[1:]), [task.total_steps])
    for (first, phase), end in zip(found, ends, strict=True):
        yield first, end - first, phase


def _count(function: Callable[..., object], *inputs: object) -> int:
    return matrix_flops(jax.make_jaxpr(function)(*inputs))
