"""Random horizontal flips and random crops."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from cifar_flax.data.augment.base import Context, Examples


def flip_and_crop(examples: Examples, context: Context) -> Examples:
    """Flip and crop each image at random.

    Alternating flips show each example mirrored in every other epoch; the first epoch is random. Both operations only
    rearrange pixels, so one gather does them: each output pixel has a source row and a source column.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.6 (alternating flips).
    """
    config, image = context.config, examples.image
    if config.flip == "none" and not config.crop_padding:
        return examples
    batch, height, width, _ = image.shape
    rows = _crop(height, context.keys("crop_rows"), config.crop_padding)
    columns = _crop(width, context.keys("crop_columns"), config.crop_padding)
    if config.flip != "none":
        is_alternating = config.flip == "alternating"
        flipped = jax.vmap(jax.random.bernoulli)(context.keys("flip", first_epoch=is_alternating))
        if is_alternating:
            flipped ^= context.epoch % 2 == 1
        columns = jnp.where(flipped[:, None], columns[:, ::-1], columns)
    return examples._replace(image=image[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]])


def _crop(size: int, keys: Key[Array, " batch"], padding: int) -> Int[Array, "batch size"]:
    """Return the source coordinates of a random crop of `size` out of `size + 2 * padding`, reflected at the edges."""
    shift = jax.vmap(lambda key: jax.random.randint(key, (), -padding, padding + 1))(keys)
    coordinate = jnp.arange(size)[None, :] + shift[:, None]
    last = size - 1
    return last - jnp.abs(last - jnp.abs(coordinate))
