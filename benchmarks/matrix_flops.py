"""Count the floating-point operations of convolutions and matrix products in a traced function."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: Jaxpr | ClosedJaxpr, unknown: int = 1) -> int:
    """Return the operations of `jaxpr` on one device: loops with all iterations, of a condition the larger branch.

    `unknown` iterations are assumed of the outer loops whose number is an argument. Like XLA, do not count products
    with padding, nor with the zeros that dilation inserts.
    """
    total = 0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(map(matrix_flops, params["branches"]))
        else:
            inner = [value for value in params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
            if name == "while":
                total += unknown * sum(map(matrix_flops, inner))
            else:
                total += params.get("length", 1) * sum(matrix_flops(one, unknown) for one in inner)
    return total


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    left, kernel, result = (value.aval.shape for value in (*equation.invars, *equation.outvars))
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    sizes = [(left[i], kernel[k], result[o]) for i, k, o in axes]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    settings = zip(*(params[name] for name in names), strict=True)
    pairs = math.prod(_pairs(*size, *setting) for size, setting in zip(sizes, settings, strict=True))
    batch, features = (result[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * pairs // params["batch_group_count"]


def _pairs(
    size: int, kernel: int, result: int, stride: int, padding: tuple[int, int], dilation: int, kernel_dilation: int
) -> int:
    """Return how many pairs of an output and a kernel position along an axis meet an element of the input."""
    reached = (o * stride + k * kernel_dilation - padding[0] for o in range(result) for k in range(kernel))
    return sum(at % dilation == 0 and 0 <= at // dilation < size for at in reached)
