"""Folders of image files as datasets.

A folder holds `train/<class>/...` and `test/<class>/...`, or only `<class>/...`. In the second case, a hash of the path
of each file decides its split, so that additional files do not move others.
"""

import contextlib
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cifar_flax import files
from cifar_flax.data import cache
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import DataConfig, cache_dir
from cifar_flax.data.images import read_image
from cifar_flax.data.search import entries_of, files_below
from cifar_flax.errors import ConfigError, UserError, reason, require
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes
from cifar_flax.runtime.environment import usable_cores
from cifar_flax.runtime.progress import ProgressBar
from cifar_flax.runtime.streams import printable

_READER = 1  # to be increased if the arrays of the same files change
_MAX_CLASSES = 2000  # the confusion matrix of more classes would take hundreds of megabytes in eval.json
_SHOWN = 20  # files that are named if they cannot be read
_FEW = 5  # files that may be unreadable in any folder
_BATCH = 256  # images

Problem = tuple[str, str]  # path of a file or folder that cannot be read, and the reason


@dataclass(frozen=True, slots=True)
class Split:
    """The files of a split, with paths relative to `data.folder`."""

    files: list[tuple[str, int]]  # path and class, sorted by class
    problems: list[Problem]  # folders that cannot be searched


@dataclass(frozen=True, slots=True)
class _Class:
    files: list[str]
    problems: list[Problem]


def load(config: DataConfig, split: str) -> Arrays:
    """Return the decoded `split` of `config.folder`, memory-mapped from the cache, and log which files are missing.

    Raise `ConfigError` if it is not a folder with at least two classes of images, `UserError` if more files than
    `max_bad_fraction` cannot be read.
    """
    root, class_names, splits = find(config)
    if split == config.train_split:
        train, test = (len(splits[name].files) for name in (split, config.eval_split))
        counts = f"{train:,} {split} and {test:,} {config.eval_split} files ({test / (train + test):.1%})"
        processes.log(f"{printable(config.folder)}: {len(class_names)} classes, {counts}")
    found = splits[split]
    place = cache_dir(config) / "folders" / _checksum(os.path.realpath(root))
    target = place / f"{split}_{config.side}px.{_key(root, class_names, found)}"
    arrays = cache.load(target)
    if arrays is None:
        with cache.filling(place):
            arrays = cache.load(target) or _decode(config, root, class_names, split, found, target)
    _require_few(config, split, arrays)
    if missing := set(range(len(class_names))) - set(arrays.labels.tolist()):
        name = class_names[min(missing)]
        raise UserError(f"data.folder={config.folder!r}: no image of the class {name!r} in {split} can be read")
    return arrays


def find(config: DataConfig) -> tuple[Path, tuple[str, ...], dict[str, Split]]:
    """Return `config.folder` as a path, the class names in natural order (2 before 10), and the two splits.

    Raise `ConfigError` if it does not hold a folder per class, or a folder per split that holds the same classes.
    """
    root, value, names = (
        local_path("data.folder", config.folder),
        config.folder,
        (config.train_split, config.eval_split),
    )
    require(os.path.isdir(root), "data.folder", value, "must be a folder that holds a folder of images per class")
    subfolders = _subfolders(root)
    if not set(names) & set(subfolders):
        for field, name, wanted in zip(("train_split", "eval_split"), names, ("train", "test"), strict=True):
            require(name == wanted, f"data.{field}", name, f"must be {wanted}, as {value} has no folder of this name")
        classes = _classes(root, root, value)
        for name, one in classes.items():
            many = f"the class {name!r} has {len(one.files)} images; at least 2 are needed"
            require(len(one.files) > 1, "data.folder", value, f"{many}{_first(one.problems)}")
        parts = [_divide(classes, config.test_fraction, is_test) for is_test in (False, True)]
    else:
        for field, name in zip(("train_split", "eval_split"), names, strict=True):
            allowed = f"must be a folder in {value}: {', '.join(subfolders[:10])}"
            require(name in subfolders, f"data.{field}", name, allowed)
        parts = [_classes(root, root / name, f"{value}/{name}") for name in names]
        for split, lacking in zip(
            names, (parts[1].keys() - parts[0].keys(), parts[0].keys() - parts[1].keys()), strict=True
        ):
            allowed = f"{split} lacks classes of the other split: {', '.join(sorted(lacking)[:5])}"
            require(not lacking, "data.folder", value, allowed)
    class_names = tuple(sorted(parts[0], key=_natural))
    return root, class_names, {name: _split(part, class_names) for name, part in zip(names, parts, strict=True)}


def log_duplicates(train: Arrays, test: Arrays, test_name: str) -> None:
    """Log how many images of `test` are exact copies of images of `train`, and the first of them."""
    places = {_digest(image): i for i, image in enumerate(train.images)}
    pairs = [(i, places[digest]) for i, digest in enumerate(map(_digest, test.images)) if digest in places]
    if pairs:
        example = f"such as {test.files[pairs[0][0]]} and {train.files[pairs[0][1]]}"
        count = f"{len(pairs):,} of {len(test.labels):,} {test_name} images are exact copies of training images"
        processes.log(f"{count}, {printable(example)}")


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted((entry.name for entry in entries_of(folder) if entry.is_dir()), key=_natural)
    except OSError as error:
        raise ConfigError(f"data.folder: {folder} cannot be searched: {reason(error)}") from error


