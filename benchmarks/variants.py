"""Variants of airbench94 that only a measurement on the device can decide between."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cifar_flax.models import airbench, layers
from cifar_flax.training import steps


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from the config as it is."""

    overrides: tuple[str, ...] = ()  # command-line flags
    xla_flags: str = ""
    patch: Callable[[], None] = lambda: None  # replaces functions of this process


def reduce_window_pool(x: Float[Array, "batch height width c"], window: int = 2) -> Float[Array, "batch h w c"]:
    """Return `layers.max_pool(x)`, computed by `lax.reduce_window`; its gradient is not deterministic on a GPU."""
    shape = (1, window, window, 1)
    return lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, shape, shape, "VALID")


def _windows(x: Array, window: int) -> Array:
    """Return the elements of each window: [window ** 2, batch, h_out, w_out, c]."""
    height, width = (size // window * window for size in x.shape[1:3])
    places = [(row, column) for row in range(window) for column in range(window)]
    return jnp.stack([x[:, row:height:window, column:width:window] for row, column in places])


@jax.custom_vjp
def winner_pool(x: Float[Array, "batch height width c"]) -> Float[Array, "batch h w c"]:
    """Return `layers.max_pool(x)` for 2x2 windows; for the gradient, keep the winner's place as one byte.

    If a window contains its maximum more than once, the first of these elements gets the whole gradient.
    """
    return jnp.max(_windows(x, 2), axis=0)


def _winner_forward(x: Array) -> tuple[Array, tuple[Array, tuple[int, ...]]]:
    candidates = _windows(x, 2)
    winner = jnp.argmax(candidates, axis=0).astype(jnp.uint8)
    return jnp.max(candidates, axis=0), (winner, jnp.zeros((x.shape[1], x.shape[2], 0), x.dtype))


def _winner_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    winner, shape = saved
    batch, h_out, w_out, channels = dy.shape
    place = jnp.arange(4, dtype=jnp.uint8).reshape(2, 1, 2, 1)
    spread = jnp.where(winner[:, :, None, :, None, :] == place, dy[:, :, None, :, None, :], 0)
    dx = spread.reshape(batch, 2 * h_out, 2 * w_out, channels)
    rest = ((0, 0), (0, shape.shape[0] - 2 * h_out), (0, shape.shape[1] - 2 * w_out), (0, 0))
    return (jnp.pad(dx, rest),)


winner_pool.defvjp(_winner_forward, _winner_backward)


def _use_pool(pool: Callable[..., Array]) -> Callable[[], None]:
    original = layers.max_pool

    def max_pool(x: Array, window: int = 2) -> Array:
        return pool(x) if window == 2 else original(x, window)

    def patch() -> None:
        for module in (layers, airbench):
            mock.patch.object(module, "max_pool", max_pool).start()

    return patch


def _views_as_one_batch() -> None:
    """Evaluate all TTA views of a batch in one forward pass, instead of one view after the other."""

    def apply(function: Callable[[Array], Array], stacked: Array) -> Array:
        results = function(stacked.reshape(-1, *stacked.shape[2:]))
        return results.reshape(*stacked.shape[:2], *results.shape[1:])

    mock.patch.object(steps.jax.lax, "map", apply).start()


_WHOLE_RUN = ("eval.every_epochs=8", "checkpoint.every_epochs=8", "train.steps_per_call=200")

# In the order in which the campaign measures them.
VARIANTS = {
    "float16": Variant(overrides=("model.dtype=float16",)),
    "winner_pool": Variant(patch=_use_pool(winner_pool)),
    "one_graph": Variant(xla_flags="--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"),
    "reduce_window_pool": Variant(patch=_use_pool(reduce_window_pool)),
    "one_call": Variant(overrides=_WHOLE_RUN),
    "batch_1536": Variant(overrides=("train.batch_size=1536", "train.steps_per_call=32")),
    "no_triton_gemm": Variant(xla_flags="--xla_gpu_enable_triton_gemm=false"),
    "views_as_one_batch": Variant(patch=_views_as_one_batch),
    "nchw": Variant(xla_flags="--xla_gpu_force_conv_nchw=true"),
}
