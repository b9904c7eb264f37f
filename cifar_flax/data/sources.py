"""Where images come from: a data set's name and split -> `Arrays`."""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_flax import files, packages
from cifar_flax.data import cache
from cifar_flax.data.archive import read_archive
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import ConfigError, UserError, one_line, require

PIPELINES = ("streaming", "resident")
_DECODE_BATCH = 1000  # images
# Names become folders of the cache: nothing in them may lead out of it.
_NAME = r"\w[\w-]*(/\w[\w.+-]*)?(:\d+(\.\d+)*)?"
_SPLIT = r"\w[\w-]*"


@dataclass(slots=True, kw_only=True)
class DataConfig:
    name: str = "cifar10"  # "digits", or a TFDS image-classification set: "cifar100", "svhn_cropped", "mnist:3.0.1" ...
    data_dir: str = ""  # where TFDS keeps prepared data; "" is TFDS_DATA_DIR, else ~/tensorflow_datasets
    archive: str = ""  # cifar-10-binary.tar.gz, or the folder it unpacks to, read instead of TFDS
    cache_dir: str = ""  # decoded arrays, mapped while training; "" is cifar_flax in the user's cache folder
    image_size: int = 0  # pixels; images are resized to this square; 0 keeps their size
    eval_split: str = "test"  # the split that evaluation counts
    validation_fraction: float = 0.0  # share of the train split held out to judge checkpoints on
    pipeline: str = "streaming"  # streaming (tf.data) | resident (the whole split on the accelerator)
    drop_last: bool = False  # end each epoch with its last whole batch; else batches run on into the next epoch

    def validate(self) -> None:
        fraction = self.validation_fraction
        require(self.pipeline in PIPELINES, "data.pipeline", self.pipeline, f"must be one of {', '.join(PIPELINES)}")
        require(0 <= fraction < 1, "data.validation_fraction", fraction, "must be in [0, 1)")
        require(
            self.image_size == 0 or self.image_size >= 8, "data.image_size", self.image_size, "must be 0 or at least 8"
        )
        require(bool(re.fullmatch(_NAME, self.name)), "data.name", self.name, "must look like cifar10 or cifar10:3.0.2")
        require(bool(re.fullmatch(_SPLIT, self.eval_split)), "data.eval_split", self.eval_split, "must look like test")
        require(self.eval_split != "train", "data.eval_split", self.eval_split, "must not be the split trained on")
        if self.archive:
            require(self.name == "cifar10", "data.name", self.name, "must be cifar10 where data.archive is set")
        if self.archive or self.name in BUILT_IN:
            require(self.eval_split == "test", "data.eval_split", self.eval_split, "must be test for this data set")
            require(self.image_size == 0, "data.image_size", self.image_size, "must be 0 for this data set")


def load(config: DataConfig, split: str) -> Arrays:
    """The decoded split, memory-mapped where it comes from the cache.

    Raises `ConfigError` where the data set or the split does not exist or does not fit, `UserError` where it cannot be
    had or read.
    """
    if config.archive:
        return read_archive(Path(config.archive).expanduser(), split)
    if config.name in BUILT_IN:
        return BUILT_IN[config.name](split)
    return _load_tfds(config, split)


def _digits(split: str) -> Arrays:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships, enlarged four times to 32x32x3.

    Every fifth example of each class is in the test split. Source: Alpaydin and Kaynak 1998, "Optical Recognition of
    Handwritten Digits", UCI Machine Learning Repository (its test set).
    """
    digits = packages.load("scikit-learn").load_digits()
    labels = digits.target.astype(np.int32)
    rank_in_class = np.tril(labels[:, None] == labels, -1).sum(axis=1)
    chosen = (rank_in_class % 5 == 4) == (split == "test")
    gray = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    return Arrays(images, labels[chosen], tuple("0123456789"), "digits")


# Data sets that need neither TFDS nor a download: name -> reader of a split ("train" or "test").
BUILT_IN = {"digits": _digits}


def cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser() if config.cache_dir else files.user_cache()


def cache_folder(config: DataConfig, split: str, version: str | None = None) -> Path | None:
    """Where in the cache the decoded split lies, if it does.

    In the given `version`, else the one that the name tells, else the newest in the cache; None where none of it is.
    """
    folder, (name, _, wanted) = cache_dir(config), config.name.partition(":")
    version = version or wanted or cache.newest_version(folder, name)
    size = f"_{config.image_size}px" if config.image_size else ""
    return folder / name / version / f"{split}{size}" if version else None


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is to be done before a data set's splits are in the cache."""

    folder: Path  # TFDS's, of the data set
    is_prepared: bool  # whether nothing is left to do but to decode
    downloads: dict[str, int]  # address -> bytes
    decoded: int  # bytes of the arrays; 0 where that shows only when it is prepared


def preparation(config: DataConfig, splits: Sequence[str]) -> Preparation:
    """What `load` would have to do for `splits` that are not in the cache; nothing is written.

    Raises `ConfigError` and `UserError` as `load` does.
    """
    require_tfds(config, splits[0])
    builder = _tfds_builder(config)
    info = builder.info
    _, _, image_shape = _features(config, info)
    folder = Path(builder.data_dir)
    if not builder.is_prepared():
        return Preparation(folder, False, {url: int(file.size) for url, file in (builder.url_infos or {}).items()}, 0)
    for split in splits:
        _require_split(config, info, split)
    decoded = sum(info.splits[split].num_examples for split in splits) * math.prod(image_shape)
    return Preparation(folder, True, {}, decoded)


