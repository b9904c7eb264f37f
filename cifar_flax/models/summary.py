"""What a network consists of, and what it takes to compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cifar_flax import models
from cifar_flax.models.layers import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that has weights of its own."""

    name: str  # the path of its weights in a checkpoint
    kind: str
    shape: tuple[int, ...]  # of the output for one image
    parameters: int  # numbers that train
    statistics: int  # numbers that follow from the data
    flops: int  # of the forward pass, for one image


def summarize(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """A table of the layers, in the order in which they are called, and of all together."""
    found = layers(config, image_shape, num_classes)
    parameters, statistics, flops = (
        sum(column) for column in zip(*((one.parameters, one.statistics, one.flops) for one in found), strict=True)
    )
    rows = [("layer", "kind", "output", "parameters", "statistics", "FLOPs per image")]
    rows += [
        (one.name, one.kind, _size(one.shape), f"{one.parameters:,}", f"{one.statistics:,}", f"{one.flops:,}")
        for one in found
    ]
    rows.append(("total", "", "", f"{parameters:,}", f"{statistics:,}", f"{flops:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {name:{widths[0]}}  {kind:{widths[1]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
        for name, kind, *cells in rows
    ]
    return "\n".join(
        [
            f"{config.name} for images of {_size(image_shape)} and {num_classes} classes",
            *lines,
            f"  {4 * parameters / 1e6:,.2f} MB of parameters; {3 * flops:,} FLOPs per image in training, 3 x forward",
            "  FLOPs: of convolutions and matrix products, as accelerators compute them",
        ]
    )


def layers(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> list[Layer]:
    """Those of the network as accelerators compute it, in the order in which they are called."""
    found: list[Layer] = []

    def observe(path: tuple[Any, ...], node: Any) -> Any:
        is_layer = isinstance(node, nnx.Module) and any(isinstance(own, nnx.Variable) for own in vars(node).values())
        return _Observed(node, ".".join(map(str, path)), found.append) if is_layer else node

    _trace(lambda image: nnx.recursive_map(observe, _build(config, image_shape, num_classes))(image), image_shape)
    return found


def forward_flops(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Operations for one image: twice the multiplications of convolutions and matrix products.

    Counted in the network as accelerators compute it. Training takes three times as many.
    """
    return _flops(_trace(lambda image: _build(config, image_shape, num_classes)(image), image_shape))


class _Observed(nnx.Module):
    """Stands in a network where `layer` stood, and reports each of its calls."""

    def __init__(self, layer: nnx.Module, name: str, report: Callable[[Layer], None]):
        self.layer, self.name, self.report = layer, name, report

    def __call__(self, *args: Any, **settings: Any) -> Array:
        out = self.layer(*args, **settings)
        self.report(
            Layer(
                name=self.name,
                kind=type(self.layer).__name__,
                shape=out.shape[1:],
                parameters=_count(self.layer, nnx.Param),
                statistics=_count(self.layer, nnx.BatchStat),
                flops=_flops(jax.make_jaxpr(lambda: self.layer(*args, **settings))().jaxpr),
            )
        )
        return out


def _build(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> Network:
    return models.build(config, image_shape, num_classes, platform="cuda", rngs=nnx.Rngs(0))


def _trace(forward: Callable[[Float[Array, "1 h w c"]], Array], image_shape: tuple[int, int, int]) -> Any:
    """What `forward` does with one image; nothing is computed."""
    return jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).jaxpr


def _count(module: nnx.Module, kind: type[nnx.Variable]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            total += 2 * equation.outvars[0].aval.size * math.prod(equation.invars[1].aval.shape[:3])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(operand[axis] for axis in contracted)
        for inner in equation.params.values():
            total += _flops(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return total
