"""Maxima whose gradients are cheap on a CPU: the winner is kept as one byte."""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax.lax import broadcasted_iota, optimization_barrier
from jaxtyping import Array, Float, UInt8


def first_max(places: Sequence[Float[Array, "*shape"]]) -> tuple[Float[Array, "*shape"], UInt8[Array, "*shape"]]:
    """The maximum of arrays, element by element, and the number of the first that has it."""
    # Both are written to memory: XLA would rather read all places again for each use of the maximum.
    largest = optimization_barrier(reduce(jnp.maximum, places))
    winner = jnp.full(largest.shape, len(places) - 1, jnp.uint8)
    for number, place in reversed(list(enumerate(places[:-1]))):
        winner = jnp.where(place == largest, jnp.uint8(number), winner)
    return largest, optimization_barrier(winner)


@jax.custom_vjp
def max_over_places(x: Float[Array, "*shape 4 c"]) -> Float[Array, "*shape c"]:
    """Maximum over the last axis but one; of equal values the first gets the gradient."""
    return _forward(x)[0]


def _forward(x: Array) -> tuple[Array, UInt8[Array, "..."]]:
    return first_max([x[..., place, :] for place in range(4)])


def _backward(winner: Array, dy: Array) -> tuple[Array]:
    winner, dy = optimization_barrier((winner, dy))
    # One comparison for all places: four, put together afterwards, are slower on a CPU.
    *shape, channels = winner.shape
    place = broadcasted_iota(winner.dtype, (*shape, 4, channels), len(shape))
    return (jnp.where(winner[..., None, :] == place, dy[..., None, :], 0),)


max_over_places.defvjp(_forward, _backward)
