"""Load the splits of a dataset, decoded, from the first of these sources.

1. `data.folder`, a folder of images. 2. `data.archive`. 3. A reader in `datasets.py`. 4. TFDS. In place of 4, `cifar10`
and `cifar100` have `data.source`:
- `tfds`: as for other datasets, data in the cache that TFDS has prepared, in TFDS's folder, or else what it downloads.
- `hub`: data in the cache that is from the hub, in the hub's cache folder, or else what is downloaded from the hub.
- `auto`: TFDS if its data is in the cache or its folder, or if `data.data_dir` is set. Else data in the cache that was
  found or is from the hub. Else the first intact of `places.find`, the hub's cache folder, and the hub.

2 and 4 are decoded once, into the cache. In the cache, `archive`, `files` (found by `auto`) and `hub` are in place of
the version that TFDS data has, and the key identifies the files. For `data.archive`, the files must exist and have
this key. Data that was found or is from the hub is all the same, so neither files nor the network are needed again.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from cifar_flax import packages
from cifar_flax.data import archives, cache, datasets, folder, hub, places, tfds
from cifar_flax.data.archives import Archive
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import PUBLIC, DataConfig, cache_dir, cache_folder, require_splits
from cifar_flax.data.images import resize
from cifar_flax.errors import UserError
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes


def load(config: DataConfig, split: str) -> Arrays:
    """Return the decoded `split`, memory-mapped if it comes from the cache.

    Raise `ConfigError` if there is no such dataset or split, or it does not hold images with one label each. Raise
    `UserError` if the data cannot be downloaded, prepared or read.
    """
    return _load(config, split)[0]


def load_both(config: DataConfig) -> list[Arrays]:
    """Return the train split and the evaluation split, which are of one source and have no file in common.

    Raise errors as `load` does.
    """
    return _load(config, config.train_split, config.eval_split)


def _load(config: DataConfig, *splits: str) -> list[Arrays]:
    if config.is_folder:
        return folder.load(config, *splits)
    if config.name in datasets.DATASETS and not config.archive:
        require_splits(config, datasets.DATASETS[config.name].splits)
        data_dir = local_path("data.data_dir", config.data_dir)
        return [_resized(datasets.read(config.name, split, data_dir), config) for split in splits]
    read = tfds.load if uses_tfds(config, *splits) else _load_files
    return [read(config, split) for split in splits]


def _resized(arrays: Arrays, config: DataConfig) -> Arrays:
    """Return `arrays` with images of `data.image_size`, if it is not 0."""
    if config.image_size:
        packages.load("pillow")
        resized = np.empty((len(arrays.images), *[config.image_size] * 2, arrays.images.shape[-1]), np.uint8)
        for i, image in enumerate(arrays.images):
            resized[i] = resize(image, resized.shape[1:])
        arrays = dataclasses.replace(arrays, images=resized)
    return arrays


def named_archive(config: DataConfig) -> Archive:
    """Return the data in `data.archive`. Raise `ConfigError` and `UserError` as `archives.find` does."""
    return archives.find(local_path("data.archive", config.archive))


def uses_tfds(config: DataConfig, *splits: str) -> bool:
    """Return whether the splits, of no folder and no reader in `datasets.py`, are read through TFDS."""
    if config.archive:
        return False
    if config.name not in PUBLIC or config.source == "tfds":
        return True
    return config.source == "auto" and (
        bool(config.data_dir) or all(tfds.is_available(config, split) for split in splits)
    )


def find_cached(config: DataConfig, split: str) -> Path | None:
    """Return the folder of the decoded split in the cache, if it is not TFDS's, or None if it must be decoded.

    Raise errors as `load` does if `data.archive` cannot be read.
    """
    if config.archive:
        target = _target(config, split, "archive", named_archive(config))
        return target if target.exists() else None
    for kind in ("files", "hub") if config.source == "auto" else ("hub",):
        train, test = (cache_folder(config, each, kind) for each in ("train", "test"))
        if (found := cache.newest(train)) and (other := test.with_name(test.name + found.suffix)).exists():
            return {"train": found, "test": other}.get(split)
    return None


def on_disk(config: DataConfig) -> list[tuple[str, Path]]:
    """Return "files" or "hub", and a path outside TFDS's folder where cifar10 or cifar100 may be."""
    local = [("files", path) for path in places.find(config.name)] if config.source == "auto" else []
    return [*local, *(("hub", path) for path in hub.cached(config.name))]


def _load_files(config: DataConfig, split: str) -> Arrays:
    """Return the split from the cache, from files, or from the hub."""
    require_splits(config, ("train", "test"))
    if (arrays := _load_cached(config, split)) is not None:
        return arrays
    with cache.filling(cache_dir(config) / config.name.partition(":")[0]):
        if (arrays := _load_cached(config, split)) is not None:  # another process has decoded it
            return arrays
        if config.archive:
            return _store(config, split, "archive", named_archive(config))
        for kind, path in on_disk(config):
            try:
                archive = archives.find(path)
                processes.log(f"{config.name}: found {path} (data.source=tfds or hub: not used)")
                return _store(config, split, kind, archive)
            except cache.CacheError:
                raise
            except UserError as error:
                processes.log(f"{config.name}: not used: {error}")
        return _store(config, split, "hub", archives.find(hub.download(config)))


def _load_cached(config: DataConfig, split: str) -> Arrays | None:
    cached = find_cached(config, split)
    return cache.load(cached) if cached else None


def _target(config: DataConfig, split: str, kind: str, archive: Archive) -> Path:
    """Return the folder of the decoded split in the cache."""
    folder = cache_folder(config, split, kind)
    return folder.with_name(f"{folder.name}.{cache.key(map(os.path.realpath, archive.files), archive.format)}")


def _store(config: DataConfig, split: str, kind: str, archive: Archive) -> Arrays:
    """Decode both splits into the cache, so that they are of one source, and return `split`."""
    if line := archive.official():
        processes.log(line)
    stored = {}
    for each in (config.train_split, config.eval_split):
        target, data = _target(config, each, kind, archive), archive.read(each, config.name, config.image_size)
        stored[each] = cache.load(target) or cache.store(
            target,
            data.batches,
            image_shape=data.image_shape,
            class_names=data.class_names,
            dataset=config.name.partition(":")[0],
        )
    return stored[split]
