"""The airbench network: 94 % on CIFAR-10 within a few seconds on a GPU; 1,971,352 parameters with default settings.

Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv:2404.00498), section 3 and listing 4, and
the repository KellerJordan/cifar10-airbench for the wider variants.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cifar_flax.errors import require
from cifar_flax.models.layers import Conv, conv2d, gelu, save_input
from cifar_flax.models.network import ModelConfig, Network, activation_dtype, require_size
from cifar_flax.models.norm import BatchNorm
from cifar_flax.models.pooling import global_max_pool, max_pool

_WHITENING_EPS = 5e-4  # added to the eigenvalues, so that directions of pure noise are not amplified
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within ±1 / sqrt(fan_in)


@dataclass(slots=True, kw_only=True)
class AirbenchConfig(ModelConfig):
    name: str = "airbench"
    widths: tuple[int, int, int] = (64, 256, 256)  # filters per convolution in the first, second and third block
    depth: int = 2  # convolutions per block: 2 or 3
    residual: bool = False  # add the output of each block's first GELU to the input of its last GELU
    norm_decay: float = 0.6  # EMA decay of BatchNorm's running statistics, per step
    global_pool: bool = False  # global instead of 3x3 max-pool, so that image sizes do not change the parameters
    init: str = "muon"  # initialization of head and whitening bias, as in the original's script for muon | sgd

    def validate(self) -> None:
        ModelConfig.validate(self)
        require(min(self.widths) >= 1, "model.widths", self.widths, "must all be at least 1")
        require(self.depth in (2, 3), "model.depth", self.depth, "must be 2 or 3")
        require(0 <= self.norm_decay < 1, "model.norm_decay", self.norm_decay, "must be in [0, 1)")
        require(self.init in ("muon", "sgd"), "model.init", self.init, "must be muon or sgd")


class Whitening(nnx.Module):
    """2x2 convolution without padding onto the principal directions of image patches, each with both signs.

    The kernel is a statistic of the training images, not a parameter; only the bias is trained.
    """

    def __init__(self, channels: int, *, init: str, dtype: jnp.dtype, platform: str, rngs: nnx.Rngs):
        width = 2 * 4 * channels
        self.kernel = nnx.BatchStat(jnp.zeros((2, 2, channels, width)))
        limit = 1 / math.sqrt(4 * channels) if init == "muon" else 0.0
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=-limit, maxval=limit))
        self.dtype, self.platform = dtype, platform

    def __call__(self, x: Float[Array, "batch height width c"]) -> Float[Array, "batch h_out w_out c_out"]:
        """Compute in float32 and round once. In bfloat16, directions of small variance have up to 9 % of noise."""
        y = _convolve_float32(x, self.kernel[...], self.platform) + self.bias[...][None, None, None]
        return y.astype(self.dtype)


def _convolve_float32(
    x: Float[Array, "batch height width c"], kernel: Float[Array, "k_h k_w c c_out"], platform: str
) -> Float[Array, "batch h_out w_out c_out"]:
    """Return the convolution without padding, with products of float32 numbers on all platforms."""
    if platform in ("cpu", "tpu"):
        return conv2d(x, kernel, padding="VALID", precision=lax.Precision.HIGHEST, platform=platform)
    # On a GPU, a sum of products is one kernel together with the operations after it; a convolution writes float32.
    k_h, k_w, c_in, _ = kernel.shape
    height, width = x.shape[1] - k_h + 1, x.shape[2] - k_w + 1
    products = (
        x[:, i : i + height, j : j + width, c, None] * kernel[None, None, None, i, j, c]
        for i, j, c in itertools.product(range(k_h), range(k_w), range(c_in))
    )
    return functools.reduce(jnp.add, products)


class Block(nnx.Module):
    """Convolution, 2x2 max-pool, BatchNorm, GELU; then `depth - 1` times convolution, BatchNorm, GELU."""

    def __init__(self, c_in: int, width: int, config: AirbenchConfig, *, platform: str, rngs: nnx.Rngs):
        self.residual = config.residual
        self.dtype = activation_dtype(config.dtype, platform)
        channels = (c_in,) + (width,) * (config.depth - 1)
        self.convs = nnx.List(
            Conv(
                c, width, 3,
                padding="SAME", kernel_init=identity_kernel, use_bias=False, pool=number == 0,
                dtype=self.dtype, platform=platform, rngs=rngs,
            )
            for number, c in enumerate(channels)
        )  # fmt: skip
        norm = functools.partial(
            BatchNorm, width, momentum=config.norm_decay, epsilon=1e-12, use_scale=False, platform=platform, rngs=rngs
        )
        self.norms = nnx.List(nnx.Dict(norm=norm()) for _ in channels)  # the path `norm` of earlier checkpoints

    def __call__(self, x: Float[Array, "b h w c_in"], training: bool) -> Float[Array, "b h_out w_out c_out"]:
        first = None
        for conv, entry in zip(self.convs, self.norms, strict=True):
            shortcut = first if self.residual and conv is self.convs[-1] else None
            x = entry.norm(conv(x), use_running_average=not training, shortcut=shortcut, activation=gelu)
            first = x if first is None else first
        return x


class Airbench(Network):
    """Whitening, three blocks, 3x3 or global max-pool and a linear head whose logits are scaled by a constant."""

    sample_size = 5000
    groups = MappingProxyType({"whitening": "whitening"})

    def __init__(
        self,
        config: AirbenchConfig,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        platform: str,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        window = 1 if config.global_pool else 3
        size = [(side - 1) // 8 // window for side in (height, width)]
        least = f"their sides must be at least {8 * window + 1}"
        allowed = f"images of {height}x{width} are too small for this network; {least}"
        require(min(size) >= 1, "model.name", config.name, allowed)
        self.dtype, self.platform = activation_dtype(config.dtype, platform), platform
        self.whitening = Whitening(channels, init=config.init, dtype=self.dtype, platform=platform, rngs=rngs)
        widths = (8 * channels, *config.widths)
        self.blocks = nnx.List(
            Block(c_in, c_out, config, platform=platform, rngs=rngs) for c_in, c_out in itertools.pairwise(widths)
        )
        self.global_pool = config.global_pool
        inputs = widths[-1] * (1 if self.global_pool else size[0] * size[1])
        require_size(config.name, image_shape, inputs, num_classes)
        self.logit_scale, kernel_init = (1 / inputs, _unit_std) if config.init == "muon" else (1 / 9, _UNIFORM)
        self.head = nnx.Linear(
            inputs, num_classes, use_bias=False, kernel_init=kernel_init, dtype=self.dtype, rngs=rngs
        )

    def fit(self, images: Float[Array, "n height width c"]) -> None:
        self.whitening.kernel[...] = whitening_kernel(images)

    def __call__(
        self, x: Float[Array, "batch height width channels"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Return logits in float32. With `dropout_keys` (training), BatchNorm updates its running statistics."""
        training = dropout_keys is not None
        x = save_input(gelu, self.whitening(x))
        for block in self.blocks:
            x = block(x, training)
        x = global_max_pool(x) if self.global_pool else max_pool(x, 3, platform=self.platform).reshape(x.shape[0], -1)
        return self.head(x).astype(jnp.float32) * self.logit_scale


