"""Test the precision of the whitening layer, and of the network's gradient with it, on photos."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_sample_images

from cifar_flax import models
from cifar_flax.models import AirbenchConfig
from cifar_flax.models.airbench import whitening_kernel


@functools.cache
def photos():
    """Return normalized 32x32 pieces of two photos, shrunk by a factor of 4."""
    pieces = []
    for photo in load_sample_images().images:
        height, width = (size // 4 for size in photo.shape[:2])
        small = photo[: 4 * height, : 4 * width].reshape(height, 4, width, 4, 3).mean((1, 3)).round()
        pieces += [small[i : i + 32, j : j + 32] for i in range(0, height - 31, 8) for j in range(0, width - 31, 8)]
    images = np.stack(pieces)
    return jnp.asarray((images - images.mean((0, 1, 2))) / images.std((0, 1, 2)), jnp.float32)


def build(dtype, platform):
    config = AirbenchConfig(widths=(16, 32, 32), dtype=dtype)
    network = models.build(config, (32, 32, 3), 10, platform=platform, rngs=nnx.Rngs(0))
    network.fit(photos())
    return network


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_noise_is_below_one_percent_in_each_direction(dtype, platform):
    """Directions of small variance have kernels of large norm, which amplify the rounding errors of products."""
    whitening, images = build(dtype, platform).whitening, photos()
    found = jax.jit(lambda x: whitening(x))(images)
    assert found.dtype == dtype
    wide, kernel = np.asarray(images, np.float64), np.asarray(whitening_kernel(images), np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (2, 2), axis=(1, 2))
    exact = np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True) + np.asarray(whitening.bias[...])
    noise = np.asarray(found, np.float64) - exact
    assert (noise.std((0, 1, 2)) < 0.01 * exact.std((0, 1, 2))).all()


def test_products_of_the_whitening_layer_are_of_float32():
    """TPUs by default round the factors to bfloat16, GPUs those of convolutions and matrix products to TF32."""

    def text(platform):
        whitening = build("bfloat16", platform).whitening
        return jax.jit(lambda x: whitening(x)).trace(photos()).lower(lowering_platforms=(platform,)).as_text()

    on_tpu, on_gpu = text("tpu"), text("cuda")
    (convolution,) = (line for line in on_tpu.splitlines() if "stablehlo.convolution" in line)
    assert "bf16" not in convolution
    assert convolution.count("precision HIGHEST") == 2
    assert not any(name in on_gpu for name in ("stablehlo.convolution", "stablehlo.dot"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_gradient_in_bfloat16_points_in_the_direction_of_that_in_float32(platform):
    images = photos()[::3]
    labels, keys = jnp.arange(len(images)) % 10, jax.random.split(jax.random.key(0), len(images))

    def gradient(dtype):
        graphdef, params, batch_stats = nnx.split(build(dtype, platform), nnx.Param, nnx.BatchStat)

        def loss(params):
            logits = nnx.merge(graphdef, params, nnx.to_pure_dict(batch_stats))(images, keys)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(images)), labels])

        gradients = jax.jit(jax.grad(loss))(nnx.to_pure_dict(params))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])

    found, expected = gradient("bfloat16"), gradient("float32")
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.99
