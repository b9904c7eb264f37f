"""Read datasets that TFDS has prepared, or that it downloads and prepares, through the cache."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_flax import packages
from cifar_flax.data import cache, datasets
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import PUBLIC, DataConfig, alternatives, cache_dir, cache_folder, require_splits
from cifar_flax.errors import ConfigError, UserError, one_line, require
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes
from cifar_flax.runtime.environment import usable_cores

_DECODE_BATCH = 1000  # images


def load(config: DataConfig, split: str) -> Arrays:
    """Return the split from the cache if possible, so that later starts neither import TFDS nor decode."""
    folder, line = find_cached(config, split)
    if line:
        processes.log(line)
    cached = cache.load(folder) if folder else None
    if cached is not None:
        return cached
    require_installed(config, split)
    name = config.name.partition(":")[0]
    with cache.filling(cache_dir(config) / name):
        builder = builder_of(config)
        info = builder.info
        image_key, label_key, image_shape = _features(config, info)
        _prepare(config, builder)
        require_splits(config, info.splits)
        _require_files(info, split)
        folder = cache_folder(config, split, str(info.version))
        folder = folder.with_name(f"{folder.name}.{_key(_data_dir(config), name)}")
        return cache.load(folder) or cache.store(  # another process may have decoded it
            folder,
            _decode(builder, split, image_key, label_key, config.image_size),
            num_examples=info.splits[split].num_examples,
            image_shape=image_shape,
            class_names=tuple(info.features[label_key].names),
            dataset=info.full_name,
        )


def find_cached(config: DataConfig, split: str) -> tuple[Path | None, str]:
    """Return the folder of the decoded split in the cache (None: decode it), and a line to log ("": none).

    It must have been decoded from the files in TFDS's folder as they are now. If the dataset is not there and
    `data.data_dir` is not set, the newest cached data is used. Raise `ConfigError` if `data.data_dir` does not exist.
    """
    (name, _, version), data_dir = config.name.partition(":"), _data_dir(config)
    allowed = "must be an existing folder, or empty for TFDS_DATA_DIR, ~/tensorflow_datasets or data in the cache"
    require(not config.data_dir or os.path.isdir(data_dir), "data.data_dir", config.data_dir, allowed)
    wanted, key = cache_folder(config, split, version or "*"), _key(data_dir, name)
    cached = cache.newest(wanted, key)
    if key:
        line = f"{name}: the cached {split} split is of other files than those in {data_dir}; decoding these"
        return cached, line if cached is None and cache.newest(wanted) else ""
    if config.data_dir or cached is None:
        return None, ""
    return cached, f"{config.name} is not in {data_dir}; using data from elsewhere in {cached}" if cached.suffix else ""


def is_available(config: DataConfig, split: str) -> bool:
    """Return whether the split is in the cache, or prepared and TFDS is installed, so that nothing is downloaded."""
    prepared = any((_data_dir(config) / config.name.partition(":")[0]).glob("[0-9]*/dataset_info.json"))
    installed = not any(map(packages.fault, ("tensorflow-datasets", "tensorflow")))
    if prepared and installed:
        return True
    folder, _ = find_cached(config, split)
    with contextlib.suppress(ValueError):  # damaged
        return folder is not None and bool(cache.verify(folder, sample=True))
    return False


def _key(data_dir: Path, name: str) -> str:
    """Return the key of the dataset `name` that is prepared in the folder `data_dir`, or "" if it is not."""
    folders = os.walk(os.path.join(os.path.realpath(data_dir), name), followlinks=True)
    return cache.key(os.path.join(folder, file) for folder, _, names in folders for file in names)


def preparation(config: DataConfig, splits: Sequence[str]) -> tuple[Path, dict[str, int], int]:
    """Return what `load` must do for `splits` that are not in the cache: TFDS's folder, downloads, size of the arrays.

    The downloads are a dict from URL to bytes, and the size of the arrays in bytes is 0, unless TFDS has prepared the
    data. Write nothing. Raise `ConfigError` and `UserError` as `load` does.
    """
    require_installed(config, splits[0])
    builder = builder_of(config)
    folder, info = Path(builder.data_dir), builder.info
    _, _, image_shape = _features(config, info)
    if not folder.exists():  # as TFDS decides; its is_prepared fails if the name of a folder is a glob pattern
        return folder, {url: int(file.size) for url, file in (builder.url_infos or {}).items()}, 0
    require_splits(config, info.splits)
    for split in splits:
        _require_files(info, split)
    return folder, {}, sum(info.splits[split].num_examples for split in splits) * math.prod(image_shape)


def require_installed(config: DataConfig, split: str) -> None:
    """Raise `UserError` if a package is missing that is needed to prepare a split that is not in the cache."""
    missing = f"data.name={config.name!r}: its {split} split is not in the cache {cache_dir(config)}"
    packages.require(["tensorflow-datasets", "tensorflow"], f"{missing} (name one that has it: data.cache_dir)")


def _tfds() -> Any:
    from cifar_flax.data import tensorflow  # noqa: F401  # before TFDS, which would import all of TensorFlow

    return packages.load("tensorflow-datasets")


def _data_dir(config: DataConfig) -> Path:
    """Return the folder of all datasets that TFDS prepares. TFDS itself reads the variable only on import."""
    if config.data_dir:
        return local_path("data.data_dir", config.data_dir)
    return local_path("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _require_files(info: Any, split: str) -> None:
    """Raise `UserError` if a file of the split is missing, as in an incomplete copy."""
    for path in info.splits[split].filepaths:
        if not os.path.exists(path):
            raise UserError(f"{path} is missing; complete its folder, or remove it to let TFDS prepare it again")


def builder_of(config: DataConfig) -> Any:
    tfds = _tfds()
    try:
        return tfds.builder(config.name, data_dir=_data_dir(config))
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        allowed = f"must be {', '.join(datasets.DATASETS)} or a TFDS image-classification set such as cifar10"
        raise ConfigError(f"data.name={config.name!r}: {allowed} ({one_line(error)})") from error
    except Exception as error:  # TFDS may raise anything for damaged files
        raise UserError(f"the data that TFDS prepared for {config.name} cannot be read ({one_line(error)})") from error


def _features(config: DataConfig, info: Any) -> tuple[str, str, tuple[int, int, int]]:
    """Return the keys of the image and of the label in TFDS's examples, and the shape of the decoded images."""
    features, keys = info.features, info.supervised_keys
    fits = (
        keys is not None
        and [type(key) for key in keys] == [str, str]
        and isinstance(features[keys[0]], _tfds().features.Image)
        and features[keys[0]].dtype == np.uint8
        and isinstance(features[keys[1]], _tfds().features.ClassLabel)
    )
    require(fits, "data.name", config.name, "must be an image-classification set: one uint8 image and one class label")
    image_key, label_key = keys
    height, width, channels = features[image_key].shape
    if config.image_size:
        height = width = config.image_size
    sizes = f"must be set, as the images of {config.name} differ in size"
    require(None not in (height, width), "data.image_size", config.image_size, sizes)
    require(channels in (1, 3), "data.name", config.name, f"its images must have 1 or 3 channels, not {channels}")
    return image_key, label_key, (height, width, channels)


