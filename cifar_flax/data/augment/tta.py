"""Test-time augmentation (TTA): variants of an image, the TTA views, whose logits are averaged."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

# Name -> weight of each view that `views` returns. The weights add up to 1.
VIEWS = {"none": (1.0,), "mirror": (0.5,) * 2, "mirror_translate": (0.25,) * 2 + (0.125,) * 4}


def views(image: UInt8[Array, "batch height width c"], name: str) -> UInt8[Array, "view batch height width c"]:
    """Return the TTA views of each image for `name`, a key of `VIEWS`.

    mirror: the image and its mirror image. mirror_translate: also the image shifted by one pixel (reflected at the
    edges) down and to the right, and up and to the left, each with its mirror image.

    Source: the repository KellerJordan/cifar10-airbench, `infer_mirror_translate`.
    """
    chosen = [image]
    if name == "mirror_translate":
        padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        chosen += [padded[:, :-2, :-2], padded[:, 2:, 2:]]
    if name != "none":
        chosen = [view for shifted in chosen for view in (shifted, shifted[:, :, ::-1])]
    return jnp.stack(chosen)
