"""Color jitter, and the operations on colors that it shares with TrivialAugment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cifar_flax.data.augment.base import Context, Examples

Images = UInt8[Array, "batch height width c"]


def color_jitter(examples: Examples, context: Context) -> Examples:
    """Scale the brightness, then the contrast, then the saturation of each image by random factors.

    Each factor is uniform between 1 - `color_jitter` and 1 + `color_jitter`. Grayscale images have no saturation.

    Source: Howard 2013 (arXiv:1312.5402), section 2, but always in this order.
    """
    strength, image = context.config.color_jitter, examples.image
    if not strength:
        return examples
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength))
    brightness, contrast, saturation = uniform(context.keys("color_jitter")).T[..., None, None, None]
    image = blend(jnp.zeros(()), image, brightness)
    image = blend(mean_gray(image), image, contrast)
    if image.shape[-1] == 3:
        image = blend(gray(image), image, saturation)
    # Otherwise XLA:CPU computes the image again for each use of a pixel.
    return examples._replace(image=jax.lax.optimization_barrier(image))


def blend(base: Array, image: Array, factor: Array) -> UInt8[Array, "..."]:
    """Return `base + factor * (image - base)`, rounded and clipped to 0 to 255; the shapes are broadcast."""
    base = base.astype(jnp.float32)
    return jnp.clip(jnp.round(base + factor * (image - base)), 0, 255).astype(jnp.uint8)


def gray(image: Images) -> UInt8[Array, "batch height width 1"]:
    """Return the luma of each pixel, which is the value itself in grayscale images."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = jnp.moveaxis(image.astype(jnp.int32), -1, 0)
    luma = 19595 * red + 38470 * green + 7471 * blue  # ITU-R BT.601: 0.299, 0.587 and 0.114, in units of 1/65536
    return ((luma + 2**15) >> 16).astype(jnp.uint8)[..., None]


def mean_gray(image: Images) -> Float[Array, "batch 1 1 1"]:
    """Return the rounded mean luma of each image, summed as integers: independent of the order of summation."""
    total = jnp.sum(gray(image).astype(jnp.int32), axis=(1, 2, 3), keepdims=True)
    return jnp.round(total.astype(jnp.float32) / (image.shape[1] * image.shape[2]))
