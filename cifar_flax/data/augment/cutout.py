"""Cutout: set a random square of each image to zero."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from cifar_flax.data.augment.base import Context, Examples


def cutout(examples: Examples, context: Context) -> Examples:
    """Set a square of `cutout` pixels at a random place of each normalized image to zero.

    Source: DeVries and Taylor 2017 (arXiv:1708.04552), but with squares that never leave the image.
    """
    size, image = context.config.cutout, examples.image
    if not size:
        return examples
    rows = _inside(image.shape[1], context.keys("cutout_rows"), size)
    columns = _inside(image.shape[2], context.keys("cutout_columns"), size)
    return examples._replace(image=jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, image))


def _inside(side: int, keys: Key[Array, " batch"], size: int) -> Bool[Array, "batch side"]:
    """Return True for each of `side` coordinates that lies inside a random interval of `size` coordinates."""
    start = jax.vmap(lambda key: jax.random.randint(key, (), 0, side - size + 1))(keys)
    distance = jnp.arange(side)[None, :] - start[:, None]
    return (distance >= 0) & (distance < size)
