"""Layers the networks share, written so that they are fast on a CPU as well as on accelerators."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key, UInt32

from cifar_flax.models import winograd
from cifar_flax.models.pooling import max_over_places, max_pool

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
            return _patch_conv(x, kernel, stride)
        if kernel.shape[:2] == (3, 3) and stride == 1:
            return _patch_conv_max_pool(x, kernel)
    y = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return max_pool(y) if pool else y


def _suits_winograd(x: Array, kernel: Array, padding: str, stride: int) -> bool:
    return stride == 1 and padding == "SAME" and kernel.shape[:2] == (3, 3) and x.dtype == jnp.float32


def _suits_patches(kernel: Array, padding: str, stride: int) -> bool:
    """Short patches, or few of them."""
    return padding == "VALID" and (kernel.shape[2] <= _MAX_PATCH_CHANNELS or stride > 1)


def _patch_conv(x: Array, kernel: Array, stride: int) -> Array:
    k_h, k_w, _, c_out = kernel.shape
    height, width = x.shape[1] - k_h + 1, x.shape[2] - k_w + 1
    x = lax.optimization_barrier(x)
    shifted = [x[:, i : i + height : stride, j : j + width : stride] for i in range(k_h) for j in range(k_w)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, c_out)


def _patch_conv_max_pool(x: Array, kernel: Array) -> Array:
    """4x4 patches times a matrix that gives the four outputs of a square."""
    batch, height, width, c_in = x.shape
    rows, columns, c_out = (height - 2) // 2, (width - 2) // 2, kernel.shape[-1]
    x = lax.optimization_barrier(x)
    pairs = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns].reshape(batch, rows, columns, 2 * c_in)
        for i in range(4)
        for j in (0, 2)
    ]
    matrix = jnp.stack(
        [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)], axis=3
    )
    y = jnp.concatenate(pairs, axis=-1).reshape(-1, 16 * c_in) @ matrix.reshape(16 * c_in, 4 * c_out)
    return max_over_places(y.reshape(batch, rows, columns, 4, c_out))


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
            x.astype(self.dtype),
            kernel,
            padding=self.padding,
            stride=self.stride,
            pool=self.pool,
            platform=self.platform,
        )
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


def random_words(keys: Key[Array, " batch"], count: int) -> UInt32[Array, "batch count"]:
    """The bits of `jax.random.bits` for each of the keys, which are Threefry's, all of them in one fusion.

    On a CPU, JAX has the cipher as a loop that writes its state to memory between its rounds.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Threefry-2x32 with 20 rounds.
    """
    first, second = jnp.split(jax.random.key_data(keys), 2, axis=1)
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.broadcast_to(first, (len(keys), count)), jnp.arange(count, dtype=jnp.uint32)[None, :] + second
    for four_rounds in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[four_rounds % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + schedule[(four_rounds + 1) % 3]
        y = y + schedule[(four_rounds + 2) % 3] + jnp.uint32(four_rounds + 1)
    return lax.optimization_barrier(x ^ y)
