"""What a network takes to compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cifar_flax import models


def forward_flops(config: models.ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Operations for one image: twice the multiplications of convolutions and matrix products.

    Counted in the network as accelerators compute it. Training takes three times as many.
    """
    shape = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def forward(image: jax.Array) -> jax.Array:
        return models.build(config, image_shape, num_classes, platform="cuda", rngs=nnx.Rngs(0))(image)

    return _flops(jax.make_jaxpr(forward)(shape).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            total += 2 * equation.outvars[0].aval.size * int(np.prod(equation.invars[1].aval.shape[:3]))
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([operand[axis] for axis in contracted]))
        for inner in equation.params.values():
            total += _flops(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return total