def _classes(root: Path, folder: Path, value: str) -> dict[str, _Class]:
    """Return name -> class of the subfolders of `folder` that hold files, with paths relative to `root`."""
    classes = {}
    for name in _subfolders(folder):
        require(name.isprintable(), "data.folder", value, f"the name of its class folder {name!r} must be printable")
        one = _Class([], [])
        for path, error in files_below(folder / name, (os.path.realpath(folder),)):
            relative = path.relative_to(root).as_posix()
            if error:
                one.problems.append((relative, error))
            else:
                one.files.append(relative)
        if one.files or one.problems:
            classes[name] = one
    loose = sum(not entry.is_dir() for entry in entries_of(folder))
    allowed = f"must hold at least two folders of images, one per class; it holds {len(classes)}"
    require(
        len(classes) > 1, "data.folder", value, f"{allowed}{f', and {loose} files without a class' if loose else ''}"
    )
    require(
        len(classes) <= _MAX_CLASSES, "data.folder", value, f"holds {len(classes):,} classes; at most {_MAX_CLASSES:,}"
    )
    if loose:
        processes.log(f"{printable(value)}: {loose} files in no class folder are ignored")
    return classes


def _divide(classes: dict[str, _Class], fraction: float, is_test: bool) -> dict[str, _Class]:
    """Return the part of each class whose hashed paths are below `fraction`, or the other part.

    A part that would be empty gets the file with the smallest hash.
    """
    divided = {}
    for name, one in classes.items():
        places = {path: _hash(path) for path in one.files}
        parts = [[path for path in one.files if (places[path] < fraction) == below] for below in (False, True)]
        for part, other in (parts, parts[::-1]):
            if not part:
                part.append(min(other, key=places.__getitem__))
                other.remove(part[0])
        divided[name] = _Class(parts[is_test], [] if is_test else one.problems)
    return divided


def _split(classes: dict[str, _Class], class_names: Sequence[str]) -> Split:
    found = [(path, label) for label, name in enumerate(class_names) for path in classes[name].files]
    return Split(found, [problem for name in class_names for problem in classes[name].problems])


def _decode(
    config: DataConfig, root: Path, class_names: tuple[str, ...], split: str, found: Split, target: Path
) -> Arrays:
    """Decode the files that can be read into the cache, and remove the arrays of earlier contents of the folder."""
    start, name = time.perf_counter(), printable(config.folder)
    earlier = list(target.parent.glob(f"{target.name.partition('.')[0]}.*"))
    if earlier:
        processes.log(f"{name}: the {split} files have changed since they were decoded; decoding them again")
    about: dict[str, list[Any]] = {"files": [], "skipped": list(found.problems)}
    shape = (config.side, config.side, 3)
    arrays = cache.store(
        target,
        _images(root, found, shape, about["files"], about["skipped"]),
        image_shape=shape,
        class_names=class_names,
        dataset=printable(os.path.basename(os.path.realpath(root))),
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
    root: Path, found: Split, shape: tuple[int, int, int], read: list[str], skipped: list[Problem]
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
        contextlib.closing(ProgressBar(len(found.files), "image")) as progress,
    ):
        for start in range(0, len(found.files), _BATCH):
            batch = found.files[start : start + _BATCH]
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


def _require_few(config: DataConfig, split: str, arrays: Arrays) -> None:
    """Log the files that are skipped. Raise `UserError` if they are too many."""
    bad, total = len(arrays.skipped), len(arrays.skipped) + len(arrays.labels)
    if not bad:
        return
    lines = [f"  {printable(path)}: {why}" for path, why in arrays.skipped[:_SHOWN]]
    rest = [f"  and {bad - _SHOWN:,} more"] if bad > _SHOWN else []
    count = f"{bad:,} of {total:,} {split} files cannot be read"
    processes.log("\n".join([f"{printable(config.folder)}: {count}", *lines, *rest]))
    if bad > _FEW and bad > config.max_bad_fraction * total:
        allowed = f"{count}, such as {printable(arrays.skipped[0][0])}; remove them, or raise the fraction"
        raise UserError(f"data.max_bad_fraction={config.max_bad_fraction}: {allowed}")


def _key(root: Path, class_names: Sequence[str], found: Split) -> str:
    """Return the key of the decoded split: a checksum of names, sizes and modification times of the files."""

    def state(path: str) -> tuple[int, int, bool]:
        try:
            status = os.stat(root / path)
        except OSError:  # such as a link to nothing
            return 0, 0, False
        return status.st_size, status.st_mtime_ns, os.access(root / path, os.R_OK)

    return _checksum([_READER, class_names, [(*one, *state(one[0])) for one in found.files], found.problems])


def _checksum(content: Any) -> str:
    return files.json_checksum(content)[:16]


def _hash(path: str) -> float:
    """Return a number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8]) / 2**64


def _digest(image: UInt8[np.ndarray, "height width c"]) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _natural(name: str) -> tuple[Any, ...]:
    """Return a sort key that compares numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name.casefold())  # every second part is a number
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name


def _first(problems: Sequence[Problem]) -> str:
    return f" ({problems[0][0]} {problems[0][1]})" if problems else ""