def _load_tfds(config: DataConfig, split: str) -> Arrays:
    """From the cache if it can, so that a second start neither imports TFDS nor decodes."""
    folder = cache_folder(config, split)
    cached = cache.load(folder) if folder else None
    if cached is not None:
        return cached
    require_tfds(config, split)
    builder = _tfds_builder(config)
    info = builder.info
    image_key, label_key, image_shape = _features(config, info)
    with cache.filling(cache_dir(config) / config.name.partition(":")[0]):
        builder = _tfds_builder(config)  # anew: another process may just have prepared the data
        info = builder.info
        _prepare(config, builder)
        _require_split(config, info, split)
        folder = cache_folder(config, split, str(info.version))
        assert folder is not None
        return cache.load(folder) or cache.store(  # or decoded it
            folder,
            _decode(builder, split, image_key, label_key, config.image_size),
            num_examples=info.splits[split].num_examples,
            image_shape=image_shape,
            class_names=tuple(info.features[label_key].names),
            dataset=info.full_name,
        )


def require_tfds(config: DataConfig, split: str) -> None:
    """Raise `UserError` if a package that prepares a split that is not in the cache is missing."""
    missing = f"data.name={config.name!r}: its {split} split is not in the cache {cache_dir(config)}"
    packages.require(["tensorflow-datasets", "tensorflow"], f"{missing} (name one that has it: data.cache_dir)")


def _tfds() -> Any:
    from cifar_flax.data import tensorflow  # noqa: F401  # before TFDS, which would import all of TensorFlow

    return packages.load("tensorflow-datasets")


def _require_split(config: DataConfig, info: Any, split: str) -> None:
    field, value, hint = "data.eval_split", split, " (set data.eval_split)"
    if split == "train":
        field, value, hint = "data.name", config.name, ""
    allowed = f"{config.name} has no such split; it has {', '.join(info.splits)}{hint}"
    require(split in info.splits, field, value, allowed)


def _tfds_builder(config: DataConfig) -> Any:
    tfds = _tfds()
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR", "")  # which TFDS itself reads only on import
    try:
        return tfds.builder(config.name, data_dir=os.path.expanduser(data_dir) or None)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        allowed = f"must be {', '.join(BUILT_IN)} or a TFDS image-classification set such as cifar10"
        raise ConfigError(f"data.name={config.name!r}: {allowed} ({one_line(error)})") from error
    except Exception as error:  # whatever TFDS makes of damaged files
        raise UserError(f"what TFDS prepared of {config.name} cannot be read ({one_line(error)})") from error


def _features(config: DataConfig, info: Any) -> tuple[str, str, tuple[int, int, int]]:
    """Return the names of the image and of the label in TFDS's examples, and the shape of the decoded images."""
    features, keys = info.features, info.supervised_keys
    fits = (
        keys is not None
        and [type(key) for key in keys] == [str, str]
        and isinstance(features[keys[0]], _tfds().features.Image)
        and features[keys[0]].dtype == np.uint8
        and isinstance(features[keys[1]], _tfds().features.ClassLabel)
    )
    require(fits, "data.name", config.name, "must be an image-classification set: one image of bytes, one class label")
    image_key, label_key = keys
    height, width, channels = features[image_key].shape
    if config.image_size:
        height = width = config.image_size
    sizes = f"{config.name} has images of various sizes; set the size in pixels that they are resized to"
    require(None not in (height, width), "data.image_size", config.image_size, sizes)
    require(channels in (1, 3), "data.name", config.name, f"must have 1 or 3 channels, not {channels}")
    return image_key, label_key, (height, width, channels)


def _prepare(config: DataConfig, builder: Any) -> None:
    """Downloads and prepares the data set where that has not been done, with TFDS's own progress bar."""
    # Ten lines of retries would hide the one message that helps.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever the download, the disk or the parser of some data set may raise
        raise UserError(
            f"{config.name} is not prepared in {builder.data_dir} and preparing it failed ({one_line(error)}). "
            f"Ways out: {ways_out(config)}"
        ) from error


def ways_out(config: DataConfig) -> str:
    """What to do where the data set cannot be downloaded."""
    ways = ["name a folder where TFDS has prepared it (--config.data.data_dir=DIR or TFDS_DATA_DIR)"]
    if config.name == "cifar10":
        ways.append("read the official archive (--config.data.archive=cifar-10-binary.tar.gz)")
    ways.append("start with data that needs no download (--config quickstart)")
    return "; ".join(ways)


def _decode(
    builder: Any, split: str, image_key: str, label_key: str, image_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of images and labels, in the order in which TFDS stores them."""
    from cifar_flax.data.tensorflow import dataset_options, tf

    # One file after another: interleaving them would make the order depend on TFDS's defaults.
    dataset = builder.as_dataset(split=split, read_config=_tfds().ReadConfig(interleave_cycle_length=1))

    def resize(example: Any) -> tuple[Any, Any]:
        image = example[image_key]
        if image_size:
            image = tf.image.resize(image, (image_size, image_size), antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return image, example[label_key]

    dataset = dataset.map(resize, num_parallel_calls=os.cpu_count()).batch(_DECODE_BATCH)
    try:
        yield from dataset.with_options(dataset_options()).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise UserError(f"what TFDS prepared in {builder.data_dir} cannot be read ({one_line(error)})") from error
