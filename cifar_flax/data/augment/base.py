"""Settings and input types of the augmentations, and normalization."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from cifar_flax.errors import require


@dataclass(slots=True, kw_only=True)
class AugmentConfig:
    normalization: str = "standard"  # standard (mean 0, standard deviation 1 over the train split) | unit (0 to 1)
    flip: str = "none"  # horizontal: none | random | alternating (random in epoch 0, then changed in every epoch)
    crop_padding: int = 0  # pixels of reflect padding before a random crop to the original size
    random_resized_crop: float = 1.0  # smallest area of a random crop, a fraction of the image's; 1.0: no crop
    trivial_augment: bool = False  # TrivialAugment: one random operation of random strength per image
    color_jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    cutout: int = 0  # side in pixels of a random square that is set to zero after normalization
    mixup: float = 0.0  # alpha of mixup, which averages each example with the next one; 0.0: off
    cutmix: float = 0.0  # alpha of CutMix, which pastes a rectangle of the next image; 0.0: off

    def validate(self) -> None:
        for field, allowed in (("normalization", ("standard", "unit")), ("flip", ("none", "random", "alternating"))):
            value = getattr(self, field)
            require(value in allowed, f"augment.{field}", value, f"must be one of {', '.join(allowed)}")
        for field in ("crop_padding", "cutout"):
            require(getattr(self, field) >= 0, f"augment.{field}", getattr(self, field), "must be at least 0")
        area, jitter, padding = self.random_resized_crop, self.color_jitter, self.crop_padding
        require(0 < area <= 1, "augment.random_resized_crop", area, "must be above 0 and at most 1 (off)")
        alone = "must be 0 with augment.random_resized_crop, which crops too"
        require(area == 1 or padding == 0, "augment.crop_padding", padding, alone)
        require(0 <= jitter <= 1, "augment.color_jitter", jitter, "must be in [0, 1]")
        for field, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            require(alpha == 0 or 0.01 <= alpha <= 100, f"augment.{field}", alpha, "must be 0 (off) or in [0.01, 100]")

    def validate_for(self, image_shape: tuple[int, int, int]) -> None:
        """Raise `ConfigError` if images of `image_shape` (height, width, channels) are too small for a setting."""
        side = min(image_shape[:2])
        # Reflect padding must be smaller than the image.
        for field, limit in (("crop_padding", side - 1), ("cutout", side)):
            allowed = f"must be at most {limit} for images of {image_shape[0]}x{image_shape[1]}"
            require(getattr(self, field) <= limit, f"augment.{field}", getattr(self, field), allowed)


class Examples(NamedTuple):
    """The images and the targets of a device's part of a batch."""

    image: Shaped[Array, "batch height width c"]  # uint8 before normalization, then float32
    target: Float[Array, "batch classes"]  # probability of each class, times the class weight of the example


# Do not change these numbers, which determine the results of existing configs. Other names use their CRC-32.
_STREAMS = {"flip": 0, "crop_rows": 1, "crop_columns": 2, "cutout_rows": 3, "cutout_columns": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The settings and the sources of randomness that an augmentation uses."""

    config: AugmentConfig
    platform: str  # of the devices: "cpu", "gpu" or "tpu"
    epoch: Int[Array, " batch"]  # of each example
    epoch_keys: Key[Array, " batch"]  # a function of the seed, the epoch and the example
    first_epoch_keys: Key[Array, " batch"]  # those of epoch 0
    next_row: Callable[[Array], Array]  # shift rows [batch, ...] by one in the batch of all devices, cyclically

    def keys(self, name: str, *, first_epoch: bool = False) -> Key[Array, " batch"]:
        """Return one key per example for the random stream `name`; with `first_epoch`, the same key in each epoch."""
        number = _STREAMS.get(name, zlib.crc32(name.encode()))
        keys = self.first_epoch_keys if first_epoch else self.epoch_keys
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def normalize(
    image: UInt8[Array, "batch height width c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width c"]:
    """Return `(image - mean) / std` for each channel; `mean` and `std` are in units of the stored bytes (0 to 255)."""
    scale = 1 / jnp.asarray(std, jnp.float32)
    shift = -jnp.asarray(mean, jnp.float32) * scale
    return image.astype(jnp.float32) * scale[None, None, None] + shift[None, None, None]
