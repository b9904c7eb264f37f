"""Count the floating-point operations of convolutions and matrix products in a traced function."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def matrix_flops(jaxpr: Jaxpr | ClosedJaxpr, unknown: int = 1) -> int:
    """Return the operations that `jaxpr` executes on one device: two per multiply-add.

    Loops count with all iterations, a condition with its larger branch; results that are not used do not count. An
    outer loop whose number of iterations is an argument counts as `unknown` iterations. Products with padding count,
    but not those with the zeros that dilation inserts: a convolution with padding SAME and stride 1, the gradient of
    its input and that of its kernel have equally many operations.
    """
    plain: Any = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    plain, _ = dce_jaxpr(plain, [True] * len(plain.outvars))
    total = 0
    for equation in plain.eqns:
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
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    axes = zip(numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    settings = (params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    pairs = (_pairs(result[o], kernel[k], *row) for (k, o), *row in zip(axes, *settings, strict=True))
    batch, features = (result[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * math.prod(pairs)


def _pairs(result: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, kernel_dilation: int) -> int:
    """Return how many pairs of an output and a kernel position along an axis meet no zero that dilation inserts."""
    if dilation == 1:
        return result * kernel
    reached = (o * stride + k * kernel_dilation - padding[0] for o in range(result) for k in range(kernel))
    return sum(at % dilation == 0 for at in reached)
