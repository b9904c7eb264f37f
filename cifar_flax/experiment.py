"""What a config and a data set make together: the network, its optimizer and the first state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt8

from cifar_flax import compilation, distributed, optim, state
from cifar_flax import config as configs
from cifar_flax.config import Config
from cifar_flax.data import order
from cifar_flax.data.augment import normalize
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError, require
from cifar_flax.parallel import make_layout
from cifar_flax.state import TrainState
from cifar_flax.steps import Task

_CHUNK = 1000  # images
_MAX_EXAMPLES = 2**28  # shown in one run: streaming holds their order in memory, 8 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What a trained network must know of its training data; saved with every checkpoint."""

    name: str  # with its version
    image_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]
    num_examples: int  # trained on
    mean: tuple[float, ...]  # per channel, in units of the stored bytes
    std: tuple[float, ...]

    @classmethod
    def of(cls, arrays: Arrays, examples: Int32[np.ndarray, " n"], normalization: str) -> "DatasetInfo":
        """Describes `examples`. Statistics are exact: integers are summed, then divided once."""
        _, height, width, channels = arrays.images.shape
        mean, std = (0.0,) * channels, (255.0,) * channels
        if normalization == "standard":
            mean, std = _mean_and_std(arrays.images, examples)
        return cls(
            name=arrays.dataset,
            image_shape=(height, width, channels),
            class_names=arrays.class_names,
            num_examples=len(examples),
            mean=mean,
            std=std,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetInfo":
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, arrays: Arrays) -> None:
        """Raises `UserError` if `arrays` cannot be classified by a network trained on this data."""
        for what, ours, theirs in (
            ("images of shape", self.image_shape, arrays.images.shape[1:]),
            ("classes", self.class_names, arrays.class_names),
        ):
            if ours != theirs:
                raise UserError(f"{arrays.dataset} has {what} {theirs}, the checkpoint was trained on {what} {ours}")


# From a seed and the training images that the network looks at first (`models.sample_size` of them) to the state before
# the first step; where a checkpoint will be restored, there is no need of the images.
Init = Callable[[int, UInt8[Any, "n height width c"] | None], TrainState]


def build(
    config: Config, info: DatasetInfo, devices: Sequence[jax.Device] | None = None, *, platform: str | None = None
) -> tuple[Task, Init]:
    """The static part of the steps, and what makes the first state, compiled once for all seeds.

    They run on `devices`, by default all there are, with the network written for `platform`, by default theirs.

    Raises `ConfigError` where the config does not fit the data or the devices, `UserError` where processes of one run
    disagree on config or data.
    """
    layout, sync_batchnorm = make_layout(config.parallel, devices, config.deterministic), config.train.sync_batchnorm
    distributed.require_agreement(config=configs.shared(config), backend=layout.backend, data=info.to_dict())
    fits = sync_batchnorm or layout.backend != "jit" or layout.num_devices == 1
    allowed = "must be True where parallel.backend is jit, which knows the whole batch only"
    require(fits, "train.sync_batchnorm", sync_batchnorm, allowed)
    size, batch_size = info.num_examples, config.train.batch_size
    require(
        batch_size <= size, "train.batch_size", batch_size, f"must be at most the {size} examples of the train split"
    )
    config.augment.validate_for(info.image_shape)
    epochs, every = config.train.epochs, config.optim.accumulate_steps
    require(epochs * size <= _MAX_EXAMPLES, "train.epochs", epochs, f"must be at most {_MAX_EXAMPLES / size:.0f}")
    epoch_images = order.epoch_images(size, batch_size, config.data.drop_last)
    steps = order.total_steps(epochs, size, batch_size, config.data.drop_last)
    require(every <= steps, "optim.accumulate_steps", every, f"must be at most the {steps} steps of the run")
    traced = config.profile.steps
    require(traced[1] <= steps, "profile.steps", traced, f"must end within the {steps} steps of the run")
    steps_per_epoch = epoch_images / batch_size
    optimizer = optim.make_optimizer(config.optim, steps, steps_per_epoch)
    graphdef, create = state.create(
        config.model,
        info.image_shape,
        len(info.class_names),
        optimizer,
        config.averaging,
        platform=platform or layout.platform,
        norm_axis=layout.axis_name if sync_batchnorm else None,
    )
    task = Task(
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=optim.make_schedule(config.optim, steps, steps_per_epoch),
        mean=info.mean,
        std=info.std,
        augment=config.augment,
        label_smoothing=config.train.label_smoothing,
        averaging=config.averaging,
        total_steps=steps,
        layout=layout,
        sync_batchnorm=sync_batchnorm,
        skip_nonfinite=config.on_nonfinite == "skip",
    )

    options = compilation.options(layout.platform, deterministic=True) if layout.deterministic else None

    @functools.partial(jax.jit, out_shardings=layout.replicated, compiler_options=options)
    def init(seed: Array, sample: Array | None) -> TrainState:
        return create(seed, None if sample is None else normalize(sample, info.mean, info.std))

    return task, lambda seed, sample: init(np.uint32(seed), None if sample is None else layout.replicate(sample))


def _mean_and_std(images: np.ndarray, examples: Int32[np.ndarray, " n"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, over all pixels of `examples`."""
    histogram = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(examples), _CHUNK):
        chunk = images[examples[start : start + _CHUNK]]
        for channel, counts in enumerate(histogram):
            counts += np.bincount(chunk[..., channel].ravel(), minlength=256)
    value, count = np.arange(256), histogram.sum(axis=1)
    mean = histogram @ value / count
    variance = histogram @ value**2 / count - mean**2
    # A channel that never changes carries no information; dividing by 1 keeps it finite.
    std = np.sqrt(np.where(variance > 0, variance, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())
