"""Folders of image files as datasets.

A folder holds `train/<class>/...` and `test/<class>/...`, or only `<class>/...`. In the second case, a hash of the path
of each file decides its split, so that additional files do not move others. The exception is a file that a split has
only because its class would otherwise be missing there.
"""

import contextlib
import dataclasses
import errno
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
from cifar_flax.data.class_folders import Listing, find
from cifar_flax.data.config import DataConfig, cache_dir
from cifar_flax.data.file_images import FileImages, digest
from cifar_flax.data.images import read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime import processes
from cifar_flax.runtime.environment import usable_cores
from cifar_flax.runtime.progress import ProgressBar
from cifar_flax.runtime.streams import printable

_READER = 2  # to be increased if the arrays of the same files change
_NAMED = 10  # classes whose names are printed
_SHOWN = 20  # files that are named if they cannot be read
_FEW = 5  # files that may be unreadable in any folder
_BATCH = 256  # images
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}  # not of a file; may pass


def load(config: DataConfig, *splits: str) -> list[Arrays]:
    """Return the decoded `splits` of `config.folder`, memory-mapped from the cache, and log files that cannot be read.

    If there are two, for training, also log classes, sizes and copies. Raise `ConfigError` if the folder does not hold
    at least two classes of images, `UserError` if too many files cannot be read (see `require_few_unreadable`).
    """
    name, listing = printable(config.folder), find(config, splits)
    if len(splits) > 1:  # training; evaluation prints the number of images
        train, test = (len(listing.splits[split].files) for split in splits)
        classes = f"{len(listing.class_names):,} classes ({printable(shortened(listing.class_names, _NAMED))})"
        counts = f"{train:,} {splits[0]} and {test:,} {splits[1]} files ({test / (train + test):.1%})"
        processes.log(f"{name}: {classes}, {counts}")
        if listing.unused:
            processes.log(f"{name}: not used: {shortened(listing.unused, _NAMED)}")
    found = []
    for split in splits:
        arrays = decoded(config, split, listing)
        if arrays.skipped:
            lines = [f"{name}: {len(arrays.skipped):,} {split} files cannot be read", *unreadable(arrays)]
            processes.log("\n  ".join(lines))
        require_few_unreadable(config, split, arrays)
        found.append(arrays)
    if len(splits) > 1 and (copies := duplicates(*found)):
        processes.log(copies)
    return found


def decoded(config: DataConfig, split: str, listing: Listing) -> Arrays:
    """Return the decoded `split` of `listing`, from the cache if the folder has not changed.

    If `data.cache` is "none", the cache holds all but the images, which are decoded from their files when they are
    read.
    """
    source = os.path.realpath(listing.root), config.train_split, config.eval_split, config.test_fraction
    place, keeps_images = cache_dir(config) / "folders" / _checksum(source), config.cache != "none"
    target = place / f"{split}_{config.side}px{'' if keeps_images else '_files'}.{_key(listing, split)}"
    arrays = cache.load(target)
    if arrays is None:
        with cache.filling(place):
            arrays = cache.load(target) or _decode(config, split, listing, target)
    if keeps_images:
        return arrays
    images = FileImages(listing.root, arrays.files, arrays.digests, (config.side, config.side, 3))
    return dataclasses.replace(arrays, images=images)


def shortened(names: Sequence[str], most: int) -> str:
    """Return the first `most` of `names` and the number of the others."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


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
    """Return a line that counts the images of `test` whose pixels are those of an image of `train`, or ""."""
    known, first = np.unique(np.array(train.digests, np.uint64), return_index=True)
    wanted = np.array(test.digests, np.uint64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = [(i, int(first[place[i]])) for i in np.flatnonzero(known[place] == wanted).tolist()]
    pairs = [(i, j) for i, j in found if np.array_equal(test.images[i], train.images[j])]
    if not pairs:
        return ""
    example = printable(f"{test.files[pairs[0][0]]} of {train.files[pairs[0][1]]}")
    return f"{len(pairs):,} of {len(test.labels):,} images to evaluate are exact copies of training images: {example}"


def _decode(config: DataConfig, split: str, listing: Listing, target: Path) -> Arrays:
    """Decode the files that can be read into the cache, and remove the arrays of earlier contents of the folder.

    If `data.cache` is "none", decode them to find those that cannot be read, and for the checksums and the statistics.
    """
    start, name = time.perf_counter(), printable(config.folder)
    earlier = list(target.parent.glob(f"{target.name.partition('.')[0]}.*"))
    count = f"{len(listing.splits[split].files):,} {split} files, {usable_cores()} at a time"
    again = f"{name}: the {split} files have changed since they were decoded; " if earlier else f"{name}: "
    processes.log(f"{again}decoding {count}")
    about: dict[str, list[Any]] = {"files": [], "skipped": list(listing.splits[split].problems), "digests": []}
    shape = (config.side, config.side, 3)
    arrays = cache.store(
        target,
        _images(listing.root, listing.splits[split].files, shape, about),
        image_shape=shape,
        class_names=listing.class_names,
        dataset=printable(os.path.basename(os.path.realpath(listing.root))),
        about=about,
        keep_images=config.cache != "none",
    )
    for folder in earlier:
        cache.remove(folder)
    processes.log(f"{name}: decoded {len(arrays.labels):,} images in {time.perf_counter() - start:.1f} s")
    return arrays


def _images(
    root: Path, found: Sequence[tuple[str, int]], shape: tuple[int, int, int], about: dict[str, list[Any]]
) -> Iterator[tuple[UInt8[np.ndarray, "n height width c"], np.ndarray]]:
    """Yield batches of images and labels.

    Append the paths of the files to the list "files" of `about` and 64-bit hashes of their pixels to "digests", or
    paths that cannot be read, with the reason, to "skipped".
    """

    def image(path: str) -> UInt8[np.ndarray, "height width c"] | str:
        try:
            return read_image(root / path, shape)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _OF_THE_MACHINE):
                raise UserError(f"data.folder: {printable(path)}: {error}") from cause
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
                    about["skipped"].append((path, content))
                    continue
                about["files"].append(path)
                about["digests"].append(digest(content))
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
