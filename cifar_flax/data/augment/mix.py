"""Mixup and CutMix: mix each image and its target with the next one in the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cifar_flax.data.augment.base import Context, Examples


def mix(examples: Examples, context: Context) -> Examples:
    """Mix each example with the next one by mixup or, if both are on, by one of mixup and CutMix at random.

    The weight of the example itself is drawn from Beta(alpha, alpha), whose alpha is `mixup` or `cutmix`. CutMix pastes
    a rectangle that may extend beyond the image; the weight of the target is the fraction of pixels that remain.

    Sources: Zhang et al. 2018 (arXiv:1710.09412), section 2 (mixup); Yun et al. 2019 (arXiv:1905.04899), section 3.
    """
    config, (height, width) = context.config, examples.image.shape[1:3]
    weights = []
    if config.mixup:
        weights.append(_beta(context, "mixup", config.mixup)[:, None, None])
    if config.cutmix:
        weights.append(_outside_rectangle(context, height, width))
    if not weights:
        return examples
    is_last = jax.vmap(jax.random.bernoulli)(context.keys("mixup_or_cutmix"))[:, None, None]
    own = jnp.where(is_last, weights[-1], weights[0])
    own_target = jnp.mean(own, axis=(1, 2))[:, None]
    image = own[..., None] * examples.image + (1 - own)[..., None] * context.next_row(examples.image)
    return Examples(image, own_target * examples.target + (1 - own_target) * context.next_row(examples.target))


def _beta(context: Context, name: str, alpha: float) -> Float[Array, " batch"]:
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(context.keys(name))


def _outside_rectangle(context: Context, height: int, width: int) -> Float[Array, "batch height width"]:
    """Return 0 for pixels in a rectangle whose center is uniform in the image, and 1 for the others."""
    sides = jnp.sqrt(1 - _beta(context, "cutmix", context.config.cutmix))
    center = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(context.keys("cutmix_center"))

    def inside(axis: int, size: int) -> Array:
        position = (jnp.arange(size) + 0.5) / size
        return jnp.abs(position[None, :] - center[:, axis, None]) < sides[:, None] / 2

    return 1.0 - (inside(0, height)[:, :, None] & inside(1, width)[:, None, :])
