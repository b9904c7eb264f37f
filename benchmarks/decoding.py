"""Measure the time and the memory of decoding folders of images into the cache: small PNG files and large JPEG files.

Command: python -m benchmarks.decoding
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from cifar_flax.data import sources
from cifar_flax.data.config import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000, help="number of PNG files of 32x32 pixels")
    parser.add_argument("--large", type=int, default=200, help="number of JPEG files of 4000x3000 pixels")
    parser.add_argument("--decode", nargs=2, metavar=("FOLDER", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode(options.decode[0], int(options.decode[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary, "small"), Path(temporary, "large")
        write_small(small, options.small)
        write_large(large, options.large)
        for folder, size in ((small, 32), (small, 64), (large, 64)):
            command = [sys.executable, "-m", "benchmarks.decoding", "--decode", str(folder), str(size)]
            subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": f"{temporary}/cache"}, check=True)


def write_small(folder: Path, count: int) -> None:
    """Write `count` PNG files of random pixels in ten class folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def write_large(folder: Path, count: int) -> None:
    """Write `count` JPEG files of 12 megapixels and at least 3 MB: scikit-learn's two sample photos with noise."""
    rng, photos = np.random.default_rng(0), []
    for photo in load_sample_images().images:
        photos.append(np.asarray(Image.fromarray(photo).resize((4000, 3000))).astype(np.int16))
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(-20, 21, photos[0].shape, dtype=np.int16)
        Image.fromarray(np.clip(photos[number % 2] + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        if path.stat().st_size < 3e6:
            raise SystemExit(f"{path} has only {path.stat().st_size} bytes")


def decode(folder: str, size: int) -> None:
    """Decode `folder` into the cache; print the time, and the peak memory above that of the start."""
    before, begin = memory("VmRSS"), time.perf_counter()
    splits = sources.load_both(DataConfig(folder=folder, image_size=size))
    seconds, count = time.perf_counter() - begin, sum(len(arrays.labels) for arrays in splits)
    print(f"{count:,} files to {size}x{size}: {seconds:.1f} s, {memory('VmHWM') - before:.2f} GB above the start")


def memory(name: str) -> float:
    """Return the value of `name` in /proc/self/status (Linux), in gigabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e6


if __name__ == "__main__":
    main()
