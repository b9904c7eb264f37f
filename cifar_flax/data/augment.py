"""From stored bytes to network inputs, inside the compiled step: normalisation and random augmentation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from cifar_flax.errors import require


@dataclass(slots=True, kw_only=True)
class AugmentConfig:
    normalization: str = "standard"  # standard: mean 0, deviation 1 over the train split | unit: 0 to 1
    flip: str = "none"  # mirror left-right: none | random (by chance) | alternating (by chance, then every other epoch)
    crop_padding: int = 0  # pixels of reflect padding around a random crop of the original size
    cutout: int = 0  # pixels along the side of a square that is zeroed after normalisation (standard: mean colour)

    def validate(self) -> None:
        for field, allowed in (("normalization", ("standard", "unit")), ("flip", ("none", "random", "alternating"))):
            value = getattr(self, field)
            require(value in allowed, f"augment.{field}", value, f"must be one of {', '.join(allowed)}")
        for field in ("crop_padding", "cutout"):
            require(getattr(self, field) >= 0, f"augment.{field}", getattr(self, field), "must be at least 0")

    def validate_for(self, image_shape: tuple[int, int, int]) -> None:
        side = min(image_shape[:2])
        for field, limit in (("crop_padding", side - 1), ("cutout", side)):  # reflection repeats no pixel twice
            allowed = f"must be at most {limit} for images of {image_shape[0]}x{image_shape[1]}"
            require(getattr(self, field) <= limit, f"augment.{field}", getattr(self, field), allowed)


def normalize(
    image: UInt8[Array, "batch height width c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width c"]:
    """`(image - mean) / std` per channel, both in units of the stored bytes (0 to 255)."""
    scale = 1 / jnp.asarray(std, jnp.float32)
    shift = -jnp.asarray(mean, jnp.float32) * scale
    return image.astype(jnp.float32) * scale[None, None, None] + shift[None, None, None]


def augment(
    image: UInt8[Array, "batch height width c"],
    keys: Key[Array, " batch"],
    config: AugmentConfig,
    *,
    epoch: Int[Array, " batch"],
    first_keys: Key[Array, " batch"],
) -> UInt8[Array, "batch height width c"]:
    """Flips and crops each image by its own key; `first_keys` are those of the same examples in epoch 0.

    Alternating flips show each example in each epoch as the mirror image of what it was in the epoch before.

    Flip and crop only rearrange pixels, so both are done at once: for each image, which source row and which source
    column every output pixel comes from.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.6 (alternating flips).
    """
    if config.flip == "none" and not config.crop_padding:
        return image
    batch, height, width, _ = image.shape
    flip_keys, row_keys, column_keys, *_ = _split(keys)
    rows = _crop(height, row_keys, config.crop_padding)
    columns = _crop(width, column_keys, config.crop_padding)
    if config.flip != "none":
        alternating = config.flip == "alternating"
        flipped = jax.vmap(jax.random.bernoulli)(_split(first_keys)[0] if alternating else flip_keys)
        if alternating:
            flipped ^= epoch % 2 == 1
        columns = jnp.where(flipped[:, None], columns[:, ::-1], columns)
    return image[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutout(
    image: Float[Array, "batch height width c"], keys: Key[Array, " batch"], size: int
) -> Float[Array, "batch height width c"]:
    """Sets a square of `size` pixels, somewhere inside each normalised image, to zero.

    Source: DeVries and Taylor 2017 (arXiv:1708.04552), with squares that never leave the image.
    """
    if not size:
        return image
    *_, row_keys, column_keys = _split(keys)
    rows, columns = _inside(image.shape[1], row_keys, size), _inside(image.shape[2], column_keys, size)
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, image)


# Test-time augmentation: name -> weights of the views that `views` gives; they add up to 1.
VIEWS = {"none": (1.0,), "mirror": (0.5,) * 2, "mirror_translate": (0.25,) * 2 + (0.125,) * 4}


def views(image: UInt8[Array, "batch height width c"], name: str) -> UInt8[Array, "views batch height width c"]:
    """The views of each image whose logits are averaged: the image itself, its mirror image, and both of them shifted
    by one pixel (reflected at the border), once down and to the right, once up and to the left.

    Source: the repository KellerJordan/cifar10-airbench, `infer_mirror_translate`.
    """
    chosen = [image]
    if name == "mirror_translate":
        padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        chosen += [padded[:, :-2, :-2], padded[:, 2:, 2:]]
    if name != "none":
        chosen = [view for one in chosen for view in (one, one[:, :, ::-1])]
    return jnp.stack(chosen)


def _split(keys: Key[Array, " batch"]) -> Key[Array, "5 batch"]:
    """The keys for the flip, for row and column of the crop, and for row and column of the square cut out."""
    return jax.vmap(lambda key: jax.random.split(key, 5), out_axes=1)(keys)


def _inside(side: int, keys: Key[Array, " batch"], size: int) -> Bool[Array, "batch side"]:
    """Which places lie in a random range of `size` places out of `side`."""
    start = jax.vmap(lambda key: jax.random.randint(key, (), 0, side - size + 1))(keys)
    distance = jnp.arange(side)[None, :] - start[:, None]
    return (distance >= 0) & (distance < size)


def _crop(size: int, keys: Key[Array, " batch"], padding: int) -> Int[Array, "batch size"]:
    """Source coordinates of a random crop of `size` out of `size + 2 * padding`, reflected at the borders."""
    shift = jax.vmap(lambda key: jax.random.randint(key, (), -padding, padding + 1))(keys)
    coordinate = jnp.arange(size)[None, :] + shift[:, None]
    last = size - 1
    return last - jnp.abs(last - jnp.abs(coordinate))
