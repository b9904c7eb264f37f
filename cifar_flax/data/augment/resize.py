"""Resizing for progressive resizing: train on smaller images first, on which a step takes fewer operations."""

import jax
from jaxtyping import Array, Float


def resize(images: Float[Array, "batch height width c"], side: int) -> Float[Array, "batch side side c"]:
    """Return the images, resized by linear interpolation. A pixel of smaller images is a mean of all that it covers.

    Source: Howard 2018, "Training Imagenet in 3 hours for 25 minutes" (fast.ai). According to the repository
    fulcrumresearch/cifar-10-speedrun, resized images cost less accuracy on CIFAR-10 than crops of the same size.
    """
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, side, side, channels), "linear")