def _prepare(config: DataConfig, builder: Any) -> None:
    """Download and prepare the dataset if TFDS has not done so; TFDS shows a progress bar."""
    # Silence urllib3's warnings about retries; the exception reports the failure.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if config.name in PUBLIC and not Path(builder.data_dir).exists():
        processes.log(f"{config.name}: TFDS downloads it; alternatives: {alternatives(config)}")
    try:
        builder.download_and_prepare()
    except Exception as error:  # downloads, disks and the parsers of datasets may raise anything
        raise UserError(
            f"{config.name} is not prepared in {builder.data_dir} and preparing it failed ({one_line(error)}). "
            f"Alternatives: {alternatives(config)}"
        ) from error


def _decode(
    builder: Any, split: str, image_key: str, label_key: str, image_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of images and labels in the order in which TFDS stores them."""
    from cifar_flax.data.tensorflow import dataset_options, tf

    # Read one file after another: with interleaving, the order would depend on TFDS's defaults. Its cache in memory
    # would only take space, and log a warning if the disk is full.
    read_config = _tfds().ReadConfig(interleave_cycle_length=1, try_autocache=False)
    dataset = builder.as_dataset(split=split, read_config=read_config)

    def image_and_label(example: Any) -> tuple[Any, Any]:
        image = example[image_key]
        if image_size:
            image = tf.image.resize(image, (image_size, image_size), antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return image, example[label_key]

    dataset = dataset.map(image_and_label, num_parallel_calls=usable_cores()).batch(_DECODE_BATCH)
    try:
        yield from dataset.with_options(dataset_options()).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise UserError(f"the data in {builder.data_dir} cannot be read ({one_line(error)})") from error
