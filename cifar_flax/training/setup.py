"""Build the network, the optimizer and the initial state from a config and a dataset."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt8

from cifar_flax import config as configs
from cifar_flax.config import Config
from cifar_flax.data import order
from cifar_flax.data.augment import normalize
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import ConfigError, require
from cifar_flax.models.network import FROZEN, freeze_backbone
from cifar_flax.runtime import compilation, processes
from cifar_flax.runtime.devices import Layout, make_layout
from cifar_flax.training import optimizers, state
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import Task

_MAX_EXAMPLES = 2**31 - 1  # of all epochs: the step is an int32
_FLOAT16_LOSS_SCALE = 2.0**11  # gradients of a mean loss are otherwise below 6e-5, where float16 loses precision

# (seed, `Network.sample_size` training images, equal in all processes) -> initial state. The images may be None if a
# checkpoint replaces the values.
Init = Callable[[int, UInt8[Any, "n height width c"] | None], TrainState]


def checked_layout(config: Config, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Return the layout of the run on `devices` (default: all). Raise `UserError` if the config does not fit them."""
    layout, sync_batchnorm = make_layout(config.parallel, devices, config.deterministic), config.train.sync_batchnorm
    processes.require_agreement(config=configs.shared(config), backend=layout.backend)
    fits = sync_batchnorm or layout.backend != "jit" or layout.num_devices == 1
    allowed = "must be True if parallel.backend is jit, which computes on the whole batch only"
    require(fits, "train.sync_batchnorm", sync_batchnorm, allowed)
    return layout


def _class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Return n / (k n_c) for a class with n_c of the n training examples, if k classes have any; otherwise 0.

    The mean over the training examples is 1. Source: King and Zeng 2001, "Logistic Regression in Rare Events Data"
    (weighting).
    """
    return tuple(sum(counts) / (np.count_nonzero(counts) * count) if count else 0.0 for count in counts)


def require_resolutions(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise `ConfigError` unless the network has the same variables at each size of `train.resolutions`.

    `image_shape` is (height, width, channels).
    """
    pairs, (height, width, channels) = config.train.resolutions, image_shape
    if not pairs:
        return
    require(height == width, "train.resolutions", pairs, f"needs square images, but these are {height}x{width}")
    fits = all(side <= height for _, side in pairs)
    require(fits, "train.resolutions", pairs, f"sides must be at most {height} pixels, the size of the images")

    def variables(side: int) -> list[tuple[int, ...]]:
        model = state.create_model(config.model, (side, side, channels), num_classes, platform="cpu")
        shapes = jax.eval_shape(model.init, jax.ShapeDtypeStruct((), np.uint32), None)
        return [leaf.shape for leaf in jax.tree.leaves(shapes)]

    whole = variables(height)
    for side in sorted({side for _, side in pairs} - {height}):
        allowed = f"{config.model.name} has other parameters at {side}x{side} than at {height}x{width} pixels"
        try:
            fits = variables(side) == whole
        except ConfigError:
            fits, allowed = False, f"{side}x{side} pixels are too few for {config.model.name}"
        require(fits, "train.resolutions", pairs, f"{allowed}. Use resnet18, or airbench with model.global_pool.")


def setup(
    config: Config, info: DatasetInfo, devices: Sequence[jax.Device] | None = None, *, platform: str | None = None
) -> tuple[Task, Init]:
    """Return the `Task` of a run, and a jitted function that initializes the training state for any seed.

    `devices` are those of the run (default: all), `platform` chooses the network's kernels (default: that of the
    devices).

    Raise `ConfigError` if the config does not fit the data or the devices, and `UserError` if the processes of one run
    disagree on config or data, or if the network cannot be trained.
    """
    layout, sync_batchnorm = checked_layout(config, devices), config.train.sync_batchnorm
    processes.require_agreement(data=info.to_dict())
    size, batch_size = info.num_examples, config.train.batch_size
    allowed = f"must be at most the {size} examples of the train split, such as {2 ** (size.bit_length() - 1)}"
    require(batch_size <= size, "train.batch_size", batch_size, allowed)
    config.augment.validate_for(info.image_shape)
    epochs, every = config.train.epochs, config.optim.accumulate_steps
    require(epochs * size <= _MAX_EXAMPLES, "train.epochs", epochs, f"must be at most {_MAX_EXAMPLES / size:.0f}")
    steps = order.total_steps(epochs, size, batch_size, config.data.drop_last)
    steps_per_epoch = order.epoch_images(size, batch_size, config.data.drop_last) / batch_size
    require(every <= steps, "optim.accumulate_steps", every, f"must be at most the {steps} steps of the run")
    traced = config.profile.steps
    require(traced[1] <= steps, "profile.steps", traced, f"must end within the {steps} steps of the run")
    model = state.create_model(
        config.model, info.image_shape, len(info.class_names),
        platform=platform or layout.platform, norm_axis=layout.axis_name if sync_batchnorm else None,
    )  # fmt: skip
    groups = model.param_groups
    if config.train.freeze == "backbone":
        groups = freeze_backbone(groups, config.model.name)
    frozen_from = {
        name: step
        for name, step in (optimizers.frozen_steps(config.optim, steps_per_epoch) | {FROZEN: 0}).items()
        if step < steps and name in jax.tree.leaves(groups)
    }
    # The initial optimizer state does not depend on the learning rates, which evaluation and prediction do not compute.
    optimizers.make_schedule(config.optim, steps, steps_per_epoch)  # only to check it
    optimizer = optimizers.make_optimizer(config.optim, optimizers.NO_RATES, groups)
    task = Task(
        graphdef=model.graphdef,
        optim=config.optim,
        image_shape=info.image_shape,
        mean=info.mean,
        std=info.std,
        augment=config.augment,
        num_classes=len(info.class_names),
        label_smoothing=config.train.label_smoothing,
        class_weights=_class_weights(info.class_counts) if config.train.class_weights == "balanced" else (),
        averaging=config.averaging,
        total_steps=steps,
        steps_per_epoch=steps_per_epoch,
        layout=layout,
        sync_batchnorm=sync_batchnorm,
        loss_scale=_FLOAT16_LOSS_SCALE if config.model.dtype == "float16" else 1.0,
        skip_nonfinite=config.on_nonfinite == "skip",
        param_groups=groups,
        frozen_from=frozen_from,
        sides=tuple(
            (step, side) for epoch, side in config.train.resolutions if (step := round(epoch * steps_per_epoch)) < steps
        ),
    )
    options = compilation.options(layout.platform, deterministic=True) if layout.deterministic else None

    @functools.partial(jax.jit, out_shardings=layout.replicated, compiler_options=options)
    def init(seed: Array, sample: Array | None) -> TrainState:
        normalized = None if sample is None else normalize(sample, info.mean, info.std)
        return state.init(model, optimizer, config.averaging, seed, normalized)

    return task, lambda seed, sample: init(np.uint32(seed), sample)
