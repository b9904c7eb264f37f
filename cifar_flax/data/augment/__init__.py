"""Data augmentation in the compiled step. To add one, write a file with a function and add it to a tuple below.

The function takes the `Examples` of a batch and a `Context`, and returns `Examples` of the same shapes. It reads its
settings from `context.config`: add a field to `AugmentConfig`, whose default switches the augmentation off. It draws
random numbers from `context.keys(name)`, one key per example; any new name is a new stream of random numbers, so that
no other augmentation changes. Functions in `ON_BYTES` get the stored uint8 images, functions in `ON_FLOATS` get
normalized float32 images. Either may change the targets, and mix each example with the next one by `context.next_row`.
"""

from collections.abc import Callable

from cifar_flax.data.augment.base import AugmentConfig, Context, Examples, normalize
from cifar_flax.data.augment.color_jitter import color_jitter
from cifar_flax.data.augment.cutout import cutout
from cifar_flax.data.augment.flip_crop import flip_and_crop
from cifar_flax.data.augment.mix import mix
from cifar_flax.data.augment.resize import resize
from cifar_flax.data.augment.resized_crop import random_resized_crop
from cifar_flax.data.augment.trivial_augment import trivial_augment
from cifar_flax.data.augment.tta import VIEWS, views

__all__ = ["VIEWS", "AugmentConfig", "Context", "Examples", "augment", "normalize", "resize", "views"]

Augmentation = Callable[[Examples, Context], Examples]

# In the order of application.
ON_BYTES: tuple[Augmentation, ...] = (random_resized_crop, flip_and_crop, trivial_augment, color_jitter)
ON_FLOATS: tuple[Augmentation, ...] = (cutout, mix)


def augment(examples: Examples, context: Context, mean: tuple[float, ...], std: tuple[float, ...]) -> Examples:
    """Augment and normalize uint8 images; return float32 images, and their targets."""
    for augmentation in ON_BYTES:
        examples = augmentation(examples, context)
    examples = examples._replace(image=normalize(examples.image, mean, std))
    for augmentation in ON_FLOATS:
        examples = augmentation(examples, context)
    return examples
