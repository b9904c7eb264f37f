"""The networks, by name. A new one is a file of its own and a line in `MODELS`."""

from typing import Any

from flax import nnx

from cifar_flax.errors import require
from cifar_flax.models.airbench import Airbench, AirbenchConfig
from cifar_flax.models.cnn import CNN, CNNConfig
from cifar_flax.models.layers import Network
from cifar_flax.models.resnet import ResNet, ResNetConfig

__all__ = [
    "MODELS",
    "AirbenchConfig",
    "CNNConfig",
    "ModelConfig",
    "ResNetConfig",
    "build",
    "config_class",
    "sample_size",
]

ModelConfig = CNNConfig | AirbenchConfig | ResNetConfig  # the union of the networks' configs

# name -> (its config, its module)
MODELS: dict[str, tuple[type[ModelConfig], type[Any]]] = {
    "cnn": (CNNConfig, CNN),
    "airbench": (AirbenchConfig, Airbench),
    "resnet18": (ResNetConfig, ResNet),
}


def config_class(name: object) -> type[ModelConfig]:
    """The config class of the network called `name`; raises `ConfigError` if there is none."""
    require(isinstance(name, str) and name in MODELS, "model.name", name, f"must be one of {', '.join(MODELS)}")
    return MODELS[str(name)][0]


def sample_size(config: ModelConfig) -> int:
    """How many training images the network that `config` describes looks at before the first step."""
    return MODELS[config.name][1].sample_size


def build(
    config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, *, platform: str, rngs: nnx.Rngs
) -> Network:
    """The network that `config` describes, for images [height, width, channels], written as `platform` has it fast.

    Raises `ConfigError` where images of this shape are too small for it.
    """
    return MODELS[config.name][1](config, image_shape, num_classes, platform=platform, rngs=rngs)
