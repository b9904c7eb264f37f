"""From stored bytes to network inputs, inside the compiled step: normalisation and random augmentation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from cifar_flax.errors import require


@dataclass(slots=True, kw_only=True)
class AugmentConfig:
    normalization: str = "standard"  # standard: mean 0, deviation 1 over the train split | unit: 0 to 1
    flip: bool = False  # mirror each image left-right with probability 1/2
    crop_padding: int = 0  # pixels of reflect padding around a random crop of the original size

    def validate(self) -> None:
        field, value = "augment.normalization", self.normalization
        require(value in ("standard", "unit"), field, value, "must be standard or unit")
        require(self.crop_padding >= 0, "augment.crop_padding", self.crop_padding, "must be at least 0")

    def validate_for(self, image_shape: tuple[int, int, int]) -> None:
        limit = min(image_shape[:2]) - 1  # reflection repeats no pixel twice
        field, value = "augment.crop_padding", self.crop_padding
        require(
            value <= limit, field, value, f"must be at most {limit} for images of {image_shape[0]}x{image_shape[1]}"
        )


def normalize(
    image: UInt8[Array, "batch height width c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width c"]:
    """`(image - mean) / std` per channel, both in units of the stored bytes (0 to 255)."""
    scale = 1 / jnp.asarray(std, jnp.float32)
    shift = -jnp.asarray(mean, jnp.float32) * scale
    return image.astype(jnp.float32) * scale[None, None, None] + shift[None, None, None]


def augment(
    image: UInt8[Array, "batch height width c"], keys: Key[Array, " batch"], config: AugmentConfig
) -> UInt8[Array, "batch height width c"]:
    """Flips and crops each image by its own key.

    Flip and crop only rearrange pixels, so both are done at once: for each image, which source row and which source
    column every output pixel comes from.
    """
    if not config.flip and not config.crop_padding:
        return image
    batch, height, width, _ = image.shape
    flip_keys, row_keys, column_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    rows = _crop(height, row_keys, config.crop_padding)
    columns = _crop(width, column_keys, config.crop_padding)
    if config.flip:
        flipped = jax.vmap(jax.random.bernoulli)(flip_keys)[:, None]
        columns = jnp.where(flipped, columns[:, ::-1], columns)
    return image[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _crop(size: int, keys: Key[Array, " batch"], padding: int) -> Int[Array, "batch size"]:
    """Source coordinates of a random crop of `size` out of `size + 2 * padding`, reflected at the borders."""
    shift = jax.vmap(lambda key: jax.random.randint(key, (), -padding, padding + 1))(keys)
    coordinate = jnp.arange(size)[None, :] + shift[:, None]
    last = size - 1
    return last - jnp.abs(last - jnp.abs(coordinate))
