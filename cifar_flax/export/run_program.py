"""Runs an exported network: all that another program needs to know. It imports nothing of this package.

`python exported.py FOLDER IMAGES.npy PROBABILITIES.npy` classifies the images of one file, bytes of the shape
(n, height, width, channels), and writes their probabilities, float32 of the shape (n, classes), to the other.
"""

import sys
from pathlib import Path

import jax
import jax.export
import numpy as np

_BATCH = 500  # images at a time


def main(folder: str, images: str, probabilities: str) -> None:
    program = jax.export.deserialize(bytearray(Path(folder, "model.stablehlo").read_bytes()))
    classify = jax.jit(program.call)
    pixels = np.load(images, mmap_mode="r", allow_pickle=False)
    batches = [classify(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
    np.save(probabilities, np.concatenate(batches), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
