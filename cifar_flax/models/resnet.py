"""ResNet-18 for small images, a common baseline; 11,173,962 parameters on CIFAR-10.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1, with the
usual stem for 32x32 images: one 3x3 convolution with stride 1 and no pooling.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cifar_flax.errors import require
from cifar_flax.models.layers import Conv
from cifar_flax.models.network import ModelConfig, Network, activation_dtype
from cifar_flax.models.norm import BatchNorm, identity


@dataclass(slots=True, kw_only=True)
class ResNetConfig(ModelConfig):
    name: str = "resnet18"
    width: int = 64  # filters in the first stage; each later stage doubles the number

    def validate(self) -> None:
        ModelConfig.validate(self)
        require(self.width >= 1, "model.width", self.width, "must be at least 1")


class ConvNorm(nnx.Module):
    """Convolution without bias, followed by BatchNorm, the addition of a shortcut and an activation."""

    def __init__(
        self, c_in: int, c_out: int, size: int, stride: int, *, dtype: jnp.dtype, platform: str, rngs: nnx.Rngs
    ):
        self.conv = Conv(
            c_in,
            c_out,
            size,
            # PyTorch's padding: with stride 2, SAME would put the single row of zeros at the bottom instead of the top.
            padding="SAME" if stride == 1 else "VALID",
            stride=stride,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            use_bias=False,
            dtype=dtype,
            platform=platform,
            rngs=rngs,
        )
        self.norm = nnx.Dict(norm=BatchNorm(c_out, momentum=0.9, epsilon=1e-5, platform=platform, rngs=rngs))
        self.padding = 0 if stride == 1 else size // 2

    def __call__(
        self,
        x: Float[Array, "b h w c_in"],
        training: bool,
        *,
        shortcut: Float[Array, "b h_out w_out c_out"] | None = None,
        activation: Callable[[Array], Array] = identity,
    ) -> Float[Array, "b h_out w_out c_out"]:
        places = (self.padding, self.padding)
        x = self.conv(jnp.pad(x, ((0, 0), places, places, (0, 0))))
        return self.norm.norm(x, use_running_average=not training, shortcut=shortcut, activation=activation)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions plus a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, *, dtype: jnp.dtype, platform: str, rngs: nnx.Rngs):
        conv_norm = functools.partial(ConvNorm, dtype=dtype, platform=platform, rngs=rngs)
        self.first = conv_norm(c_in, c_out, 3, stride)
        self.second = conv_norm(c_out, c_out, 3, 1)
        self.shortcut = conv_norm(c_in, c_out, 1, stride) if (c_in, 1) != (c_out, stride) else None

    def __call__(self, x: Float[Array, "b h w c_in"], training: bool) -> Float[Array, "b h_out w_out c_out"]:
        y = self.first(x, training, activation=nnx.relu)
        shortcut = x if self.shortcut is None else self.shortcut(x, training)
        return self.second(y, training, shortcut=shortcut, activation=nnx.relu)


class ResNet(Network):
    """A 3x3 convolution, four stages of two blocks each, global average pooling and a linear head."""

    def __init__(
        self,
        config: ResNetConfig,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        platform: str,
        rngs: nnx.Rngs,
    ):
        self.dtype = activation_dtype(config.dtype, platform)
        widths = [config.width * factor for factor in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.stem = ConvNorm(image_shape[2], widths[0], 3, 1, dtype=self.dtype, platform=platform, rngs=rngs)
        self.blocks = nnx.List(
            BasicBlock(c_in, c_out, 1 if c_in == c_out else 2, dtype=self.dtype, platform=platform, rngs=rngs)
            for c_in, c_out in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(widths[-1], num_classes, dtype=self.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Return logits in float32. With `dropout_keys` (training), BatchNorm updates its running statistics."""
        training = dropout_keys is not None
        x = self.stem(x, training, activation=nnx.relu)
        for block in self.blocks:
            x = block(x, training)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)
