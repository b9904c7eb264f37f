"""Small TFDS datasets, one for each kind of image set in the TFDS catalogue, prepared without a network."""

from pathlib import Path

import numpy as np
import pytest

# Without TFDS, skip the tests of the files that import this one.
tfds = pytest.importorskip("tensorflow_datasets")


class _Fake(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent  # TFDS otherwise expects a package per dataset
    SHAPE: tuple = (12, 10, 3)
    SPLITS = ("train", "test")

    def _info(self):
        features = {"image": tfds.features.Image(shape=self.SHAPE), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for i in range(40 if split == "train" else 20):
            yield i, self.example(i)

    def example(self, i):
        shape = [size or 16 + i for size in self.SHAPE]
        # Images of class b are brighter, so that the classes can be learned.
        return {"image": np.full(shape, 60 + 100 * (i % 2) + i, np.uint8), "label": i % 2}


class FakeColor(_Fake):
    """Images of a fixed size that is not square."""


class FakeGray(_Fake):
    SHAPE = (8, 8, 1)


class FakeVariable(_Fake):
    SHAPE = (None, None, 3)


class FakeNoTest(_Fake):
    SPLITS = ("train", "validation")


class FakeRegression(_Fake):
    def _info(self):
        features = {"image": tfds.features.Image(shape=self.SHAPE), "label": tfds.features.Scalar(np.int32)}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )


class FakeDownload(_Fake):
    """Images whose pixels are the bytes of a downloaded file."""

    url = ""

    def _split_generators(self, dl_manager):
        self.content = dl_manager.download(self.url).read_bytes()
        return super()._split_generators(dl_manager)

    def example(self, i):
        return {"image": np.full(self.SHAPE, self.content[i], np.uint8), "label": i % 2}
