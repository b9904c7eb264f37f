"""The networks, by name. A new one is a file of its own and a line in `MODELS`."""

from flax import nnx

from cifar_flax.errors import require
from cifar_flax.models.cnn import CNN, CNNConfig

__all__ = ["MODELS", "CNNConfig", "ModelConfig", "build", "config_class"]

ModelConfig = CNNConfig  # the union of the networks' configs

# name -> (its config, its module)
MODELS = {"cnn": (CNNConfig, CNN)}


def config_class(name: object) -> type[ModelConfig]:
    """The config class of the network called `name`; raises `ConfigError` if there is none."""
    require(isinstance(name, str) and name in MODELS, "model.name", name, f"must be one of {', '.join(MODELS)}")
    return MODELS[str(name)][0]


def build(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The network that `config` describes, for images [height, width, channels]."""
    return MODELS[config.name][1](config, image_shape, num_classes, rngs=rngs)
