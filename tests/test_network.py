"""Test which variables a network may have, and the optimizer group of each parameter."""

import jax
import numpy as np
import pytest
from flax import nnx

from cifar_flax import models
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.models.network import ModelConfig, Network, param_groups
from cifar_flax.runtime.trees import named_leaves
from cifar_flax.training import state
from cifar_flax.training.trainer import Trainer


def groups_of(network):
    return named_leaves(param_groups(network), ".")


class Mixed(Network):
    """Layers whose kernels have one to four axes."""

    groups = {"special": "whitening"}  # noqa: RUF012

    def __init__(self, *arguments, platform, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.conv_1d = nnx.Conv(3, 4, 3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 2, rngs=rngs)
        self.position = nnx.Param(np.zeros((1, 5, 4), np.float32))
        self.special = nnx.Linear(2, 2, rngs=rngs)


def test_groups_follow_layer_and_name_not_the_number_of_axes():
    expected = {
        "conv.kernel": "convolutions",
        "conv.bias": "biases",
        "conv_1d.kernel": "convolutions",
        "conv_1d.bias": "biases",
        "embed.embedding": "dense",
        "norm.scale": "biases",
        "norm.bias": "biases",
        "linear.kernel": "dense",
        "linear.bias": "biases",
        "position": "biases",
        "special.kernel": "whitening",
        "special.bias": "whitening",
    }
    for part in ("query", "key", "value", "out"):  # kernels with three axes, some biases with two
        expected |= {f"attention.{part}.kernel": "dense", f"attention.{part}.bias": "biases"}
    assert groups_of(Mixed(platform="cpu", rngs=nnx.Rngs(0))) == expected


@pytest.mark.parametrize("name", ["cnn", "airbench", "resnet18"])
def test_groups_of_the_networks(name):
    """In these networks, groups also follow from the number of axes, as in checkpoints of earlier releases."""
    network = nnx.eval_shape(
        lambda: models.build(models.config_class(name)(), (32, 32, 3), 10, platform="cpu", rngs=nnx.Rngs(0))
    )
    shapes = named_leaves(nnx.to_pure_dict(nnx.state(network, nnx.Param)), ".")
    for path, group in groups_of(network).items():
        by_axes = {1: "biases", 2: "dense", 4: "convolutions"}[shapes[path].ndim]
        assert group == ("whitening" if path.startswith("whitening.") else by_axes)


class WithDropout(Network):
    def __init__(self, *arguments, platform, rngs):
        self.blocks = nnx.List([nnx.Dropout(0.5, rngs=rngs)])


class WithConstant(Network):
    def __init__(self, *arguments, platform, rngs):
        self.table = jax.numpy.zeros(3)


class WithCache(Network):
    def __init__(self, *arguments, platform, rngs):
        self.hits = nnx.Variable(jax.numpy.zeros(3))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            WithDropout,
            "model.name='cnn': blocks.0 keeps random state, as nnx.Dropout does. Use cifar_flax.models.layers",
        ),
        (WithConstant, "model.name='cnn': table is an array. Use nnx.BatchStat for a constant."),
        (WithCache, "model.name='cnn': hits is of type Variable. Variables must be nnx.Param or nnx.BatchStat."),
    ],
)
def test_state_that_is_not_saved_is_refused(monkeypatch, network, message):
    config = models.CNNConfig()
    monkeypatch.setitem(models.MODELS, "cnn", (type(config), network))
    with pytest.raises(UserError) as caught:
        state.create_model(config, (32, 32, 3), 10, platform="cpu")
    assert str(caught.value).startswith(message)


def test_groups_of_unknown_attributes_are_refused():
    network = Mixed(platform="cpu", rngs=nnx.Rngs(0))
    network.groups = {"head": "dense"}
    with pytest.raises(UserError, match=r"Mixed\.groups: head"):
        param_groups(network)


@pytest.mark.parametrize("change", [lambda x: x[:, :5], lambda x: x.astype(jax.numpy.bfloat16)])
def test_logits_of_another_shape_or_type_are_refused(monkeypatch, tiny_config, change):
    call = models.CNN.__call__
    monkeypatch.setattr(models.CNN, "__call__", lambda self, *arguments: change(call(self, *arguments)))
    trainer = Trainer(tiny_config)
    with pytest.raises(UserError, match="float32 logits"):
        trainer.compile(trainer.initial_state)
    with pytest.raises(UserError, match="float32 logits"):
        trainer.evaluator.compile(trainer.initial_state)


def test_configs_of_networks_share_the_dtype():
    for config, _ in models.MODELS.values():
        assert issubclass(config, ModelConfig)
        with pytest.raises(UserError, match=r"model\.dtype='float64'"):
            config(dtype="float64").validate()


def grown(config, size, classes=10):
    """Build a network for images of `size` x `size`; no array is allocated."""
    return nnx.eval_shape(lambda: models.build(config, (size, size, 3), classes, platform="cpu", rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("config", "size", "classes", "needed"),
    [
        (models.CNNConfig(), 160, 10, 32 * 79**2 * 512),  # 79 = (160 - 2) / 2
        (models.AirbenchConfig(), 145, 10_851, 256 * 6**2 * 10_851),  # 6 = (145 - 1) / 8 / 3
    ],
)
def test_images_that_need_too_many_parameters_are_refused(config, size, classes, needed):
    assert needed > 100_000_000
    grown(config, size - 1, classes)
    with pytest.raises(ConfigError) as caught:
        grown(config, size, classes)
    assert str(caught.value).startswith(f"model.name={config.name!r}: images of {size}x{size} need {needed:,} param")
    grown(models.AirbenchConfig(global_pool=True), size, classes)  # as the message recommends
