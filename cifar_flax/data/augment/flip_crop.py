"""Random horizontal flips and random crops."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from cifar_flax.data.augment.base import Context, Examples


def flip_and_crop(examples: Examples, context: Context) -> Examples:
    """Flip and crop each image at random.

    Alternating flips show each example mirrored in every other epoch; the first epoch is random.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.6 (alternating flips).
    """
    config, image = context.config, examples.image
    if config.flip == "none" and not config.crop_padding:
        return examples
    # From the image to a crop of the same size out of the padded image.
    shift = jax.vmap(lambda key: jax.random.randint(key, (), -config.crop_padding, config.crop_padding + 1))
    rows, columns = shift(context.keys("crop_rows")), shift(context.keys("crop_columns"))
    flipped = jnp.zeros(len(image), jnp.bool_)
    if config.flip != "none":
        is_alternating = config.flip == "alternating"
        flipped = jax.vmap(jax.random.bernoulli)(context.keys("flip", first_epoch=is_alternating))
        if is_alternating:
            flipped ^= context.epoch % 2 == 1
    if context.platform == "tpu":
        return examples._replace(image=_select(image, rows, columns, flipped, config.crop_padding))
    return examples._replace(image=_gather(image, rows, columns, flipped))


def _gather(
    image: Shaped[Array, "batch height width c"],
    rows: Int[Array, " batch"],
    columns: Int[Array, " batch"],
    flipped: Bool[Array, " batch"],
) -> Shaped[Array, "batch height width c"]:
    """Shift each image by `rows` and `columns`, reflected at the edges, then mirror it if `flipped`, by one gather.

    Both operations only rearrange pixels: each output pixel has a source row and a source column.
    """
    batch, height, width, _ = image.shape
    row, column = _sources(height, rows), _sources(width, columns)
    column = jnp.where(flipped[:, None], column[:, ::-1], column)
    return image[jnp.arange(batch)[:, None, None], row[:, :, None], column[:, None, :]]


def _sources(size: int, shift: Int[Array, " batch"]) -> Int[Array, "batch size"]:
    """Return the source coordinate of each of `size` coordinates after `shift`, reflected at the edges."""
    coordinate = jnp.arange(size)[None, :] + shift[:, None]
    last = size - 1
    return last - jnp.abs(last - jnp.abs(coordinate))


def _select(
    image: Shaped[Array, "batch height width c"],
    rows: Int[Array, " batch"],
    columns: Int[Array, " batch"],
    flipped: Bool[Array, " batch"],
    padding: int,
) -> Shaped[Array, "batch height width c"]:
    """Return the same as `_gather`, by shifting the whole batch by each possible distance and selecting per image.

    A TPU gathers pixel by pixel, but selects many elements at a time.
    """
    batch, height, width, c = image.shape
    # While rows are shifted, a pixel's channels need no axis. With it, XLA would pad them to 4 in this step, too.
    image = _select_shift(image.reshape(batch, height, width * c), rows, padding, axis=1)
    image = _select_shift(image.reshape(batch, height, width, c), columns, padding, axis=2)
    return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)


def _select_shift(
    image: Shaped[Array, "batch *rest"], shift: Int[Array, " batch"], padding: int, axis: int
) -> Shaped[Array, "batch *rest"]:
    """Shift each image by `shift`, which is at most `padding` in both directions, along `axis`."""
    size = image.shape[axis]
    padded = jnp.pad(image, [(padding, padding) if a == axis else (0, 0) for a in range(image.ndim)], mode="reflect")
    shift = shift.reshape(-1, *[1] * (image.ndim - 1))
    for distance in (*range(-padding, 0), *range(1, padding + 1)):
        shifted = lax.slice_in_dim(padded, padding + distance, padding + distance + size, axis=axis)
        image = jnp.where(shift == distance, shifted, image)
    return image
