"""The cache distinguishes the data that it was decoded from."""

import re
import shutil

import fake_tfds
import numpy as np
import pytest

from cifar_flax import files, packages
from cifar_flax.data import sources, tfds
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError


def load_from(data_dir, **settings):
    return sources.load(DataConfig(name="fake_gray", data_dir=str(data_dir), **settings), "test")


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """Return two folders with different data under one name and version; the second is inverted."""
    example = fake_tfds.FakeGray.example
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        tfds.builder_of(DataConfig(name="fake_gray", data_dir=str(tmp_path / folder))).download_and_prepare()
        monkeypatch.setattr(fake_tfds.FakeGray, "example", lambda self, i: {**example(self, i), "label": 1 - i % 2})
    return tmp_path / "one", tmp_path / "other"


def test_folders_with_different_data_have_their_own_cache(two_folders, monkeypatch, capsys):
    first = load_from(two_folders[0])
    capsys.readouterr()
    second = load_from(two_folders[1])
    line = f"fake_gray: the cached test split is of other files than those in {two_folders[1]}; decoding these"
    assert line in capsys.readouterr().out
    np.testing.assert_array_equal(first.labels, first.images[:, 0, 0, 0] % 2)
    np.testing.assert_array_equal(second.labels, 1 - second.images[:, 0, 0, 0] % 2)
    monkeypatch.setattr(tfds, "_decode", lambda *arguments: pytest.fail("decoded again"))
    for folder, arrays in zip(two_folders, (first, second), strict=True):
        np.testing.assert_array_equal(load_from(folder).labels, arrays.labels)
        monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
        np.testing.assert_array_equal(load_from("").labels, arrays.labels)
    assert capsys.readouterr().out == ""


def test_changed_data_is_decoded_again_with_one_line(two_folders, capsys):
    one, other = two_folders
    before = load_from(one).labels
    shutil.rmtree(one / "fake_gray")
    shutil.copytree(other / "fake_gray", one / "fake_gray")
    capsys.readouterr()
    after = load_from(one).labels
    assert after.tolist() != before.tolist()
    np.testing.assert_array_equal(after, load_from(other).labels)
    assert f"fake_gray: the cached test split is of other files than those in {one};" in capsys.readouterr().out
    load_from(one)
    assert capsys.readouterr().out == ""


def test_linked_folders_of_a_dataset_are_compared_by_what_they_link_to(tmp_path, two_folders):
    version = tmp_path / "linked" / "fake_gray" / "1.0.0"
    version.parent.mkdir(parents=True)
    for folder in two_folders:
        version.unlink(missing_ok=True)
        version.symlink_to(folder / "fake_gray" / "1.0.0")
        np.testing.assert_array_equal(load_from(tmp_path / "linked").labels, load_from(folder).labels)


def test_a_data_dir_that_does_not_exist_is_refused_although_data_is_cached(tmp_path, two_folders):
    load_from(two_folders[0])
    with pytest.raises(ConfigError, match=r"data\.data_dir='.*nowhere': must be an existing folder"):
        load_from(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_cache_is_used_without_the_prepared_data(tmp_path, two_folders, monkeypatch, capsys):
    one, other = two_folders
    labels = load_from(one).labels.tolist()
    (files.user_cache()).rename(tmp_path / "carried")
    monkeypatch.setattr(packages, "installed", lambda name: False)
    settings = {"cache_dir": str(tmp_path / "carried")}
    assert load_from("", **settings).labels.tolist() == labels  # TFDS_DATA_DIR does not exist
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(f"fake_gray is not in {tmp_path / 'tfds'}; using .*{tmp_path / 'carried'}", line)
    for folder in (other, tmp_path):  # with other data, and named although it has none
        with pytest.raises(UserError, match="tensorflow-datasets is not installed"):
            load_from(folder, **settings)
    assert load_from(one, **settings).labels.tolist() == labels
