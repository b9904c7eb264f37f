"""The training state, and its initialization."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, PyTree, UInt32

from cifar_flax import models
from cifar_flax.models.network import param_groups, require_functional
from cifar_flax.training import averaging
from cifar_flax.training.averaging import AveragingConfig


class TrainState(NamedTuple):
    """The arrays that training changes. Checkpoints name them by their paths and need no class of any library."""

    step: Int32[Array, ""]  # finished steps
    seed: UInt32[Array, ""]  # of all random bits; in the state, so that all seeds share one compiled step
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    average: PyTree  # of params and batch_stats, as averaging.py computes it; () without averaging

    def evaluated(self, config: AveragingConfig) -> PyTree:
        """Return the (params, batch_stats) to evaluate: their average for EMA, else the last ones."""
        return self.average if config.name == "ema" else (self.params, self.batch_stats)


def root_keys(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Return two keys derived from the seed: for the initial weights, and for augmentation and dropout."""
    weights, examples = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return weights, examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The graphdef of a network, the optimizer group of each parameter, and the initialization of its variables."""

    graphdef: nnx.GraphDef
    param_groups: PyTree[str]  # the optimizer group of each parameter
    init: Callable[[Array, Array | None], tuple[PyTree, PyTree]]  # as `init` below, but returns (params, batch_stats)


def create_model(
    model: models.ModelConfig,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    platform: str,
    norm_axis: str | None = None,
) -> Model:
    """Return the network that `model` describes, with the kernels that are fastest on `platform`.

    In training, BatchNorm averages over the mesh axis `norm_axis`; None: over the examples that the step
    sees, which is the whole batch with jit.
    Raise `UserError` if the network has variables other than `nnx.Param` and `nnx.BatchStat`.
    """

    def build(seed: Array, sample: Array | None) -> models.Network:
        network = models.build(model, image_shape, num_classes, platform=platform, rngs=nnx.Rngs(root_keys(seed)[0]))
        network.set_attributes(nnx.BatchNorm, axis_name=norm_axis, raise_if_not_found=False)
        if sample is not None:
            network.fit(sample)
        return network

    def init(seed: Array, sample: Array | None) -> tuple[PyTree, PyTree]:
        params, batch_stats = map(nnx.to_pure_dict, nnx.split(build(seed, sample), nnx.Param, nnx.BatchStat)[1:])
        return params, batch_stats

    abstract = nnx.eval_shape(lambda: build(jnp.uint32(0), None))
    require_functional(abstract, model.name)
    graphdef, *_ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    return Model(graphdef=graphdef, param_groups=param_groups(abstract), init=init)


def init(
    model: Model,
    optimizer: optax.GradientTransformation,
    average: AveragingConfig,
    seed: UInt32[Array, ""],
    sample: Float[Array, "n height width c"] | None,
) -> TrainState:
    """Return the initial state; `sample` has normalized training images, None if a checkpoint replaces the values."""
    params, batch_stats = model.init(seed, sample)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=seed,
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        average=averaging.init(average, (params, batch_stats)),
    )
