"""The result of the readers in this package, a `Split`, and names of classes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, UInt8

from cifar_flax.errors import UserError

Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Integer[np.ndarray, " n"]]]
_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
# data.name -> names in the order of the labels; of CIFAR-100, of the fine labels
CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_FINE.split()),
}


@dataclass(frozen=True, slots=True)
class Split:
    """The images, in the order of the files, and labels of a split; they are read while `batches` is consumed."""

    batches: Batches
    image_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]


def numbered(classes: int) -> tuple[str, ...]:
    """Return the names of classes that have none. Raise `UserError` if there are more than 100,000."""
    if classes > 100_000:
        raise UserError(f"contains label {classes - 1}; labels must be below 100,000")
    return tuple(map(str, range(classes)))
