"""Run an exported model, without importing this package; other programs can do the same.

`python run_program.py FOLDER IMAGES.npy PROBABILITIES.npy` reads uint8 images of shape (n, height, width, channels) and
writes float32 probabilities of shape (n, classes). It prints the platform that it used, such as "cpu".
"""

import sys
from pathlib import Path

import jax
import jax.export
import numpy as np

_BATCH = 500  # images per call


def main(folder: str, images: str, probabilities: str) -> None:
    """Classify the images in the file `images` with the program in `folder`; write the file `probabilities`."""
    program = jax.export.deserialize(bytearray(Path(folder, "model.stablehlo").read_bytes()))
    classify = jax.jit(program.call)
    pixels = np.load(images, mmap_mode="r", allow_pickle=False)
    batches = [classify(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
    np.save(probabilities, np.concatenate(batches), allow_pickle=False)
    print(jax.local_devices()[0].platform)


if __name__ == "__main__":
    main(*sys.argv[1:])
