"""List the layers of a network with their parameters and FLOPs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cifar_flax import models
from cifar_flax.models.flops import matrix_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module with FLOPs, parameters or statistics of its own, besides those of the modules inside it."""

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
    recorders: list[_Recorder] = []

    def call(network: models.Network, image: Array) -> Array:
        recorders.append(_Recorder(network, config.name))
        return network(image)

    _trace(config, image_shape, num_classes, call)
    return recorders[0].layers()


def forward_flops(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Return the FLOPs of one image's forward pass: two per multiplication in convolutions and matrix products.

    They are counted in the implementation for accelerators.
    """
    return matrix_flops(_trace(config, image_shape, num_classes, lambda network, image: network(image)))


class _Recorder:
    """Record the output shape and the FLOPs of each module of a network in its first call."""

    def __init__(self, network: nnx.Module, name: str):
        containers = nnx.List | nnx.Dict  # their variables count for the module that holds them
        modules = {path: one for path, one in nnx.iter_modules(network) if not isinstance(one, containers)}
        self._variables = nnx.to_flat_state(nnx.state(network))
        self._names = {path: ".".join(map(str, path)) or name for path in modules}
        self._kinds = {self._names[path]: type(module).__name__ for path, module in modules.items()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._flops: Counter[str] = Counter()
        self._active: set[str] = set()  # modules whose calls are in progress
        self._is_counting = False
        for path, module in modules.items():
            if callable(module):
                self._record(module, self._names[path])

    def layers(self) -> list[Layer]:
        """Return the modules with FLOPs or variables of their own, in call order; modules without calls come last."""
        sizes = {nnx.Param: Counter[str](), nnx.BatchStat: Counter[str]()}
        for path, variable in self._variables:
            owner = next(path[:end] for end in range(len(path) - 1, -1, -1) if path[:end] in self._names)
            kind = nnx.Param if isinstance(variable, nnx.Param) else nnx.BatchStat
            sizes[kind][self._names[owner]] += variable.get_value().size
        return [
            Layer(
                name=name,
                kind=self._kinds[name],
                shape=self._shapes.get(name, ()),
                parameters=sizes[nnx.Param][name],
                statistics=sizes[nnx.BatchStat][name],
                flops=self._flops[name],
            )
            for name in dict.fromkeys((*self._shapes, *self._kinds))
            if self._flops[name] or any(size[name] for size in sizes.values())
        ]

    def _record(self, module: nnx.Module, name: str) -> None:
        """Record the calls of `module`: derive a class of its own with another `__call__`."""
        kind: Any = type(module)

        def recorded(module: nnx.Module, *args: Any, **settings: Any) -> Array:
            if name in self._active or self._is_counting:
                return kind.__call__(module, *args, **settings)
            self._shapes.setdefault(name, ())  # callers come before the modules that they call
            before = self._flops.total()
            self._active.add(name)
            out = kind.__call__(module, *args, **settings)
            self._is_counting = True
            flops = matrix_flops(jax.make_jaxpr(lambda: kind.__call__(module, *args, **settings))().jaxpr)
            self._is_counting = False
            self._active.remove(name)
            self._flops[name] += before + flops - self._flops.total()
            self._shapes[name] = out.shape[1:]
            return out

        object.__setattr__(module, "__class__", type(kind)(kind.__name__, (kind,), {"__call__": recorded}))


def _trace(
    config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int, call: Callable[..., Array]
) -> Any:
    """Return the jaxpr of `call(network, image)` for one image, without computing it."""

    def forward(image: Float[Array, "1 h w c"]) -> Array:
        # For a TPU, all convolutions are operations of their own.
        return call(models.build(config, image_shape, num_classes, platform="tpu", rngs=nnx.Rngs(0)), image)

    return jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).jaxpr


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
