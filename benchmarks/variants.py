"""Variants of airbench94_wide: changes whose effect on the speed only a measurement on the device shows."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

from jaxtyping import Array

from cifar_flax.models import pooling
from cifar_flax.training import steps


@dataclass(frozen=True, slots=True)
class Variant:
    """A changed setting, compiler flag or function; everything else is as in the config file."""

    overrides: tuple[str, ...] = ()  # fields of the config, such as "model.dtype=float16"
    xla_flags: str = ""  # added to XLA_FLAGS before JAX starts
    patch: Callable[[], None] = lambda: None  # replaces functions of the network or the evaluation


def _reduce_window_pool() -> None:
    """Pool as on a TPU. The gradient is then not deterministic on a GPU."""
    mock.patch.object(pooling, "max_with_places", pooling.max_of_windows).start()


def _views_as_one_batch() -> None:
    """Evaluate all TTA views of a batch in one forward pass, instead of one view after the other."""

    def apply(function: Callable[[Array], Array], stacked: Array) -> Array:
        results = function(stacked.reshape(-1, *stacked.shape[2:]))
        return results.reshape(*stacked.shape[:2], *results.shape[1:])

    mock.patch.object(steps.jax.lax, "map", apply).start()


# In the order in which the campaign measures them.
VARIANTS = {
    "float16": Variant(overrides=("model.dtype=float16",)),
    "nchw": Variant(xla_flags="--xla_gpu_force_conv_nchw=true"),
    "one_cuda_graph": Variant(overrides=("parallel.one_cuda_graph=True",)),
    "no_triton_gemm": Variant(xla_flags="--xla_gpu_enable_triton_gemm=false"),
    "reduce_window_pool": Variant(patch=_reduce_window_pool),
    "views_as_one_batch": Variant(patch=_views_as_one_batch),
}
