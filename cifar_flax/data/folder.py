"""Folders of image files as datasets.

A folder holds `train/<class>/...` and `test/<class>/...`, or only `<class>/...`. In the second case, a hash of the path
of each file decides its split, so that additional files do not move others.
"""

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cifar_flax import files
from cifar_flax.data import cache
from cifar_flax.data.cache import Arrays
from cifar_flax.data.class_folders import Listing, Problem, find
from cifar_flax.data.config import DataConfig, cache_dir
from cifar_flax.data.images import read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime import processes
from cifar_flax.runtime.environment import usable_cores
from cifar_flax.runtime.progress import ProgressBar
from cifar_flax.runtime.streams import printable

_READER = 1  # to be increased if the arrays of the same files change
_SHOWN = 20  # files that are named if they cannot be read
_FEW = 5  # files that may be unreadable in any folder
_BATCH = 256  # images


def load(config: DataConfig, split: str) -> Arrays:
    """Return the decoded `split` of `config.folder`, memory-mapped from the cache; log sizes and unreadable files.

    Raise `ConfigError` if the folder does not hold at least two classes of images, `UserError` if too many files cannot
    be read (see `require_few_unreadable`).
    """
    name, listing = printable(config.folder), find(config)
    if split == config.train_split:
        train, test = (len(one.files) for one in listing.splits.values())
        counts = f"{train:,} {split} and {test:,} {config.eval_split} files ({test / (train + test):.1%})"
        loose = f"; {listing.loose:,} files in no class folder are ignored" if listing.loose else ""
        processes.log(f"{name}: {len(listing.class_names):,} classes, {counts}{loose}")
    arrays = decoded(config, split, listing)
    if arrays.skipped:
        lines = [f"{name}: {len(arrays.skipped):,} {split} files cannot be read", *unreadable(arrays)]
        processes.log("\n  ".join(lines))
    require_few_unreadable(config, split, arrays)
    return arrays


def decoded(config: DataConfig, split: str, listing: Listing) -> Arrays:
    """Return the decoded `split` of `listing`, from the cache if the folder has not changed."""
    place = cache_dir(config) / "folders" / _checksum(os.path.realpath(listing.root))
    target = place / f"{split}_{config.side}px.{_key(listing, split)}"
    if (arrays := cache.load(target)) is not None:
        return arrays
    with cache.filling(place):
        return cache.load(target) or _decode(config, split, listing, target)


def unreadable(arrays: Arrays) -> list[str]:
    """Return the first files that cannot be read, each with the reason, and the number of the others."""
    lines = [f"{printable(path)}: {why}" for path, why in arrays.skipped[:_SHOWN]]
    return [*lines, f"and {len(arrays.skipped) - _SHOWN:,} more"] if len(arrays.skipped) > _SHOWN else lines


def require_few_unreadable(config: DataConfig, split: str, arrays: Arrays) -> None:
    """Raise `UserError` if more than five files and `max_bad_fraction` of all, or those of a class, cannot be read."""
    bad, total = len(arrays.skipped), len(arrays.skipped) + len(arrays.labels)
    if bad > _FEW and bad > config.max_bad_fraction * total:
        advice = f"such as {printable(arrays.skipped[0][0])}; remove them, or raise the fraction"
        count = f"{bad:,} of {total:,} {split} files cannot be read"
        raise UserError(f"data.max_bad_fraction={config.max_bad_fraction}: {count}, {advice}")
    if missing := set(range(len(arrays.class_names))) - set(arrays.labels.tolist()):
        name = arrays.class_names[min(missing)]
        advice = "remove the files that cannot be read, and add images to the class"
        raise UserError(f"data.folder={config.folder!r}: no {split} image of the class {name!r} can be read; {advice}")


def duplicates(train: Arrays, test: Arrays) -> str:
    """Return a line that counts the images of `test` that are exact copies of images of `train`, or ""."""
    places = {_digest(image): i for i, image in enumerate(train.images)}
    pairs = [(i, places[digest]) for i, digest in enumerate(map(_digest, test.images)) if digest in places]
    if not pairs:
        return ""
    example = printable(f"{test.files[pairs[0][0]]} of {train.files[pairs[0][1]]}")
    return f"{len(pairs):,} of {len(test.labels):,} images to evaluate are exact copies of training images: {example}"


def _decode(config: DataConfig, split: str, listing: Listing, target: Path) -> Arrays:
    """Decode the files that can be read into the cache, and remove the arrays of earlier contents of the folder."""
    start, name = time.perf_counter(), printable(config.folder)
    earlier = list(target.parent.glob(f"{target.name.partition('.')[0]}.*"))
    if earlier:
        processes.log(f"{name}: the {split} files have changed since they were decoded; decoding them again")
    about: dict[str, list[Any]] = {"files": [], "skipped": list(listing.splits[split].problems)}
    shape = (config.side, config.side, 3)
    arrays = cache.store(
        target,
        _images(listing.root, listing.splits[split].files, shape, about["files"], about["skipped"]),
        image_shape=shape,
        class_names=listing.class_names,
        dataset=printable(os.path.basename(os.path.realpath(listing.root))),
        about=about,
    )
    for folder in earlier:
        cache.remove(folder)
    seconds = time.perf_counter() - start
    processes.log(
        f"{name}: decoded {len(arrays.labels):,} {split} images in {seconds:.1f} s, {usable_cores()} at a time"
    )
    return arrays


def _images(
    root: Path, found: Sequence[tuple[str, int]], shape: tuple[int, int, int], read: list[str], skipped: list[Problem]
) -> Iterator[tuple[UInt8[np.ndarray, "n height width c"], np.ndarray]]:
    """Yield batches of images and labels; append the paths of the files to `read` or, with the reason, to `skipped`."""

    def image(path: str) -> UInt8[np.ndarray, "height width c"] | str:
        try:
            return read_image(root / path, shape)
        except UserError as error:
            return str(error)  # the exception itself refers to the memory of the image

    with (
        warnings.catch_warnings(action="ignore"),  # of Pillow
        ThreadPoolExecutor(usable_cores()) as pool,
        contextlib.closing(ProgressBar(len(found), "image")) as progress,
    ):
        for start in range(0, len(found), _BATCH):
            batch = found[start : start + _BATCH]
            images, labels = [], []
            for (path, label), content in zip(batch, pool.map(image, [path for path, _ in batch]), strict=True):
                progress.advance(1)
                if isinstance(content, str):
                    skipped.append((path, content))
                    continue
                read.append(path)
                images.append(content)
                labels.append(label)
            if images:
                yield np.stack(images), np.array(labels, np.int32)


def _key(listing: Listing, split: str) -> str:
    """Return the key of the decoded split: a checksum of names, sizes and modification times of the files."""

    def state(path: str) -> tuple[int, int, bool]:
        try:
            status = os.stat(listing.root / path)
        except OSError:  # such as a link to nothing
            return 0, 0, False
        return status.st_size, status.st_mtime_ns, os.access(listing.root / path, os.R_OK)

    of = listing.splits[split]
    return _checksum([_READER, listing.class_names, [(*one, *state(one[0])) for one in of.files], of.problems])


def _checksum(content: Any) -> str:
    return files.json_checksum(content)[:16]


def _digest(image: UInt8[np.ndarray, "height width c"]) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
