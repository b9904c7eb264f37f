"""Layers the networks share, written so that they are fast on a CPU as well as on accelerators."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

# Up to this many input channels, a 3x3 patch is short enough that copying patches costs less than what XLA's
# convolution loses on a CPU.
_MAX_PATCH_CHANNELS = 4


def conv2d(
    x: Float[Array, "batch height width c_in"], kernel: Float[Array, "k_h k_w c_in c_out"]
) -> Float[Array, "batch out_height out_width c_out"]:
    """Convolution with stride 1 and no padding.

    For images (few channels) the program compiled for a CPU multiplies patches by a matrix; all others use XLA's
    convolution. The two differ by rounding only.
    """
    if kernel.shape[2] > _MAX_PATCH_CHANNELS:
        return _xla_conv2d(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_patch_conv2d, default=_xla_conv2d)


def _xla_conv2d(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _patch_conv2d(x: Array, kernel: Array) -> Array:
    k_h, k_w, c_in, c_out = kernel.shape
    height, width = x.shape[1] - k_h + 1, x.shape[2] - k_w + 1
    shifted = [x[:, i : i + height, j : j + width] for i in range(k_h) for j in range(k_w)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(k_h * k_w * c_in, c_out)


class Conv(nnx.Module):
    """`conv2d` plus a bias; kernel glorot-uniform, bias zero (Keras' defaults)."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (kernel_size, kernel_size, c_in, c_out)
        self.kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(c_out))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch h w c_in"]) -> Float[Array, "batch h_out w_out c_out"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return conv2d(x.astype(self.dtype), kernel) + bias[None, None, None, :]


def max_pool(x: Float[Array, "batch height width c"], window: int = 2) -> Float[Array, "batch h_out w_out c"]:
    """Maximum over disjoint `window` x `window` squares; rows and columns that fill no window are dropped.

    Written as reshape + max because the gradient of XLA's `reduce_window` is several times slower on a CPU. Where a
    window holds its maximum more than once, the gradient is shared among those places.
    """
    batch, height, width, channels = x.shape
    h_out, w_out = height // window, width // window
    x = x[:, : h_out * window, : w_out * window]
    x = x.reshape(batch, h_out, window, w_out * window, channels).max(axis=2)
    return x.reshape(batch, h_out, w_out, window, channels).max(axis=3)


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
    words = jax.vmap(lambda key: jax.random.bits(key, (math.ceil(features / 4),), jnp.uint32))(keys)
    octets = lax.bitcast_convert_type(words, jnp.uint8).reshape(x.shape[0], -1)[:, :features].reshape(x.shape)
    return jnp.where(octets >= threshold, x * (256 / (256 - threshold)), jnp.zeros((), x.dtype))
