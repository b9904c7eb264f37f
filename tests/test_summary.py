"""Test the table of a network's layers: shapes, parameters and FLOPs equal those of the network."""

import dataclasses

import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_flax import models
from cifar_flax.models import AirbenchConfig, CNNConfig, ResNetConfig, summary
from cifar_flax.models.network import Network
from cifar_flax.modes.train import train

CIFAR = (32, 32, 3)
SIZES = [(CNNConfig(), 3_693_002), (AirbenchConfig(), 1_971_352), (ResNetConfig(), 11_173_962)]


def build(config, image_shape, num_classes):
    return nnx.eval_shape(lambda: models.build(config, image_shape, num_classes, platform="cpu", rngs=nnx.Rngs(0)))


def count(module, kind):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


networks = st.one_of(
    st.builds(CNNConfig, width=st.integers(1, 9), hidden=st.integers(1, 9)),
    st.builds(
        AirbenchConfig,
        widths=st.tuples(*[st.integers(1, 9)] * 3),
        depth=st.integers(2, 3),
        residual=st.booleans(),
        dtype=st.sampled_from(("float32", "bfloat16")),
    ),
    st.builds(ResNetConfig, width=st.integers(1, 9)),
)


@settings(max_examples=8)
@given(networks, st.tuples(st.integers(25, 40), st.integers(25, 40), st.integers(1, 4)), st.integers(1, 12))
def test_layers_sum_to_the_network(config, image_shape, num_classes):
    rows = summary.layers(config, image_shape, num_classes)
    network = build(config, image_shape, num_classes)
    assert sum(layer.flops for layer in rows) == summary.forward_flops(config, image_shape, num_classes)
    assert sum(layer.parameters for layer in rows) == count(network, nnx.Param)
    assert sum(layer.statistics for layer in rows) == count(network, nnx.BatchStat)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
    for layer in rows:
        assert layer.kind == type(modules[layer.name]).__name__
        assert (layer.parameters, layer.statistics) == tuple(
            count(modules[layer.name], kind) for kind in (nnx.Param, nnx.BatchStat)
        )
    assert len({layer.name for layer in rows}) == len(rows)


def numbers(line):
    return [int(cell.replace(",", "")) for cell in line.split() if cell.replace(",", "").isdigit()]


@pytest.mark.parametrize(("config", "parameters"), SIZES, ids=[config.name for config, _ in SIZES])
def test_totals_of_the_reference_networks(config, parameters):
    lines = summary.summarize(config, CIFAR, 10).splitlines()
    forward = summary.forward_flops(config, CIFAR, 10)
    (total,) = [line for line in lines if line.startswith("  total ")]
    row = numbers(total)
    assert (row[0], row[2]) == (parameters, forward)
    assert f"{4 * parameters / 1e6:.2f} MB of parameters; {3 * forward:,} FLOPs per image in training" in lines[-2]
    assert max(map(len, lines)) <= 100


def test_rows_of_the_reference_cnn():
    """Computed by hand: a 3x3 convolution at 30x30 positions, pooled to 15x15; then matrix products."""
    lines = summary.summarize(CNNConfig(), CIFAR, 10).splitlines()
    assert [line.split() for line in lines[2:7]] == [
        ["conv", "Conv", "15x15x32", "896", "0", f"{2 * 30 * 30 * 32 * 27:,}"],
        ["norm", "BatchNorm", "15x15x32", "64", "64", "0"],
        ["hidden", "Linear", "512", "3,686,912", "0", f"{2 * 7200 * 512:,}"],
        ["head", "Linear", "10", "5,130", "0", f"{2 * 512 * 10:,}"],
        ["total", "3,693,002", "64", "8,938,240"],
    ]


def test_layers_are_in_the_order_of_their_calls():
    names = [layer.name for layer in summary.layers(AirbenchConfig(depth=3), CIFAR, 10)]
    assert names[:4] == ["whitening", "blocks.0.convs.0", "blocks.0.norms.0.norm", "blocks.0.convs.1"]
    assert names[-1] == "head"
    # A shortcut is listed with the shape of its output, although it is applied to the input of the block.
    shapes = {layer.name: layer.shape for layer in summary.layers(ResNetConfig(), CIFAR, 10)}
    assert shapes["blocks.6.shortcut.conv"] == shapes["blocks.6.second.conv"] == (4, 4, 512)


def test_summary_is_printed_before_training_if_requested(tiny_config, tmp_path, capsys):
    """Print it also if the run resumes or is finished."""
    tiny_config.optim = dataclasses.replace(tiny_config.optim, schedule="constant", warmup_epochs=0.0)
    table = f"{summary.summarize(tiny_config.model, CIFAR, 10)}\n"
    for epochs, requested in ((0.2, True), (0.3, True), (0.3, True), (0.3, False)):
        tiny_config.train = dataclasses.replace(tiny_config.train, epochs=epochs, log_every=1)
        train(tiny_config, tmp_path / "run", summary=requested)
        printed = capsys.readouterr().out
        assert printed.count(table) == printed.startswith(table) == requested


class WithInnerLayers(Network):
    """A network with its own variable, a layer that holds others, one that is called twice, and one that is not."""

    def __init__(self, config, image_shape, num_classes, *, platform, rngs):
        self.patches = nnx.Conv(image_shape[2], 8, (4, 4), strides=4, rngs=rngs)
        self.position = nnx.Param(jax.numpy.zeros((1, 64, 8)))
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.twice = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        self.head = nnx.Embed(num_classes, 8, rngs=rngs)

    def __call__(self, x, dropout_keys=None):
        x = self.patches(x).reshape(x.shape[0], -1, 8) + self.position[...]
        x = self.attention(x).mean(axis=1)
        return self.head.attend(self.twice[0](self.twice[0](x)))


def test_each_variable_and_operation_counts_once(monkeypatch):
    monkeypatch.setitem(models.MODELS, "cnn", (CNNConfig, WithInnerLayers))
    rows = {layer.name: layer for layer in summary.layers(CNNConfig(), CIFAR, 10)}
    parts = [f"attention.{part}" for part in ("query", "key", "value", "out")]
    assert list(rows) == ["cnn", "patches", "attention", *parts, "twice.0", "head"]
    sizes = [64 * 8, 4 * 4 * 3 * 8 + 8, 0, *[8 * 8 + 8] * 5, 10 * 8]
    assert [layer.parameters for layer in rows.values()] == sizes
    assert rows["attention"].flops == 2 * (2 * 64 * 64 * 8)  # queries with keys, and weights with values
    assert rows["twice.0"].flops == 2 * (2 * 8 * 8)
    assert rows["cnn"].flops == 2 * 8 * 10  # the method `attend` of the head
    assert nnx.Linear.__call__.__name__ == "__call__"  # the classes are restored
    assert sum(layer.flops for layer in rows.values()) == summary.forward_flops(CNNConfig(), CIFAR, 10)
