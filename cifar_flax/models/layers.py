"""Layers of the networks, with implementations that are fast on CPUs and on accelerators."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from cifar_flax.models.cpu import patches, winograd
from cifar_flax.models.cpu.threefry import random_words
from cifar_flax.models.pooling import max_pool

# Up to this number of input channels, copying patches for a matrix product is faster than XLA's convolution on a CPU.
_MAX_PATCH_CHANNELS = 4


def conv2d(
    x: Float[Array, "batch h w c_in"],
    kernel: Float[Array, "k_h k_w c_in c_out"],
    *,
    padding: str,
    stride: int = 1,
    pool: bool = False,
    precision: lax.Precision | None = None,
    platform: str,
) -> Float[Array, "batch h_out w_out c_out"]:
    """Return the convolution of `x`; with `pool`, its maximum over disjoint 2x2 squares.

    `padding` is SAME (zeros) or VALID. An odd last row or column, which the pooling drops, is not computed. `precision`
    is that of XLA's convolution. On the `platform` "cpu", use matrix products, fused with the pooling, if XLA's
    convolution is slower. Other platforms use XLA's convolution. The results differ by rounding errors only.
    """
    is_3x3 = kernel.shape[:2] == (3, 3) and stride == 1
    if platform == "cpu" and is_3x3 and padding == "SAME" and x.dtype == jnp.float32:
        return winograd.conv3x3_max_pool(x, kernel) if pool else winograd.conv3x3(x, kernel)
    # Patches are cheap to copy if they are short or few.
    if platform == "cpu" and padding == "VALID" and (kernel.shape[2] <= _MAX_PATCH_CHANNELS or stride > 1):
        if not pool:
            return patches.conv(x, kernel, stride)
        if is_3x3:
            return patches.conv_max_pool(x, kernel)
    strides, sizes = (stride, stride), kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], sizes, strides, padding)
    if pool:
        pads = [_even_output(*args, stride) for args in zip(x.shape[1:3], sizes, pads, strict=True)]
    y = lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )
    return max_pool(y, platform=platform) if pool else y


def _even_output(length: int, size: int, pad: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return `pad`, at its end reduced (below zero if needed) such that the number of outputs is even."""
    low, high = pad
    return low, high - stride * (((low + length + high - size) // stride + 1) % 2)


class Conv(nnx.Module):
    """A convolution, with an optional bias that is initialized to zero."""

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


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x Phi(x), where Phi is the standard normal CDF (Hendrycks and Gimpel 2016, section 2).

    Computed in float32 and rounded once: in bfloat16, 1 + erf(x / sqrt(2)) cancels for x < -2.5. The gradient is a
    product of `dy` and a slope, which XLA fuses better than the sum that automatic differentiation returns.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def save_input(function: Callable[[Array], Array], x: Array) -> Array:
    """Return `function(x)`; for the gradient, save `x` alone, in its dtype, and compute everything else again."""
    return function(x)


def _save_input_forward(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    # Without the barrier, XLA may save `x` in float32, as it was before its rounding. The barrier of `jax.checkpoint`
    # also keeps XLA from fusing the operations on the gradient.
    return function(x), lax.optimization_barrier(x)


def _save_input_backward(function: Callable[[Array], Array], x: Array, dy: Array) -> tuple[Array]:
    dx: tuple[Array] = jax.vjp(function, x)[1](dy)
    return dx


save_input.defvjp(_save_input_forward, _save_input_backward)


def dropout(
    x: Float[Array, "batch *features"], keys: Key[Array, " batch"], rate: float
) -> Float[Array, "batch *features"]:
    """Set each element to zero with probability `rate`, rounded to 1/256, and scale the others to keep the mean.

    With one key per example, the mask depends neither on the position in the batch nor on the devices. Each element
    uses 8 random bits, a quarter of the hashing that 32 bits would need.

    Source: Srivastava et al. 2014, "Dropout", section 4 (scaled at training time instead of test time).
    """
    threshold = min(round(rate * 256), 255)
    if threshold == 0:
        return x
    features = math.prod(x.shape[1:])
    words = random_words(keys, math.ceil(features / 4))
    octets = words[:, None, :] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)[None, :, None] & 255
    # The barrier makes XLA save one byte per element for the gradient, instead of the four bytes of `octets`.
    keep = lax.optimization_barrier(octets >= threshold)
    keep = keep.reshape(x.shape[0], -1)[:, :features].reshape(x.shape)
    return jnp.where(keep, x * (256 / (256 - threshold)), jnp.zeros((), x.dtype))
