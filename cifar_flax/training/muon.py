"""Muon for convolution kernels: orthogonalized Nesterov momentum, and kernels of a fixed norm.

Convolution kernels are padded to a common shape and processed together, so that an accelerator runs few operations.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the norm of the kernels is from
the repository KellerJordan/cifar10-airbench.
"""

from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

# Coefficients of x -> a x + b x^3 + c x^5. They maximize the slope at zero, so that three steps suffice; singular
# values end near 1, not at 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_DTYPE = jnp.bfloat16  # the direction of an update tolerates rounding


def muon(schedule: optax.Schedule, momentum: float) -> optax.GradientTransformation:
    """Orthogonalize the Nesterov momentum, and scale each kernel to the norm sqrt(number of filters) before a step."""
    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonal_kernels(updates)),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(_from_fixed_norm),
    )


def _from_fixed_norm(updates: PyTree, kernels: PyTree) -> PyTree:
    """Return the updates that also scale each kernel [..., c_out] to the norm sqrt(c_out)."""
    leaves, structure = jax.tree.flatten(kernels)
    if not leaves:  # a network without convolutions
        return updates
    squares = [jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))) for kernel in leaves]
    norms = jnp.sqrt(jnp.sum(stack_padded(squares), axis=1))
    scaling = [kernel * (jnp.sqrt(kernel.shape[-1]) / norm - 1) for kernel, norm in zip(leaves, norms, strict=True)]
    return jax.tree.map(jnp.add, updates, jax.tree.unflatten(structure, scaling))


def orthogonal_kernels(updates: PyTree) -> PyTree:
    """Orthogonalize updates of kernels [..., c_out] as matrices whose columns are the filters.

    Matrices with shorter sides of the same length are one batch, in which zeros pad the longer sides: they change
    neither the singular values nor the other elements.
    """
    leaves, structure = jax.tree.flatten(updates)
    batches: dict[int, list[int]] = defaultdict(list)
    for number, leaf in enumerate(leaves):
        batches[min(_matrix_shape(leaf))].append(number)
    for numbers in batches.values():
        results = orthogonalize(stack_padded([_to_wide(leaves[number]) for number in numbers]), MUON_DTYPE)
        for number, result in zip(numbers, results, strict=True):
            leaves[number] = _from_wide(result, leaves[number]).astype(jnp.float32)
    return jax.tree.unflatten(structure, leaves)


def _matrix_shape(kernel: Float[Array, "*shape c_out"]) -> tuple[int, int]:
    return kernel.size // kernel.shape[-1], kernel.shape[-1]


def _to_wide(kernel: Float[Array, "*shape c_out"]) -> Float[Array, "shorter longer"]:
    matrix = kernel.reshape(_matrix_shape(kernel))
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _from_wide(padded: Float[Array, "shorter longest"], kernel: Float[Array, "*shape c_out"]) -> Array:
    """Return the kernel of the shape of `kernel` that `_to_wide` and padding turned into `padded`."""
    rows, columns = _matrix_shape(kernel)
    matrix = padded[:, : max(rows, columns)]
    return (matrix.T if rows > columns else matrix).reshape(kernel.shape)


def stack_padded(arrays: Sequence[Array]) -> Shaped[Array, "n ..."]:
    """Return a stack of arrays of the same rank, padded with zeros at the end of each axis to the longest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    missing = [shape - array.shape for array in arrays]
    return jnp.stack([jnp.pad(array, [(0, n) for n in own]) for array, own in zip(arrays, missing, strict=True)])


def orthogonalize(
    matrices: Float[Array, "n rows columns"], dtype: DTypeLike, steps: int = 3
) -> Float[Array, "n rows columns"]:
    """Return nearly orthogonal matrices with the singular vectors of `matrices`, by Newton-Schulz iteration.

    If U S V' is the singular value decomposition of a matrix divided by its Frobenius norm, the result is U p(S) V',
    where p is the polynomial of `NEWTON_SCHULZ` composed with itself `steps` times. Computed in `dtype`, fastest if
    there are fewer rows than columns.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True) + 1e-7)).astype(dtype)
    identity = jnp.eye(x.shape[1], dtype=dtype)[None]
    for _ in range(steps):
        gram = x @ x.mT
        # One product with x, without a term a * x, since a GPU would add that in a kernel of its own.
        x = (a * identity + b * gram + c * gram @ gram) @ x
    return x
