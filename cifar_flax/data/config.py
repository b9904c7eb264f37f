"""The settings of the data, and the folder of decoded arrays."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cifar_flax import files
from cifar_flax.data.order import SAMPLING
from cifar_flax.data.pipelines import PIPELINES
from cifar_flax.errors import require
from cifar_flax.paths import local_path

# Names become folders in the cache, so they must not contain "..".
_NAME = r"\w[\w-]*(/\w[\w.+-]*)?(:\d+(\.\d+)*)?"
_SPLIT = r"\w[\w-]*"
FOLDER_SIDES = (16, 256)  # smallest and largest data.image_size of a folder, in pixels
SOURCES = ("auto", "tfds", "hub")
# The values of data.name that are looked for outside TFDS's folder, and the name of their Python version
_COPIES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
PUBLIC = tuple(_COPIES)


@dataclass(slots=True, kw_only=True)
class DataConfig:
    name: str = "cifar10"  # digits, folder, or a TFDS set such as cifar100, svhn_cropped or mnist:3.0.1
    data_dir: str = ""  # folder of the data, such as that of TFDS; "" is TFDS_DATA_DIR or ~/tensorflow_datasets
    folder: str = ""  # folder of class folders, or of train and test with class folders, to read instead of data.name
    archive: str = ""  # file or folder of the data, such as cifar-10-python.tar.gz, to read instead of data.name's own
    source: str = "auto"  # of cifar10 and cifar100: tfds | hub (Hugging Face) | auto: from disk, or else from the hub
    cache_dir: str = ""  # folder of decoded arrays; "" is cifar_flax in the user's cache folder
    cache: str = "decoded"  # decoded: keep decoded images in cache_dir | none: decode the files of a folder at each use
    image_size: int = 0  # height and width in pixels that images are resized to; 0 keeps their size (folder: 64)
    train_split: str = "train"  # split to train on
    eval_split: str = "test"  # split to evaluate on
    test_fraction: float = 0.2  # fraction of the files of a folder without train and test that are the test split
    max_bad_fraction: float = 0.01  # fraction of unreadable files in a folder that stops a run, if more than five
    validation_fraction: float = 0.0  # fraction of the train split that is held out for validation
    sampling: str = "shuffled"  # shuffled: each example once per epoch | balanced: each class equally often
    pipeline: str = "auto"  # streaming (from the host) | resident (in device memory) | auto: by device, see Devices
    drop_last: bool = False  # drop the incomplete last batch of an epoch; otherwise batches span epoch boundaries

    def validate(self) -> None:
        fraction = self.validation_fraction
        require(self.pipeline in PIPELINES, "data.pipeline", self.pipeline, f"must be one of {', '.join(PIPELINES)}")
        require(self.sampling in SAMPLING, "data.sampling", self.sampling, f"must be one of {', '.join(SAMPLING)}")
        require(0 <= fraction < 1, "data.validation_fraction", fraction, "must be in [0, 1)")
        require(
            self.image_size == 0 or self.image_size >= 8, "data.image_size", self.image_size, "must be 0 or at least 8"
        )
        require(self.cache in ("decoded", "none"), "data.cache", self.cache, "must be decoded or none")
        if self.cache == "none":
            require(self.is_folder, "data.cache", self.cache, "needs data.folder; other data is always decoded first")
            allowed = "must be streaming or auto if data.cache is none"
            require(self.pipeline != "resident", "data.pipeline", self.pipeline, allowed)
        require(bool(re.fullmatch(_NAME, self.name)), "data.name", self.name, "must look like cifar10 or cifar10:3.0.2")
        for field, split in (("train_split", self.train_split), ("eval_split", self.eval_split)):
            require(bool(re.fullmatch(_SPLIT, split)), f"data.{field}", split, "must be a name such as test")
        fits = self.eval_split != self.train_split
        require(fits, "data.eval_split", self.eval_split, "must not be the split to train on")
        require(0 < self.test_fraction < 1, "data.test_fraction", self.test_fraction, "must be above 0 and below 1")
        bad = self.max_bad_fraction
        require(0 <= bad <= 1, "data.max_bad_fraction", bad, "must be in [0, 1]")
        if self.is_folder:
            smallest, largest = FOLDER_SIDES
            fits, allowed = smallest <= self.side <= largest, f"must be {smallest} to {largest} for data.folder"
            require(fits, "data.image_size", self.image_size, allowed)
            require(not self.archive, "data.archive", self.archive, "must be empty if data.folder is set")
        require(self.source in SOURCES, "data.source", self.source, f"must be one of {', '.join(SOURCES)}")
        fits, allowed = self.source != "hub" or self.name in PUBLIC, f"needs data.name to be {' or '.join(PUBLIC)}"
        require(fits, "data.source", self.source, allowed)
        fits = self.source == "auto" or not self.archive
        require(fits, "data.source", self.source, "must be auto if data.archive is set")
        fits = self.source != "hub" or not self.data_dir
        require(fits, "data.source", self.source, "must be auto or tfds if data.data_dir, the folder of TFDS, is set")

    @property
    def is_folder(self) -> bool:
        """Return whether the data is a folder of images. The config file `folder.py` leaves its path open."""
        return bool(self.folder) or self.name == "folder"

    @property
    def wanted_pipeline(self) -> str:
        """Return `pipeline`, or "streaming" if images are decoded at each use."""
        return "streaming" if self.cache == "none" else self.pipeline

    @property
    def side(self) -> int:
        """Return the height and width in pixels of the images of a folder."""
        return self.image_size or 64


def cache_dir(config: DataConfig) -> Path:
    """Return the folder of decoded arrays; it may not exist."""
    return local_path("data.cache_dir", config.cache_dir) if config.cache_dir else files.user_cache()


def cache_folder(config: DataConfig, split: str, version: str) -> Path:
    """Return the folder of the decoded split in the cache, without a key; it may not exist."""
    size = f"_{config.image_size}px" if config.image_size else ""
    return cache_dir(config) / config.name.partition(":")[0] / version / f"{split}{size}"


def require_splits(config: DataConfig, splits: Iterable[str]) -> None:
    """Raise `ConfigError` unless both splits of the config exist, before one of them is decoded."""
    for field, split in (("data.train_split", config.train_split), ("data.eval_split", config.eval_split)):
        require(split in splits, field, split, f"must be a split of {config.name}: {', '.join(splits)}")


def alternatives(config: DataConfig) -> str:
    """Return the ways to get the data if it cannot be downloaded, or only slowly."""
    ways = "--config.data.cache_dir=DIR (a cache of another machine) or --config.data.data_dir=DIR (prepared by TFDS)"
    if config.name not in PUBLIC:
        return f"{ways}; --config quickstart needs no download"
    mirror = "HF_ENDPOINT=URL (a mirror)" if config.source != "tfds" and not config.data_dir else "data.source=hub"
    return f"a copy in ./data ({_COPIES[config.name]}), --config.data.archive=FILE, {mirror}, {ways}"
