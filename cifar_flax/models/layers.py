"""Layers the networks share, written so that they are fast on a CPU as well as on accelerators."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from cifar_flax.models.cpu import patches, winograd
from cifar_flax.models.cpu.threefry import random_words

# Up to this many input channels, a patch is short enough that copying patches costs less than what XLA's convolution
# loses on a CPU.
_MAX_PATCH_CHANNELS = 4


DTYPES = ("float32", "bfloat16", "auto")


def activation_dtype(name: str, platform: str) -> jnp.dtype:
    """Of `DTYPES`; "auto" is what suits the platform: float32 for the "cpu", bfloat16 for accelerators."""
    return jnp.dtype({"auto": "float32" if platform == "cpu" else "bfloat16"}.get(name, name))


class Network(nnx.Module):
    """What networks have in common."""

    sample_size = 0  # training images that `fit` needs

    def fit(self, images: Float[Array, "n height width c"]) -> None:
        """Sets what depends on the training data, given normalised images of it, before the first step."""


def conv2d(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "k_h k_w c_in c_out"],
    *,
    padding: str,
    stride: int = 1,
    pool: bool = False,
    platform: str,
) -> Float[Array, "batch h_out w_out c_out"]:
    """Convolution; with `pool`, the maximum over disjoint 2x2 squares of it.

    `padding` is SAME (zeros) or VALID. For the `platform` "cpu" it is written in matrix products where XLA's
    convolution is slow, and pools while it is at it; "cuda", "tpu" and all others use XLA's. The ways differ by
    rounding only.
    """
    if platform == "cpu" and _suits_winograd(x, kernel, padding, stride):
        return winograd.conv3x3_max_pool(x, kernel) if pool else winograd.conv3x3(x, kernel)
    if platform == "cpu" and _suits_patches(kernel, padding, stride):
        if not pool:
            return patches.conv(x, kernel, stride)
        if kernel.shape[:2] == (3, 3) and stride == 1:
            return patches.conv_max_pool(x, kernel)
    y = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return max_pool(y) if pool else y


def _suits_winograd(x: Array, kernel: Array, padding: str, stride: int) -> bool:
    return stride == 1 and padding == "SAME" and kernel.shape[:2] == (3, 3) and x.dtype == jnp.float32


def _suits_patches(kernel: Array, padding: str, stride: int) -> bool:
    """Short patches, or few of them."""
    return padding == "VALID" and (kernel.shape[2] <= _MAX_PATCH_CHANNELS or stride > 1)


def max_pool(x: Float[Array, "batch height width c"], window: int = 2) -> Float[Array, "batch h_out w_out c"]:
    """Return the maximum over disjoint `window` x `window` squares; rows and columns that fill no window are dropped.

    Written as reshape + max because the gradient of XLA's `reduce_window` is several times slower on a CPU. Where a
    window holds its maximum more than once, the gradient is shared among those places.
    """
    batch, height, width, channels = x.shape
    h_out, w_out = height // window, width // window
    x = x[:, : h_out * window, : w_out * window]
    x = x.reshape(batch, h_out, window, w_out * window, channels).max(axis=2)
    return x.reshape(batch, h_out, w_out, window, channels).max(axis=3)


class Conv(nnx.Module):
    """`conv2d` with its kernel and, if wanted, a bias that starts at zero."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        padding: str,
        stride: int = 1,
        kernel_init: Callable[..., Array],
        use_bias: bool = True,
        pool: bool = False,
        dtype: jnp.dtype,
        platform: str,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, kernel_size, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out)) if use_bias else None
        self.padding, self.stride, self.pool, self.dtype, self.platform = padding, stride, pool, dtype, platform

    def __call__(self, x: Float[Array, "batch h w c_in"]) -> Float[Array, "batch h_out w_out c_out"]:
        kernel = self.kernel[...].astype(self.dtype)
        x = conv2d(
            x.astype(self.dtype), kernel,
            padding=self.padding, stride=self.stride, pool=self.pool, platform=self.platform,
        )  # fmt: skip
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)[None, None, None, :]


class BatchNorm(nnx.Module):
    """Normalisation per channel, in float32 (Ioffe and Szegedy 2015)."""

    def __init__(self, channels: int, *, decay: float, epsilon: float, use_scale: bool = True, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(channels, momentum=decay, epsilon=epsilon, use_scale=use_scale, rngs=rngs)

    def __call__(self, x: Array, training: bool) -> Array:
        return self.norm(x.astype(jnp.float32), use_running_average=not training)


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016, section 2), not approximated.

    Computed in float32 and rounded once: next to 1, bfloat16 has no word for what the function leaves at x < -2.5.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return ((dy * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def dropout(
    x: Float[Array, "batch *features"], keys: Key[Array, " batch"], rate: float
) -> Float[Array, "batch *features"]:
    """Zeroes each element with probability `rate`, rounded to 1/256, and scales the rest so that the mean stays.

    One key per example makes the mask a function of the example alone, wherever in the batch, and on whichever
    device, it lies. Eight random bits decide each element: a quarter of the hashing that 32 would need.

    Source: Srivastava et al. 2014, "Dropout", section 4 (scaled at training time instead of test time).
    """
    threshold = round(rate * 256)
    if threshold == 0:
        return x
    features = math.prod(x.shape[1:])
    words = random_words(keys, math.ceil(features / 4))
    octets = words[:, None, :] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)[None, :, None] & 255
    # A byte per element is kept for the gradient; without the barrier it would be the four of `octets`.
    keep = lax.optimization_barrier(octets >= threshold)
    keep = keep.reshape(x.shape[0], -1)[:, :features].reshape(x.shape)
    return jnp.where(keep, x * (256 / (256 - threshold)), jnp.zeros((), x.dtype))
