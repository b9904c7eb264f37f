"""The base classes of the networks and of their configs, and the optimizer group of each parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from cifar_flax.errors import UserError, require
from cifar_flax.models.layers import Conv

_MOST_PARAMETERS = 100_000_000  # of the layer that grows with the images: 1.6 GB with gradient and moments of Adam
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The settings that all networks have."""

    name: str  # key of the network in models.MODELS; set by the config file, not by a flag
    dtype: str = "float32"  # of activations: float32 | bfloat16 | float16 | auto; parameters and BatchNorm: float32

    def validate(self) -> None:
        """Raise `ConfigError` at the first field that is not allowed. Subclasses call this one first."""
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")


class Network(nnx.Module):
    """The base class of all networks; `models/__init__.py` describes what a subclass has to define."""

    sample_size: ClassVar[int] = 0  # number of training images that `fit` needs
    groups: ClassVar[Mapping[str, str]] = MappingProxyType({})  # attribute -> optimizer group of its parameters

    def fit(self, images: Float[Array, "n height width c"]) -> None:
        """Initialize the statistics that depend on the training data, from normalized training images."""


def require_size(model: str, image_shape: tuple[int, int, int], inputs: int, outputs: int) -> None:
    """Raise `ConfigError` if images are too large for a dense layer whose number of `inputs` grows with them."""
    height, width, _ = image_shape
    needed = f"images of {height}x{width} need {inputs * outputs:,} parameters in one layer, above {_MOST_PARAMETERS:,}"
    remedy = "Set a smaller data.image_size, or use resnet18 or airbench with model.global_pool."
    require(inputs * outputs <= _MOST_PARAMETERS, "model.name", model, f"{needed}. {remedy}")


def activation_dtype(name: str, platform: str) -> jnp.dtype:
    """Return the dtype that `name`, one of `DTYPES`, means; "auto" is float32 on "cpu" and bfloat16 elsewhere."""
    return jnp.dtype({"auto": "float32" if platform == "cpu" else "bfloat16"}.get(name, name))


def require_functional(network: Network, model: str) -> None:
    """Raise `UserError` if `network` has state besides `nnx.Param` and `nnx.BatchStat`, such as that of `nnx.Dropout`.

    Checkpoints do not save other state, and random bits must depend on the seed, the epoch and the example alone.
    """
    for path, module in nnx.iter_modules(network):
        for name, value in vars(module).items():
            if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
                where = ".".join(map(str, (*path, name)))
                raise UserError(f"model.name={model!r}: {where} is an array. Use nnx.BatchStat for a constant.")
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if isinstance(variable, nnx.RngState):
            owner = ".".join(map(str, path[:-2])) or "the network"
            raise UserError(
                f"model.name={model!r}: {owner} keeps random state, as nnx.Dropout does. "
                "Use cifar_flax.models.layers.dropout with the dropout_keys of __call__."
            )
        if not isinstance(variable, nnx.Param | nnx.BatchStat):
            found = f"{'.'.join(map(str, path))} is of type {type(variable).__name__}"
            raise UserError(f"model.name={model!r}: {found}. Variables must be nnx.Param or nnx.BatchStat.")


def param_groups(network: Network) -> PyTree[str]:
    """Return the optimizer group of each parameter, in the structure of the parameters.

    The kernels of convolutions are "convolutions". All other parameters named `kernel` or `embedding`, of any number of
    axes, are "dense". The rest (biases, scales, tokens) are "biases". `network.groups` has precedence.
    """
    owners = dict(nnx.iter_modules(network))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    if unknown := network.groups.keys() - params.keys():
        raise UserError(f"{type(network).__name__}.groups: {min(unknown)} must be an attribute with parameters")

    def group(path: tuple[Any, ...]) -> str:
        if path[0] in network.groups:
            return network.groups[path[0]]
        if path[-1] not in ("kernel", "embedding"):
            return "biases"
        is_convolution = isinstance(owners[path[:-1]], Conv | nnx.Conv | nnx.ConvTranspose)
        return "convolutions" if is_convolution else "dense"

    return jax.tree.map_with_path(lambda path, _: group(tuple(entry.key for entry in path)), params)
