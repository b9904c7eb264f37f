"""The reference network: one convolution and one hidden layer; 3,693,002 parameters on CIFAR-10."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cifar_flax.errors import require
from cifar_flax.models.layers import Conv, dropout
from cifar_flax.models.network import ModelConfig, Network, activation_dtype, require_size
from cifar_flax.models.norm import BatchNorm


@dataclass(slots=True, kw_only=True)
class CNNConfig(ModelConfig):
    name: str = "cnn"
    width: int = 32  # filters of the convolution
    hidden: int = 512  # units in the hidden layer
    conv_dropout: float = 0.2  # fraction of pooled activations zeroed in training
    hidden_dropout: float = 0.5  # fraction of hidden units zeroed in training

    def validate(self) -> None:
        ModelConfig.validate(self)
        for field in ("width", "hidden"):
            require(getattr(self, field) >= 1, f"model.{field}", getattr(self, field), "must be at least 1")
        for field in ("conv_dropout", "hidden_dropout"):
            # `dropout` rounds rates to multiples of 1/256; a rate of 1 would zero everything.
            require(0 <= getattr(self, field) <= 0.99, f"model.{field}", getattr(self, field), "must be in [0, 0.99]")


class CNN(Network):
    """3x3 conv + ReLU, 2x2 max-pool, BatchNorm, dropout, dense + ReLU, dropout, dense; initialized as in Keras."""

    def __init__(
        self, config: CNNConfig, image_shape: tuple[int, int, int], num_classes: int, *, platform: str, rngs: nnx.Rngs
    ):
        height, width, channels = image_shape
        self.config = config
        self.dtype = activation_dtype(config.dtype, platform)
        flat = ((height - 2) // 2) * ((width - 2) // 2) * config.width
        require_size(config.name, image_shape, flat, config.hidden)
        glorot = nnx.initializers.glorot_uniform()
        self.conv = Conv(
            channels, config.width, 3, padding="VALID", pool=True, kernel_init=glorot,
            dtype=self.dtype, platform=platform, rngs=rngs,
        )  # fmt: skip
        self.norm = BatchNorm(config.width, momentum=0.99, epsilon=1e-3, platform=platform, rngs=rngs)
        self.hidden = nnx.Linear(flat, config.hidden, kernel_init=glorot, dtype=self.dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden, num_classes, kernel_init=glorot, dtype=self.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Return logits in float32. With `dropout_keys` (training), BatchNorm updates its running statistics."""
        # ReLU after pooling equals ReLU before pooling, but processes a quarter of the elements.
        x = self.norm(nnx.relu(self.conv(x)), use_running_average=dropout_keys is None)
        if dropout_keys is not None:
            conv_keys, hidden_keys = jax.vmap(jax.random.split, out_axes=1)(dropout_keys)
            x = dropout(x, conv_keys, self.config.conv_dropout)
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        if dropout_keys is not None:
            x = dropout(x, hidden_keys, self.config.hidden_dropout)
        return self.head(x).astype(jnp.float32)
