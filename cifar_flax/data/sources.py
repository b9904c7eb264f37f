"""Load the splits of a dataset, decoded, from the first of these sources.

1. `data.folder`, a folder of images. 2. `data.archive`. 3. A reader in `datasets.py`. 4. TFDS. In place of 4, `cifar10`
and `cifar100` have `data.source`:
- `tfds`: as for other datasets, data in the cache that TFDS has prepared, in TFDS's folder, or else what it downloads.
- `hub`: data in the cache that is from the hub, in the hub's cache folder, or else what is downloaded from the hub.
- `auto`: TFDS if both splits are in the cache or its folder, or if `data.data_dir` is set. Else the first intact one of
  `places.find`, the hub's cache folder, data in the cache whose files have gone, and the hub.

2 and 4 are decoded once, into the cache. In the cache, `archive`, `files` (found by `auto`) and `hub` are in place of
the version that TFDS data has, and the key identifies the files. Both splits of a run are of one source.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cifar_flax import packages
from cifar_flax.data import archives, cache, datasets, folder, hub, places, tfds
from cifar_flax.data.archives import Archive, cifar
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import PUBLIC, DataConfig, cache_dir, cache_folder, require_splits
from cifar_flax.data.images import resize
from cifar_flax.errors import UserError
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes
from cifar_flax.runtime.streams import printable


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
    if uses_tfds(config, *splits):
        return [tfds.load(config, split) for split in splits]
    return _load_files(config, *splits)


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
    if config.archive or config.source == "hub":
        return False
    if config.name not in PUBLIC or config.source == "tfds" or config.data_dir:
        return True
    return all(tfds.is_available(config, split) for split in splits)


def find_cached(config: DataConfig, split: str) -> Path | None:
    """Return the folder of the decoded split in the cache, if it is not TFDS's, or None if it must be decoded.

    Raise errors as `load` does if `data.archive` cannot be read.
    """
    if config.archive:
        target = _targets(config, "archive", named_archive(config))[split]
        return target if target.exists() else None
    for kind, path in on_disk(config):
        with contextlib.suppress(UserError):
            targets = _targets(config, kind, archives.find(path))
            if all(target.exists() for target in targets.values()):
                return targets[split]
    return next((found for each, found in _newest(config) if each == split), None)


def on_disk(config: DataConfig) -> Iterator[tuple[str, Path]]:
    """Yield "files" or "hub", and a path outside TFDS's folder where cifar10 or cifar100 may be."""
    if config.source == "auto":
        yield from (("files", path) for path in places.find(config.name))
    yield from (("hub", path) for path in hub.cached(config.name))


def _load_files(config: DataConfig, *splits: str) -> list[Arrays]:
    """Return the splits from `data.archive`, from files, from the cache, or from the hub."""
    require_splits(config, ("train", "test"))
    if config.archive:
        return _decoded(config, splits, "archive", named_archive(config))
    for kind, path in on_disk(config):
        try:
            return _decoded(config, splits, kind, archives.find(path))
        except cache.CacheError:
            raise
        except UserError as error:
            processes.log(f"{config.name}: not used: {printable(str(error))}")
    newest = dict(_newest(config))
    loaded = [arrays for split in splits if split in newest and (arrays := cache.load(newest[split]))]
    if len(loaded) == len(splits):
        processes.log(f"{config.name}: its files have gone; using the decoded data in {newest[splits[0]].parent}")
        return loaded
    packages.require(["huggingface-hub", "pyarrow"], f"{config.name} is not on this machine; its download")
    return _decoded(config, splits, "hub", archives.find(hub.download(config)))


def _newest(config: DataConfig) -> Iterator[tuple[str, Path]]:
    """Yield both splits, and their folders in the cache, of the source that was decoded last; nothing if none was."""
    for kind in ("files", "hub") if config.source == "auto" else ("hub",):
        train, test = (cache_folder(config, each, kind) for each in ("train", "test"))
        if (found := cache.newest(train)) and (other := test.with_name(test.name + found.suffix)).exists():
            yield from (("train", found), ("test", other))
            return


def _targets(config: DataConfig, kind: str, archive: Archive) -> dict[str, Path]:
    """Return the folders of the decoded splits in the cache."""
    key = cache.key(map(os.path.realpath, archive.files), archive.format)
    folders = {split: cache_folder(config, split, kind) for split in (config.train_split, config.eval_split)}
    return {split: folder.with_name(f"{folder.name}.{key}") for split, folder in folders.items()}


def _decoded(config: DataConfig, splits: Sequence[str], kind: str, archive: Archive) -> list[Arrays]:
    """Return the splits from the cache; decode both into it if one of them is not there."""
    targets = _targets(config, kind, archive)
    if all(target.exists() for target in targets.values()):  # otherwise, the other split may be damaged
        loaded = [arrays for split in splits if (arrays := cache.load(targets[split])) is not None]
        if len(loaded) == len(splits):
            return loaded
    with cache.filling(cache_dir(config) / config.name.partition(":")[0]):
        if kind != "archive":
            processes.log(f"{config.name}: reading {printable(str(archive.path))}")
        if line := archive.official():
            processes.log(printable(line))
        if kind == "hub":
            hub.verify(archive.files)
        stored = {}
        for each, target in targets.items():
            data = archive.read(each, config.name, config.image_size)
            stored[each] = cache.load(target) or cache.store(
                target,
                data.batches,
                image_shape=data.image_shape,
                class_names=data.class_names,
                dataset=config.name.partition(":")[0],
                num_examples=None if kind == "archive" else cifar.IMAGES[each],
            )
        return [stored[split] for split in splits]
