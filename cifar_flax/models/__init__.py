"""The networks by name. To add one, write a file with its config and its module, and add a row to `MODELS`.

The config is a dataclass derived from `ModelConfig`. The module is derived from `Network` and defines:

- `__init__(self, config, image_shape, num_classes, *, platform, rngs)`. `image_shape` is (height, width, channels);
  raise `ConfigError` if the network cannot process such images. `platform` is "cpu", "tpu", or "gpu" or "cuda": the
  layers in `layers.py` and `norm.py` choose the fastest implementation by it.
- `__call__(self, x, dropout_keys=None)`. `x` has normalized float32 images [batch, height, width, channels]; return
  float32 logits [batch, classes]. Evaluation passes no `dropout_keys`; training passes one random key per example.

In training, pass `use_running_average=dropout_keys is None` to `nnx.BatchNorm` or to `norm.BatchNorm`, which needs less
memory. Use `layers.dropout` with the keys instead of `nnx.Dropout`, because checkpoints do not save its random state; a
network that contains it is refused. Split the keys if there is more than one dropout:
`jax.vmap(jax.random.split, out_axes=1)(dropout_keys)`. Other layers of `nnx` work if training does not change their
statistics. Pass `decode=False` to `nnx.MultiHeadAttention`, and store constant arrays as `nnx.BatchStat`.

`network.activation_dtype(config.dtype, platform)` is the dtype of the activations, which `model.dtype` sets.

Name matrices `kernel` or `embedding`: `network.param_groups` chooses the optimizer group by this name and by the
layer. `groups` assigns the parameters of an attribute to another group. Name the last layer `head`, so that
`train.freeze=backbone` can train it alone. A network that needs training images before the
first step, such as for whitening, sets `sample_size` and overrides `fit`.
"""

from typing import Any

from flax import nnx

from cifar_flax.errors import require
from cifar_flax.models.airbench import Airbench, AirbenchConfig
from cifar_flax.models.cnn import CNN, CNNConfig
from cifar_flax.models.network import ModelConfig, Network
from cifar_flax.models.resnet import ResNet, ResNetConfig

# name -> (config, module)
MODELS: dict[str, tuple[type[ModelConfig], type[Any]]] = {
    "cnn": (CNNConfig, CNN),
    "airbench": (AirbenchConfig, Airbench),
    "resnet18": (ResNetConfig, ResNet),
}


def config_class(name: object) -> type[ModelConfig]:
    """Return the config class of the network `name`; raise `ConfigError` if there is no such network."""
    require(isinstance(name, str) and name in MODELS, "model.name", name, f"must be one of {', '.join(MODELS)}")
    return MODELS[str(name)][0]


def network_class(config: ModelConfig) -> type[Any]:
    """Return the module of the network that `config` describes."""
    return MODELS[config.name][1]


def build(
    config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, *, platform: str, rngs: nnx.Rngs
) -> Network:
    """Build the network that `config` describes, with the kernels that are fastest on `platform`.

    `image_shape` is (height, width, channels). Raise `ConfigError` if such images are too small for the network.
    """
    network: Network = network_class(config)(config, image_shape, num_classes, platform=platform, rngs=rngs)
    return network
