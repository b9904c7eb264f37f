"""Find the image files of a folder of class folders, and divide them into splits."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_flax.data.config import DataConfig
from cifar_flax.data.search import entries_of, files_below
from cifar_flax.errors import ConfigError, reason, require
from cifar_flax.paths import local_path

_MAX_CLASSES = 2000  # the confusion matrix of more classes would take hundreds of megabytes in eval.json

Problem = tuple[str, str]  # path of a file or folder that cannot be read, and the reason


@dataclass(frozen=True, slots=True)
class Split:
    """The files of a split, with paths relative to `data.folder`."""

    files: list[tuple[str, int]]  # path and class, sorted by class
    problems: list[Problem]  # folders that cannot be searched


@dataclass(frozen=True, slots=True)
class Listing:
    """The image files of a folder."""

    root: Path
    class_names: tuple[str, ...]  # in natural order: 2 before 10
    splits: dict[str, Split]  # of training and of evaluation, in this order
    loose: int  # number of files that are in no class folder


@dataclass(slots=True)
class _Class:
    files: list[str]
    problems: list[Problem]


def find(config: DataConfig) -> Listing:
    """Return the image files of `config.folder`.

    Raise `ConfigError` if it does not hold a folder per class, or a folder per split that holds the same classes.
    """
    root, value, names = (
        local_path("data.folder", config.folder),
        config.folder,
        (config.train_split, config.eval_split),
    )
    require(os.path.isdir(root), "data.folder", value, "must be a folder that holds a folder of images per class")
    folders, _ = _entries(root)
    if set(names) & set(folders):
        for field, name in zip(("train_split", "eval_split"), names, strict=True):
            allowed = f"must be a folder in {value}: {', '.join(folders[:10])}"
            require(name in folders, f"data.{field}", name, allowed)
        (train, loose), (test, more) = (_classes(root, root / name, f"{value}/{name}") for name in names)
        loose += more
        for name, lacking in zip(names, (test.keys() - train.keys(), train.keys() - test.keys()), strict=True):
            allowed = f"{name} lacks classes of the other split: {', '.join(sorted(lacking)[:5])}"
            require(not lacking, "data.folder", value, allowed)
    else:
        for field, name, wanted in zip(("train_split", "eval_split"), names, ("train", "test"), strict=True):
            require(name == wanted, f"data.{field}", name, f"must be {wanted}, as {value} has no folder of this name")
        classes, loose = _classes(root, root, value)
        for name, one in classes.items():
            reasons = "".join(f" ({path}: {why})" for path, why in one.problems[:1])
            allowed = f"the class {name!r} has {len(one.files)} images; at least 2 are needed{reasons}"
            require(len(one.files) > 1, "data.folder", value, allowed)
        train, test = (_divide(classes, config.test_fraction, is_test) for is_test in (False, True))
    class_names = tuple(sorted(train, key=_natural))
    splits = {name: _split(classes, class_names) for name, classes in zip(names, (train, test), strict=True)}
    return Listing(root, class_names, splits, loose)


def _entries(folder: Path) -> tuple[list[str], int]:
    """Return the names of the folders in `folder` in natural order, and the number of files."""
    try:
        entries = entries_of(folder)
    except OSError as error:
        raise ConfigError(f"data.folder: {folder} cannot be searched: {reason(error)}") from error
    folders = sorted((entry.name for entry in entries if os.path.isdir(entry)), key=_natural)
    return folders, len(entries) - len(folders)


def _classes(root: Path, folder: Path, value: str) -> tuple[dict[str, _Class], int]:
    """Return name -> class of the folders in `folder` that hold files, and the number of files in none of them."""
    names, loose = _entries(folder)
    classes, above = {}, (os.path.realpath(folder),)
    for name in names:
        require(name.isprintable(), "data.folder", value, f"the name of its class folder {name!r} must be printable")
        one = _Class([], [])
        for path, error in files_below(folder / name, above):
            relative = path.relative_to(root).as_posix()
            if error:
                one.problems.append((relative, error))
            else:
                one.files.append(relative)
        if one.files or one.problems:
            classes[name] = one
    rest = f" and {loose:,} files outside of them" if loose else ""
    fits, allowed = len(classes) > 1, f"must hold at least two class folders with images; it holds {len(classes)}{rest}"
    require(fits, "data.folder", value, allowed)
    fits, allowed = len(classes) <= _MAX_CLASSES, f"must hold at most {_MAX_CLASSES:,} classes, not {len(classes):,}"
    require(fits, "data.folder", value, allowed)
    return classes, loose


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


def _hash(path: str) -> float:
    """Return a number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8]) / 2**64


def _natural(name: str) -> tuple[Any, ...]:
    """Return a sort key that compares numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name.casefold())  # every second part is a number
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name
