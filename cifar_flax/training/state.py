"""All that training changes, and how it begins."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, PyTree, UInt32

from cifar_flax import models
from cifar_flax.training import averaging
from cifar_flax.training.averaging import AveragingConfig


class TrainState(NamedTuple):
    """Plain nested dicts of arrays, so that no checkpoint depends on a library's classes."""

    step: Int32[Array, ""]  # finished steps
    seed: UInt32[Array, ""]  # of every random bit; in the state, so that all seeds share one compiled step
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    average: PyTree  # of params and batch_stats, as averaging.py keeps it


def root_keys(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The roots of all random bits of a run: for the initial weights, and for the examples."""
    weights, examples = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return weights, examples


# From a seed and the `models.sample_size` normalised training images that the network looks at, if it looks at any, to
# the state before the first step; without the images it is good for its shapes alone.
Init = Callable[[UInt32[Array, ""], Float[Array, "n height width c"] | None], TrainState]


def create(
    model: models.ModelConfig,
    image_shape: tuple[int, int, int],
    num_classes: int,
    optimizer: optax.GradientTransformation,
    average: AveragingConfig,
    *,
    platform: str,
    norm_axis: str | None = None,
) -> tuple[nnx.GraphDef, Init]:
    """The network's static graph, as `platform` has it fast, and what makes its first state.

    Batch statistics are those of the batch over all devices of `norm_axis`; None: of the batch that the step sees.
    """

    def build(seed: Array, sample: Array | None) -> tuple[nnx.GraphDef, PyTree, PyTree]:
        network = models.build(model, image_shape, num_classes, platform=platform, rngs=nnx.Rngs(root_keys(seed)[0]))
        network.set_attributes(nnx.BatchNorm, axis_name=norm_axis, raise_if_not_found=False)
        if sample is not None:
            network.fit(sample)
        graphdef, *variables = nnx.split(network, nnx.Param, nnx.BatchStat)
        params, batch_stats = map(nnx.to_pure_dict, variables)
        return graphdef, params, batch_stats

    def init(seed: Array, sample: Array | None) -> TrainState:
        _, params, batch_stats = build(seed, sample)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            seed=seed,
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            average=averaging.init(average, (params, batch_stats)),
        )

    graphdef, _, _ = nnx.eval_shape(lambda: build(jnp.uint32(0), None))
    return graphdef, init
