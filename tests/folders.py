"""Helpers that write folders of images."""

import numpy as np
from PIL import Image

from cifar_flax.data import sources
from cifar_flax.data.config import DataConfig


def write(folder, *names, side=20, seed=0):
    """Write a PNG file with random pixels for each of `names`, relative to `folder`; return `folder`."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path, format="PNG")
    return folder


def many(*classes, count=10):
    """Return `count` names of files for each of `classes`."""
    return [f"{name}/{number}.png" for name in classes for number in range(count)]


def load(folder, **settings):
    """Return the train and the evaluation split of `folder`, decoded to 16x16 pixels by default."""
    config = DataConfig(**{"folder": str(folder), "image_size": 16} | settings)
    config.validate()
    return sources.load_both(config)


def write_arrays(folder, **splits):
    """Write the `Arrays` of each of `splits` as PNG files in class folders, numbered in their order."""
    for split, arrays in splits.items():
        for number, (image, label) in enumerate(zip(arrays.images, arrays.labels, strict=True)):
            path = folder / split / arrays.class_names[label] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def by_class(arrays):
    """Return the order in which a folder holds the examples of `arrays`: by class, then as they are."""
    return np.argsort(arrays.labels, kind="stable")
