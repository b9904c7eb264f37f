"""Find the image files of a folder of class folders, and divide them into splits."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_flax.data.config import DataConfig
from cifar_flax.data.search import entries_of, files_below
from cifar_flax.errors import ConfigError, reason, require
from cifar_flax.paths import local_path
from cifar_flax.runtime.streams import printable

_MAX_CLASSES = 2000  # the confusion matrix of more classes would take tens of megabytes in eval.json
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}

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
    splits: dict[str, Split]  # split name -> files
    unused: tuple[str, ...]  # what belongs to no class, such as "the folder notes" or "3 files"


@dataclass(slots=True)
class _Class:
    files: list[str]
    problems: list[Problem]


def find(config: DataConfig, names: Sequence[str]) -> Listing:
    """Return the files of the splits `names` in `config.folder`.

    Raise `ConfigError` if it does not hold a folder per class, or a folder per split that holds the same classes.
    """
    value, splits = printable(config.folder), (config.train_split, config.eval_split)
    require(value != "", "data.folder", value, "must be the path of a folder: --config.data.folder=DIR")
    root = local_path("data.folder", config.folder)
    require(os.path.lexists(root), "data.folder", value, "no such folder")
    require(os.path.isdir(root), "data.folder", value, "must be a folder, not a file; unpack an archive first")
    folders, loose = _entries(root)
    parts: dict[str, dict[str, _Class]] = {}
    if set(names) <= set(folders):
        unused = [f"the folder {printable(name)}" for name in folders if name not in splits]
        unused += [_files(loose)] * (loose > 0)
        for name in names:
            parts[name], more = _classes(root, root / name, f"{value}/{name}")
            unused += more
        for name, classes in parts.items():
            lacking = sorted({each for other in parts.values() for each in other} - classes.keys())
            allowed = f"{name} lacks classes of the other split: {', '.join(lacking[:5])}"
            require(not lacking, "data.folder", value, allowed)
    else:
        like_splits = [name for name in folders if name.casefold() in _SPLIT_NAMES]
        both = f"needs the folders {' and '.join(splits)}, which data.train_split and data.eval_split name"
        allowed = f"{both}; it holds {', '.join(map(printable, like_splits))}, which must not be names of classes"
        require(not like_splits, "data.folder", value, allowed)
        for field, name, wanted in zip(("train_split", "eval_split"), splits, ("train", "test"), strict=True):
            allowed = f"must be {wanted}, since {value} has no folders of splits, and is divided into train and test"
            require(name == wanted, f"data.{field}", name, allowed)
        classes, unused = _classes(root, root, value)
        for name, one in classes.items():
            reasons = "".join(f" ({printable(path)}: {why})" for path, why in one.problems[:1])
            allowed = f"each class needs at least 2 images, but {name!r} has {len(one.files)}{reasons}"
            require(len(one.files) > 1, "data.folder", value, allowed)
        parts = dict(zip(splits, _divide(classes, config.test_fraction), strict=True))
    class_names = tuple(sorted(next(iter(parts.values())), key=_natural))
    return Listing(root, class_names, {name: _split(parts[name], class_names) for name in parts}, tuple(unused))


def _entries(folder: Path) -> tuple[list[str], int]:
    """Return the names of the folders in `folder` in natural order, and the number of files."""
    try:
        entries = entries_of(folder)
    except OSError as error:
        raise ConfigError(f"data.folder: {printable(str(folder))} cannot be searched: {reason(error)}") from error
    folders = sorted((entry.name for entry in entries if os.path.isdir(entry)), key=_natural)
    return folders, len(entries) - len(folders)


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _classes(root: Path, folder: Path, value: str) -> tuple[dict[str, _Class], list[str]]:
    """Return name -> class of the folders in `folder` that hold files, and what is unused; paths are those in `root`.

    Names are normalized to NFC, since file systems differ in the Unicode form of the same name.
    """
    names, loose = _entries(folder)
    classes: dict[str, _Class] = {}
    unused = [f"{_files(loose)} in {value}"] * (loose > 0)
    for name in names:
        one, above = _Class([], []), (os.path.realpath(folder),)
        for path, error in files_below(folder / name, above, set()):
            relative = path.relative_to(root).as_posix()
            if error:
                one.problems.append((relative, error))
            else:
                one.files.append(relative)
        if not one.files and not one.problems:
            unused.append(f"the folder {printable(name)}, which is empty")
            continue
        require(name.isprintable(), "data.folder", value, f"the name of its class folder {name!r} must be printable")
        known = classes.setdefault(unicodedata.normalize("NFC", name), _Class([], []))
        known.files += one.files
        known.problems += one.problems
    hint = f"it holds {len(classes)}"
    if not classes and loose:
        hint = f"it holds {_files(loose)}, but no folders; sort the images into one folder per class"
    elif len(classes) == 1 and len(_entries(folder / (only := next(iter(classes))))[0]) > 1:
        hint = f"did you mean {value}/{only}?"
    allowed = f"must hold at least two folders of images, one per class; {hint}"
    require(len(classes) > 1, "data.folder", value, allowed)
    fits, allowed = len(classes) <= _MAX_CLASSES, f"must hold at most {_MAX_CLASSES:,} classes, not {len(classes):,}"
    require(fits, "data.folder", value, allowed)
    return classes, unused


def _divide(classes: dict[str, _Class], fraction: float) -> tuple[dict[str, _Class], dict[str, _Class]]:
    """Return the classes of the train and of the test split: the files whose hashed paths are below `fraction`.

    A split without a file of a class gets its file with the smallest hash.
    """
    divided: tuple[dict[str, _Class], dict[str, _Class]] = {}, {}
    for name, one in classes.items():
        places = {path: _hash(path) for path in one.files}
        parts = [[path for path in one.files if (places[path] < fraction) == is_test] for is_test in (False, True)]
        for part, other in (parts, parts[::-1]):
            if not part:
                part.append(min(other, key=places.__getitem__))
                other.remove(part[0])
        for split, part, problems in zip(divided, parts, (one.problems, []), strict=True):
            split[name] = _Class(part, problems)
    return divided


def _split(classes: dict[str, _Class], class_names: Sequence[str]) -> Split:
    found = [(path, label) for label, name in enumerate(class_names) for path in classes[name].files]
    return Split(found, [problem for name in class_names for problem in classes[name].problems])


def _hash(path: str) -> float:
    """Return a number in [0, 1) that depends on the path alone, not on its Unicode form."""
    return int.from_bytes(hashlib.sha256(os.fsencode(unicodedata.normalize("NFC", path))).digest()[:8]) / 2**64


def _natural(name: str) -> tuple[Any, ...]:
    """Return a sort key that compares numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name.casefold())  # every second part is a number
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name
