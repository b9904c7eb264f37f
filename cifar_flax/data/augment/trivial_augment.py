"""TrivialAugment: one random operation of random strength per image."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cifar_flax.data.augment.base import Context, Examples
from cifar_flax.data.augment.color_jitter import Images, blend, gray, mean_gray

OPERATIONS = (
    "identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y", "auto_contrast", "equalize", "solarize",
    "posterize", "brightness", "contrast", "color", "sharpness",
)  # fmt: skip
_TOP = 30  # the level of the largest strength; the first is 0

PerImage = Shaped[Array, " batch"]


def trivial_augment(examples: Examples, context: Context) -> Examples:
    """Apply one random operation to each image, with a random strength and, if it has directions, a random sign.

    Source: Müller and Hutter 2021 (arXiv:2103.10158), section 3, with the wide space of strengths.
    """
    if not context.config.trivial_augment:
        return examples
    sizes = len(OPERATIONS), _TOP + 1, 2
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, math.prod(sizes)))
    operation, level, sign = jnp.unravel_index(draw(context.keys("trivial_augment")), sizes)
    return examples._replace(image=transform(examples.image, operation, level, 2 * sign - 1))


def transform(image: Images, operation: PerImage, level: PerImage, sign: PerImage) -> Images:
    """Apply to each image its operation, an index into `OPERATIONS`, with a level from 0 to 30 and a sign of -1 or 1.

    Each image passes through three stages, of which at most one changes it: under `vmap`, `lax.switch` would compute
    all 14 operations for each image.
    """
    stage = jax.lax.optimization_barrier  # otherwise XLA:CPU computes a stage again for each use of a pixel
    chosen = {name: operation == number for number, name in enumerate(OPERATIONS)}
    factor = (0.01 + 1.99 * level / _TOP)[:, None, None]  # of brightness, contrast, color and sharpness
    image = stage(_move(image, chosen, level, sign))
    image = stage(_map_values(image, chosen, level, factor))
    is_color, is_sharpness = chosen["color"][:, None, None, None], chosen["sharpness"][:, None, None, None]
    base = jnp.where(is_sharpness, _smooth(image), gray(image))
    return stage(jnp.where(is_color | is_sharpness, blend(base, image, factor[..., None]), image))


def _move(image: Images, chosen: dict[str, PerImage], level: PerImage, sign: PerImage) -> Images:
    """Rotate around the center, shear from the top left, or translate, by one gather of the nearest pixels, or 0."""
    batch, height, width, _ = image.shape

    def amount(name: str, value: Array) -> Float[Array, "batch 1 1"]:
        return jnp.where(chosen[name], sign * value, 0).astype(jnp.float32)[:, None, None]

    angle = amount("rotate", jnp.deg2rad(135 * level // _TOP))
    y, x = jnp.arange(height)[None, :, None] + 0.5, jnp.arange(width)[None, None, :] + 0.5
    v, u = y - height / 2, x - width / 2
    shear, pixels = 0.99 * level / _TOP, 32 * level // _TOP
    row = jnp.sin(angle) * u + jnp.cos(angle) * v + height / 2 + amount("shear_y", shear) * x
    column = jnp.cos(angle) * u - jnp.sin(angle) * v + width / 2 + amount("shear_x", shear) * y
    row = jnp.floor(row + amount("translate_y", pixels)).astype(jnp.int32)
    column = jnp.floor(column + amount("translate_x", pixels)).astype(jnp.int32)
    is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
    return jnp.where(is_inside[..., None], image[jnp.arange(batch)[:, None, None], row, column], 0)


def _map_values(image: Images, chosen: dict[str, PerImage], level: PerImage, factor: Array) -> Images:
    """Replace each value of each channel by an entry of a table."""
    batch, height, width, c = image.shape
    value, level = jnp.arange(256)[None, :, None], level[:, None, None]
    pixels = image.reshape(batch, height * width, c)
    low, high = (f(pixels, axis=1, keepdims=True).astype(jnp.int32) for f in (jnp.min, jnp.max))
    histogram = jnp.zeros((batch, 256, c), jnp.int32).at[jnp.arange(batch)[:, None, None], pixels, jnp.arange(c)].add(1)
    below = jnp.cumsum(histogram, axis=1) - histogram  # number of pixels below each value
    step = jnp.take_along_axis(below, high, axis=1) // 255
    tables = {
        "auto_contrast": jnp.where(high > low, (value - low) * 255 // jnp.maximum(high - low, 1), value),
        "equalize": jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), value),
        "solarize": jnp.where(value < 256 - 256 * level // _TOP, value, 255 - value),
        "posterize": value & -(1 << 6 * level // _TOP),
        "brightness": blend(jnp.zeros(()), value, factor),
        "contrast": blend(mean_gray(image)[..., 0], value, factor),
    }
    table = value
    for name, mapped in tables.items():
        table = jnp.where(chosen[name][:, None, None], mapped, table)
    table = jax.lax.optimization_barrier(jnp.broadcast_to(jnp.clip(table, 0, 255), (batch, 256, c)).astype(jnp.uint8))
    return jnp.take_along_axis(table, pixels.astype(jnp.int32), axis=1).reshape(image.shape)


def _smooth(image: Images) -> Int[Array, "batch height width c"]:
    """Return the mean of each pixel and its neighbors, with weights 5 and 1; pixels at the border stay."""
    wide = image.astype(jnp.int32)
    _, height, width, _ = image.shape
    inner = wide[:, 1:-1, 1:-1]
    shifted = (wide[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    mean = (2 * (sum(shifted) + 4 * inner) + 13) // 26  # rounded
    return wide + jnp.pad(mean - inner, ((0, 0), (1, 1), (1, 1), (0, 0)))
