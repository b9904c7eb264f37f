"""Variants of airbench94: changes whose effect on the speed only a measurement on the device shows."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cifar_flax.models import airbench, layers
from cifar_flax.training import steps


@dataclass(frozen=True, slots=True)
class Variant:
    """A changed setting, compiler flag or function; everything else is as in the config file."""

    overrides: tuple[str, ...] = ()  # fields of the config, such as "train.batch_size=1536"
    xla_flags: str = ""  # added to XLA_FLAGS before JAX starts
    patch: Callable[[], None] = lambda: None  # replaces functions of the network or the evaluation


def reduce_window_pool(x: Float[Array, "batch height width c"], window: int = 2) -> Float[Array, "batch h w c"]:
    """Return `layers.max_pool(x)`, computed by `lax.reduce_window`; its gradient is not deterministic on a GPU."""
    shape = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


def _use_pool(pool: Callable[..., Array]) -> Callable[[], None]:
    def patch() -> None:
        for module in (layers, airbench):
            mock.patch.object(module, "max_pool", pool).start()

    return patch


def _views_as_one_batch() -> None:
    """Evaluate all TTA views of a batch in one forward pass, instead of one view after the other."""

    def apply(function: Callable[[Array], Array], stacked: Array) -> Array:
        results = function(stacked.reshape(-1, *stacked.shape[2:]))
        return results.reshape(*stacked.shape[:2], *results.shape[1:])

    mock.patch.object(steps.jax.lax, "map", apply).start()


_WHOLE_RUN = ("eval.every_epochs=8", "checkpoint.every_epochs=8", "train.steps_per_call=200", "train.log_every=200")

# In the order in which the campaign measures them.
VARIANTS = {
    "float16": Variant(overrides=("model.dtype=float16",)),
    "nchw": Variant(xla_flags="--xla_gpu_force_conv_nchw=true"),
    "batch_1536": Variant(overrides=("train.batch_size=1536", "train.steps_per_call=32", "train.log_every=32")),
    "one_cuda_graph": Variant(overrides=("parallel.one_cuda_graph=True",)),
    "one_call": Variant(overrides=_WHOLE_RUN),
    "no_triton_gemm": Variant(xla_flags="--xla_gpu_enable_triton_gemm=false"),
    "reduce_window_pool": Variant(patch=_use_pool(reduce_window_pool)),
    "views_as_one_batch": Variant(patch=_views_as_one_batch),
}
