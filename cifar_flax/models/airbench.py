"""The network of airbench: 94 % on CIFAR-10 in a few seconds of a GPU; 1,971,352 parameters at its smallest size.

Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv:2404.00498), section 3 and listing 4, and
the repository KellerJordan/cifar10-airbench for the wider ones.
"""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cifar_flax.errors import require
from cifar_flax.models.layers import DTYPES, BatchNorm, Conv, Network, activation_dtype, conv2d, gelu, max_pool

_WHITENING_EPS = 5e-4  # added to the eigenvalues: directions that hold nothing but noise stay small
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan_in)


@dataclass(slots=True, kw_only=True)
class AirbenchConfig:
    name: str = "airbench"
    dtype: str = "float32"  # of the activations: float32 | bfloat16 | auto; parameters and BatchNorm: always float32
    widths: tuple[int, int, int] = (64, 256, 256)  # filters of the blocks' convolutions
    depth: int = 2  # convolutions per block: 2 or 3
    residual: bool = False  # whether a block's first activation is added before its last
    norm_decay: float = 0.6  # of BatchNorm's running statistics, per step
    init: str = "muon"  # of the head and of the whitening's bias, as the original trained by: muon | sgd

    def validate(self) -> None:
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        require(min(self.widths) >= 1, "model.widths", self.widths, "must be at least 1 each")
        require(self.depth in (2, 3), "model.depth", self.depth, "must be 2 or 3")
        require(0 <= self.norm_decay < 1, "model.norm_decay", self.norm_decay, "must be in [0, 1)")
        require(self.init in ("muon", "sgd"), "model.init", self.init, "must be muon or sgd")


class Whitening(nnx.Module):
    """Convolution 2x2 without padding onto the principal directions of the data, each with both signs.

    The kernel is a statistic of the data, not a parameter; only the bias trains.
    """

    def __init__(self, channels: int, *, init: str, dtype: jnp.dtype, platform: str, rngs: nnx.Rngs):
        width = 2 * 4 * channels
        self.kernel = nnx.BatchStat(jnp.zeros((2, 2, channels, width)))
        limit = 1 / math.sqrt(4 * channels) if init == "muon" else 0.0
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=-limit, maxval=limit))
        self.dtype, self.platform = dtype, platform

    def __call__(self, x: Float[Array, "batch height width c"]) -> Float[Array, "batch h_out w_out c_out"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return conv2d(x.astype(self.dtype), kernel, padding="VALID", platform=self.platform) + bias[None, None, None]


class Block(nnx.Module):
    """Convolution, max-pool 2x2, BatchNorm, GELU; then `depth - 1` times convolution, BatchNorm, GELU."""

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
        self.norms = nnx.List(
            BatchNorm(width, decay=config.norm_decay, epsilon=1e-12, use_scale=False, rngs=rngs) for _ in channels
        )

    def __call__(self, x: Float[Array, "b h w c_in"], training: bool) -> Float[Array, "b h_out w_out c_out"]:
        x = self.norms[0](self.convs[0](x), training).astype(self.dtype)
        first = x = gelu(x)
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            x = norm(conv(x), training).astype(self.dtype)
            if self.residual and conv is self.convs[-1]:
                x = x + first
            x = gelu(x)
        return x


class Airbench(Network):
    """Whitening, three blocks, max-pool 3x3, a linear head; its logits are scaled."""

    sample_size = 5000

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
        size = [(side - 1) // 8 // 3 for side in (height, width)]
        require(min(size) >= 1, "data.image_size", min(height, width), "must be at least 25 for this network")
        self.dtype = activation_dtype(config.dtype, platform)
        self.whitening = Whitening(channels, init=config.init, dtype=self.dtype, platform=platform, rngs=rngs)
        widths = (8 * channels, *config.widths)
        self.blocks = nnx.List(
            Block(c_in, c_out, config, platform=platform, rngs=rngs) for c_in, c_out in itertools.pairwise(widths)
        )
        inputs = size[0] * size[1] * widths[-1]
        self.logit_scale, kernel_init = (1 / inputs, _unit_deviation) if config.init == "muon" else (1 / 9, _UNIFORM)
        self.head = nnx.Linear(
            inputs, num_classes, use_bias=False, kernel_init=kernel_init, dtype=self.dtype, rngs=rngs
        )

    def fit(self, images: Float[Array, "n height width c"]) -> None:
        self.whitening.kernel[...] = whitening_kernel(images)

    def __call__(
        self, x: Float[Array, "batch height width channels"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits in float32. With `dropout_keys` (training) BatchNorm uses and updates batch statistics."""
        training = dropout_keys is not None
        x = gelu(self.whitening(x))
        for block in self.blocks:
            x = block(x, training)
        x = max_pool(x, 3).reshape(x.shape[0], -1)
        return self.head(x).astype(jnp.float32) * self.logit_scale


def whitening_kernel(images: Float[Array, "n height width c"]) -> Float[Array, "2 2 c c_out"]:
    """The eigenvectors of the covariance (about zero) of all 2x2 patches, over sqrt(eigenvalue + eps); then negated."""
    _, height, width, c = images.shape
    shifted = [images[:, i : height - 1 + i, j : width - 1 + j] for i in (0, 1) for j in (0, 1)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, 4 * c)
    covariance = jnp.matmul(patches.T, patches, precision="highest") / patches.shape[0]
    eigenvalues, eigenvectors = jnp.linalg.eigh(covariance)
    scaled = (eigenvectors / jnp.sqrt(eigenvalues + _WHITENING_EPS)[None, :]).reshape(2, 2, c, 4 * c)
    return jnp.concatenate([scaled, -scaled], axis=-1)


def identity_kernel(key: Key[Array, ""], shape: tuple[int, int, int, int]) -> Float[Array, "k_h k_w c_in c_out"]:
    """The first c_in filters hand their own channel on; the others are uniform within 1 / sqrt(fan_in)."""
    k_h, k_w, c_in, c_out = shape
    kernel = _UNIFORM(key, shape)
    eye = jnp.eye(c_in, c_out)
    same = jnp.zeros(shape).at[k_h // 2, k_w // 2].set(eye)
    return jnp.where(jnp.arange(c_out)[None, None, None, :] < c_in, same, kernel)


def _unit_deviation(key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "inputs classes"]:
    kernel = jax.random.uniform(key, shape, dtype, -1, 1)
    return kernel / jnp.std(kernel, ddof=1)
