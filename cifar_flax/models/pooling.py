"""Max-pooling over disjoint squares or whole images, with the gradient that is fastest on each platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8


def max_pool(
    x: Float[Array, "batch height width c"], window: int = 2, *, platform: str
) -> Float[Array, "batch h_out w_out c"]:
    """Return the maximum over disjoint `window` x `window` squares. Drop rows and columns that fill no window.

    If a window contains its maximum more than once, the first of these elements gets the whole gradient, as in PyTorch.
    The maximum of a window that contains NaN is NaN; the gradient goes to any of its elements. Forward-mode
    differentiation (`jax.jvp`) is not supported.
    """
    return max_of_windows(x, window) if platform == "tpu" else max_with_places(x, window)


def global_max_pool(x: Float[Array, "batch height width c"]) -> Float[Array, "batch c"]:
    """Return the maximum over height and width, which is NaN if any element is. The first maximum gets the gradient.

    Maximum and gradient are selected by the place of the maximum: no compiler can make them disagree by computing `x`
    a second time with another rounding.
    """
    places = x.reshape(x.shape[0], -1, x.shape[-1])
    number = lax.broadcasted_iota(jnp.int32, places.shape, 1)
    is_first = number == jnp.argmax(places, axis=1, keepdims=True)
    return jnp.where(is_first, places, jnp.zeros((), x.dtype)).sum(axis=1)


def max_of_windows(x: Float[Array, "batch height width c"], window: int) -> Float[Array, "batch h_out w_out c"]:
    """Return `max_pool(x, window)`, computed by XLA's reduce-window, whose gradient is its select-and-scatter.

    A TPU computes both in one pass and with bitwise reproducible results. On a GPU, the gradient is a sum by atomic
    operations, in any order.
    """
    shape = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_with_places(x: Float[Array, "batch height width c"], window: int) -> Float[Array, "batch h_out w_out c"]:
    """Return `max_pool(x, window)`, saving for the gradient only the place of each maximum, as one byte.

    The gradient of `jnp.max` instead compares `x` with its maximum again, and is NaN if the compiler computes `x` a
    second time with another rounding.
    """
    return _maximum(x, window)[0]


def _maximum(x: Array, window: int) -> tuple[Array, UInt8[Array, "batch h_out w_out c"]]:
    """Return the maximum of each window, and its place in the window, row by row."""
    height, width = (size // window * window for size in x.shape[1:3])
    best = x[:, :height:window, :width:window]
    place = jnp.zeros(best.shape, jnp.uint8)
    for number in range(1, window**2):
        candidate = x[:, number // window : height : window, number % window : width : window]
        is_better = (candidate > best) | jnp.isnan(candidate)
        best, place = jnp.where(is_better, candidate, best), jnp.where(is_better, jnp.uint8(number), place)
    return best, place


def _forward(x: Array, window: int) -> tuple[Array, tuple[Array, Array]]:
    best, place = _maximum(x, window)
    # Only arrays can be saved for the gradient: an empty one carries the height and width of `x`.
    return best, (place, jnp.zeros((*x.shape[1:3], 0)))


def _backward(window: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    place, whole = saved
    batch, h_out, w_out, c = dy.shape
    number = jnp.arange(window**2, dtype=jnp.uint8).reshape(1, 1, window, 1, window, 1)
    dx = jnp.where(place[:, :, None, :, None, :] == number, dy[:, :, None, :, None, :], jnp.zeros((), dy.dtype))
    dx = dx.reshape(batch, h_out * window, w_out * window, c)
    height, width = whole.shape[:2]
    return (jnp.pad(dx, ((0, 0), (0, height - h_out * window), (0, width - w_out * window), (0, 0))),)


max_with_places.defvjp(_forward, _backward)