def whitening_kernel(images: Float[Array, "n height width c"]) -> Float[Array, "2 2 c c_out"]:
    """Return the whitening directions of all 2x2 patches, followed by their negatives.

    They are the eigenvectors of the uncentered covariance matrix, each divided by sqrt(eigenvalue + eps).
    """
    _, height, width, c = images.shape
    shifted = [images[:, i : height - 1 + i, j : width - 1 + j] for i in (0, 1) for j in (0, 1)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, 4 * c)
    covariance = jnp.matmul(patches.T, patches, precision="highest") / patches.shape[0]
    eigenvalues, eigenvectors = jnp.linalg.eigh(covariance)
    scaled = (eigenvectors / jnp.sqrt(eigenvalues + _WHITENING_EPS)[None, :]).reshape(2, 2, c, 4 * c)
    return jnp.concatenate([scaled, -scaled], axis=-1)


def identity_kernel(key: Key[Array, ""], shape: tuple[int, int, int, int]) -> Float[Array, "k_h k_w c_in c_out"]:
    """Return a kernel whose first c_in filters copy their input channel; the rest is uniform in ±1 / sqrt(fan_in)."""
    k_h, k_w, c_in, c_out = shape
    kernel = _UNIFORM(key, shape)
    eye = jnp.eye(c_in, c_out)
    same = jnp.zeros(shape).at[k_h // 2, k_w // 2].set(eye)
    return jnp.where(jnp.arange(c_out)[None, None, None, :] < c_in, same, kernel)


def _unit_std(key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "inputs classes"]:
    """Return uniform weights, scaled to a standard deviation of 1."""
    kernel = jax.random.uniform(key, shape, dtype, -1, 1)
    return kernel / jnp.std(kernel, ddof=1)
