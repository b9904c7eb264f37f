"""List the layers of a network with their parameters and FLOPs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cifar_flax import models


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module with variables (parameters or statistics) of its own."""

    name: str  # path of its variables in a checkpoint
    kind: str  # class name
    shape: tuple[int, ...]  # output shape for one image
    parameters: int  # number of trainable values
    statistics: int  # number of values computed from the data, such as BatchNorm's running mean
    flops: int  # of the forward pass, per image


def summarize(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """Return a table of the layers, in call order, with a row of totals."""
    found = layers(config, image_shape, num_classes)
    parameters, statistics, flops = np.sum([(one.parameters, one.statistics, one.flops) for one in found], axis=0)
    rows = [("layer", "kind", "output", "parameters", "statistics", "FLOPs per image")]
    for one in found:
        counts = (f"{one.parameters:,}", f"{one.statistics:,}", f"{one.flops:,}")
        rows.append((one.name, one.kind, _size(one.shape), *counts))
    rows.append(("total", "", "", f"{parameters:,}", f"{statistics:,}", f"{flops:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{config.name} for images of {_size(image_shape)} and {num_classes} classes"]
    for name, kind, *cells in rows:
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True)]
        lines.append("  ".join(["", f"{name:{widths[0]}}", f"{kind:{widths[1]}}", *numbers]))
    lines.append(
        f"  {4 * parameters / 1e6:,.2f} MB of parameters; {3 * flops:,} FLOPs per image in training (3 x forward)"
    )
    lines.append("  FLOPs count convolutions and matrix products, as computed on accelerators")
    return "\n".join(lines)


def layers(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> list[Layer]:
    """Return the layers of the network in its implementation for accelerators, in call order."""
    found: list[Layer] = []

    def observe(path: tuple[Any, ...], node: Any) -> Any:
        is_layer = isinstance(node, nnx.Module) and any(isinstance(own, nnx.Variable) for own in vars(node).values())
        return _Observed(node, ".".join(map(str, path)) or config.name, found) if is_layer else node

    _trace(config, image_shape, num_classes, observe)
    return found


def forward_flops(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Return the FLOPs of one image's forward pass: two per multiplication in convolutions and matrix products.

    They are counted in the implementation for accelerators. Training takes three times as many.
    """
    return _flops(_trace(config, image_shape, num_classes, lambda path, node: node))


class _Observed(nnx.Module):
    """Wrap `layer`, and insert its description into `found` at each call, before those of the layers inside it."""

    def __init__(self, layer: nnx.Module, name: str, found: list[Layer]):
        self.layer, self.name, self.found = layer, name, nnx.static(found)

    def __call__(self, *args: Any, **settings: Any) -> Array:
        start = len(self.found)
        out = self.layer(*args, **settings)
        inner = self.found[start:]
        flops = _flops(jax.make_jaxpr(lambda: self.layer(*args, **settings))().jaxpr)
        own = Layer(
            name=self.name,
            kind=type(self.layer).__name__,
            shape=out.shape[1:],
            parameters=_count(self.layer, nnx.Param),
            statistics=_count(self.layer, nnx.BatchStat),
            flops=flops - sum(layer.flops for layer in inner),
        )
        self.found[start:] = [own, *inner]  # the second trace has added the inner layers again
        return out


def _trace(
    config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int, replace: Callable[..., Any]
) -> Any:
    """Return the jaxpr of one image's forward pass, with `replace` applied to each module, without computing it."""

    def forward(image: Float[Array, "1 h w c"]) -> Array:
        network = models.build(config, image_shape, num_classes, platform="cuda", rngs=nnx.Rngs(0))
        return nnx.recursive_map(replace, network)(image)

    return jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).jaxpr


def _count(module: nnx.Module, kind: type[nnx.Variable]) -> int:
    """Return the size of the module's own variables, without those of the modules inside it."""
    return sum(own.get_value().size for own in vars(module).values() if isinstance(own, kind))


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
