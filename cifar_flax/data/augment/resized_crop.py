"""Random crops of random size, resized to the size of the image."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cifar_flax.data.augment.base import Context, Examples

PerImage = Float[Array, " batch"]


def random_resized_crop(examples: Examples, context: Context) -> Examples:
    """Crop a random part of each image and resize it to the size of the image by linear interpolation.

    The crop's fraction of the image's area is uniform between `random_resized_crop` and 1. The logarithm of its aspect
    ratio, relative to the image's, is uniform from log 3/4 to log 4/3 as far as it fits; so is its position.

    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6.
    """
    smallest, image = context.config.random_resized_crop, examples.image
    if smallest == 1:
        return examples
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (4,)))
    area, aspect, top, left = uniform(context.keys("random_resized_crop")).T
    area = smallest + (1 - smallest) * area
    log_aspect = jnp.minimum(math.log(4 / 3), -jnp.log(area)) * (2 * aspect - 1)
    rows = _weights(image.shape[1], jnp.sqrt(area * jnp.exp(-log_aspect)), top)
    columns = _weights(image.shape[2], jnp.sqrt(area * jnp.exp(log_aspect)), left)
    # As matrix products, because a TPU gathers pixel by pixel. Float32 represents all sums exactly, in any order.
    resized = jnp.einsum("byr,brsc->bysc", rows, image.astype(jnp.float32), precision="highest")
    resized = jnp.einsum("bxs,bysc->byxc", columns, resized, precision="highest")
    return examples._replace(image=jnp.round(resized).astype(jnp.uint8))


def _weights(size: int, fraction: PerImage, position: PerImage) -> Float[Array, "batch size size"]:
    """Return the weight of each of `size` source coordinates (last axis) in each coordinate of the resized crop.

    The crop has `fraction` of the side, at a `position` from 0 to 1. The weights are multiples of 1/256.
    """
    start = (position * (1 - fraction) * size)[:, None]
    source = start + (jnp.arange(size)[None, :] + 0.5) * fraction[:, None] - 0.5
    source = jnp.round(jnp.clip(source, 0, size - 1) * 256) / 256
    return jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - jnp.arange(size)[None, None, :]))
