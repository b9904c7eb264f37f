"""Test the ResNet-18 for small images: size, forward pass and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_flax import models
from cifar_flax.models import ResNetConfig
from cifar_flax.models.summary import forward_flops


def build(platform="cuda", **fields):
    return models.build(ResNetConfig(**fields), (32, 32, 3), 10, platform=platform, rngs=nnx.Rngs(0))


def test_number_of_parameters_and_flops():
    """Stages of 64, 128, 256 and 512 filters have 0.56 billion multiply-adds per 32x32 image."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962
    assert forward_flops(ResNetConfig(), (32, 32, 3), 10) == pytest.approx(2 * 0.56e9, rel=0.01)


def test_forward_pass_equals_its_definition():
    """Compare with the layers written out in JAX, with running statistics."""
    model = build(width=4)
    p, s = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))

    def conv_norm(x, params, stats, stride):
        size = params["conv"]["kernel"].shape[0] // 2
        y = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (stride, stride), [(size, size)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        mean, var = (stats["norm"]["norm"][name][None, None, None] for name in ("mean", "var"))
        scale, bias = (params["norm"]["norm"][name][None, None, None] for name in ("scale", "bias"))
        return (y - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    y = jax.nn.relu(conv_norm(x, p["stem"], s["stem"], 1))
    for number in range(8):
        params, stats, stride = p["blocks"][number], s["blocks"][number], 2 if number in (2, 4, 6) else 1
        inner = jax.nn.relu(conv_norm(y, params["first"], stats["first"], stride))
        inner = conv_norm(inner, params["second"], stats["second"], 1)
        assert ("shortcut" in params) == (stride == 2)
        shortcut = conv_norm(y, params["shortcut"], stats["shortcut"], 2) if stride == 2 else y
        y = jax.nn.relu(inner + shortcut)
    assert y.shape == (2, 4, 4, 32)
    expected = y.mean(axis=(1, 2)) @ p["head"]["kernel"] + p["head"]["bias"][None]
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), expected, rtol=1e-4, atol=1e-5)


def test_outputs_are_equal_on_all_platforms():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    models_of = [build(platform, width=4) for platform in ("cpu", "cuda")]
    outputs = [jax.jit(lambda x, model=model: model(x))(x) for model in models_of]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)


def test_auto_dtype_is_bfloat16_only_on_accelerators():
    assert {platform: build(platform, width=1, dtype="auto").dtype for platform in ("cpu", "cuda", "tpu")} == {
        "cpu": jnp.float32,
        "cuda": jnp.bfloat16,
        "tpu": jnp.bfloat16,
    }
