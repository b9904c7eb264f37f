"""Load datasets: built-in readers, TFDS sets of many kinds, damaged and missing data."""

import http.server
import subprocess
import sys
import threading
import types

import fake_tfds
import numpy as np
import pytest
from conftest import REPOSITORY

from cifar_flax import files
from cifar_flax.data import cache, datasets, images, sources, tfds
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError


def test_digits_are_split_by_class_and_enlarged():
    train, test = (sources.load(DataConfig(name="digits"), split) for split in ("train", "test"))
    assert len(train.labels) + len(test.labels) == 1797
    for arrays in (train, test):
        assert arrays.images.shape == (len(arrays.labels), 32, 32, 3)
        assert (arrays.images.min(), arrays.images.max()) == (0, 255)
    fraction = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(fraction, 0.2, atol=0.01)
    small = train.images[:, ::4, ::4]
    np.testing.assert_array_equal(small.repeat(4, axis=1).repeat(4, axis=2), train.images)


def test_built_in_sets_are_resized_like_image_files():
    image = sources.load(DataConfig(name="digits"), "test").images[0]
    resized = sources.load(DataConfig(name="digits", image_size=20), "test").images
    assert resized.shape == (355, 20, 20, 3)
    np.testing.assert_array_equal(resized[0], images.resize(image, (20, 20, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "training"}, "data.train_split='training': must be a split of digits: train, test"),
        ({"eval_split": "validation"}, "data.eval_split='validation': must be a split of digits: train, test"),
    ],
)
def test_splits_of_built_in_sets_are_checked(settings, message):
    config = DataConfig(name="digits", **settings)
    config.validate()
    with pytest.raises(ConfigError) as caught:
        sources.load(config, *settings.values())
    assert str(caught.value) == message


def expected(count, shape):
    return np.stack([np.full(shape, 60 + 100 * (i % 2) + i, np.uint8) for i in range(count)])


@pytest.mark.parametrize(
    ("name", "shape"), [("fake_color", (12, 10, 3)), ("fake_gray", (8, 8, 1)), ("fake_color:1.0.0", (12, 10, 3))]
)
def test_tfds_sets_with_images_of_one_size(name, shape):
    for split, count in (("train", 40), ("test", 20)):
        arrays = sources.load(DataConfig(name=name), split)
        assert arrays.class_names == ("a", "b")
        assert arrays.dataset == f"{name.split(':')[0]}/1.0.0"
        brightness = arrays.images[:, 0, 0, 0]
        order = np.argsort(brightness)  # TFDS shuffles when it prepares a set
        np.testing.assert_array_equal(np.sort(brightness), np.sort(expected(count, shape)[:, 0, 0, 0]))
        np.testing.assert_array_equal(arrays.images, np.broadcast_to(brightness[:, None, None, None], (count, *shape)))
        np.testing.assert_array_equal(arrays.labels[order], np.repeat([0, 1], count // 2))


def test_variable_size_needs_image_size():
    with pytest.raises(ConfigError, match=r"data\.image_size=0: .*fake_variable"):
        sources.load(DataConfig(name="fake_variable"), "train")
    arrays = sources.load(DataConfig(name="fake_variable", image_size=9), "train")
    assert arrays.images.shape == (40, 9, 9, 3)
    assert sorted(arrays.images[:, 4, 4, 0]) == sorted(expected(40, ())[:])
    assert sources.load(DataConfig(name="fake_variable", image_size=10), "train").images.shape == (40, 10, 10, 3)


def test_missing_test_split_needs_eval_split():
    config = DataConfig(name="fake_no_test")
    with pytest.raises(ConfigError, match=r"data\.eval_split='test': .*train, validation"):
        sources.load(config, config.eval_split)
    with pytest.raises(ConfigError, match=r"data\.eval_split='test'"):  # before the train split is decoded
        sources.load(config, config.train_split)
    assert len(sources.load(DataConfig(name="fake_no_test", eval_split="validation"), "validation").labels) == 20


def test_sets_that_do_not_classify_images_are_refused():
    with pytest.raises(ConfigError, match=r"data\.name='fake_regression': .*image-classification"):
        sources.load(DataConfig(name="fake_regression"), "train")
    with pytest.raises(ConfigError, match=r"data\.name='fake_color:9\.9\.9'"):
        sources.load(DataConfig(name="fake_color:9.9.9"), "train")


def test_second_start_needs_neither_tensorflow_nor_tfds(tmp_path):
    first = sources.load(DataConfig(name="fake_color"), "train")
    code = (
        "import sys\n"
        "from cifar_flax.data import sources\n"
        "arrays = sources.load(sources.DataConfig(name='fake_color'), 'train')\n"
        "assert len(arrays.labels) == 40\n"
        "print([name for name in sys.modules if name.startswith('tensorflow')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert isinstance(first.images, np.memmap)


def test_damaged_cache_is_rebuilt_with_a_warning():
    config = DataConfig(name="fake_color")
    before = np.array(sources.load(config, "test").images)
    (path,) = files.user_cache().glob("fake_color/1.0.0/test.*/images.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        after = sources.load(config, "test")
    np.testing.assert_array_equal(after.images, before)


def test_data_dir_and_cache_dir_are_used(tmp_path, monkeypatch):
    """`~` is expanded in the settings and in the environment variables."""
    for name, folder in {"HOME": str(tmp_path), "TFDS_DATA_DIR": "~/tfds", "XDG_CACHE_HOME": "~/cache"}.items():
        monkeypatch.setenv(name, folder)
    (tmp_path / "here").mkdir()
    config = DataConfig(name="fake_gray", data_dir="~/here", cache_dir="~/there")
    sources.load(config, "test")
    assert (tmp_path / "here" / "fake_gray" / "1.0.0").is_dir()
    assert len(list((tmp_path / "there").glob("fake_gray/1.0.0/test.*/manifest.json"))) == 1
    assert not (tmp_path / "tfds").exists()
    sources.load(DataConfig(name="fake_gray"), "test")
    assert (tmp_path / "tfds" / "fake_gray" / "1.0.0").is_dir()  # TFDS_DATA_DIR
    assert (tmp_path / "cache" / "cifar_flax" / "fake_gray").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/images.bin" else 404)
            self.end_headers()
            self.wfile.write(bytes(range(100, 140)))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_missing_data_is_downloaded(server, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(fake_tfds.FakeDownload, "url", f"{server}/images.bin")
    arrays = sources.load(DataConfig(name="fake_download", data_dir=str(tmp_path)), "train")
    assert sorted(arrays.images[:, 0, 0, 0]) == list(range(100, 140))
    assert "Dl Completed" in capfd.readouterr().err  # of the progress bar of TFDS


def test_failed_download_suggests_alternatives(server, monkeypatch, tmp_path):
    monkeypatch.setattr(fake_tfds.FakeDownload, "url", f"{server}/gone.bin")
    with pytest.raises(UserError) as caught:
        sources.load(DataConfig(name="fake_download", data_dir=str(tmp_path)), "train")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("404", "data.data_dir=", "data.cache_dir=", "--config quickstart"):
        assert part in message
    assert "data.source" not in message  # which is for CIFAR only
    assert caught.value.exit_code == 1


def test_failed_download_of_cifar10_also_suggests_its_other_sources(monkeypatch, tmp_path):
    def offline(self):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(fake_tfds.tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(UserError) as caught:
        sources.load(DataConfig(name="cifar10", data_dir=str(tmp_path)), "train")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("ConnectionError: no network", "data.data_dir=", "data.archive=", "data.source=hub", "./data"):
        assert part in message


def test_damaged_prepared_data_is_reported_in_one_line(tmp_path):
    config = DataConfig(name="fake_color", data_dir=str(tmp_path))
    tfds.builder_of(config).download_and_prepare()
    for pattern in ("*.tfrecord*", "dataset_info.json"):
        for path in tmp_path.rglob(pattern):
            path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(UserError, match=r"cannot be read \(") as caught:
            sources.load(config, "train")
        assert "\n" not in str(caught.value)


def test_processes_that_start_together_decode_once(tmp_path):
    """Of two processes that start together with one cache, one decodes, and the other waits and reads its result."""
    code = (
        f"import sys\nsys.path += [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests')!r}]\n"
        "import fake_tfds\nfrom cifar_flax.data import sources, tfds\n"
        "decode = tfds._decode\n"
        "def reported(*arguments):\n    print('decodes')\n    return decode(*arguments)\n"
        "tfds._decode = reported\nsources.load(sources.DataConfig(name='fake_color'), 'train')\n"
    )
    run = [sys.executable, "-c", code]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert sum(out.count("decodes") for out, _ in printed) == 1
    assert sum(out.count("Downloading and preparing") for out, _ in printed) == 1


IMAGES = np.zeros((4, 5, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), [0, 1, 0, 1], "images must be uint8, not float32"),
        (IMAGES[..., 0], [0, 1, 0, 1], "images must have the shape (n, height, width, 1 or 3), not (4, 5, 5)"),
        (np.zeros((4, 5, 5, 4), np.uint8), [0, 1, 0, 1], "images must have the shape (n, height, width, 1 or 3), not"),
        (IMAGES, [0, 1, 0], "labels must be 4 integers, not int64 of shape (3,)"),
        (IMAGES, [0.0, 1.0, 0.0, 1.0], "labels must be 4 integers, not float64 of shape (4,)"),
        (IMAGES, [0, 1, 2, 1], "labels must be 0 to 1, not 0 to 2"),
        (IMAGES, [-1, 0, 1, 0], "labels must be 0 to 1, not -1 to 1"),
        (IMAGES, FileNotFoundError(2, "No such file or directory", "images.bin"), "train split cannot be read"),
    ],
)
def test_results_of_readers_are_checked(monkeypatch, images, labels, message):
    def read(split, data_dir):
        if isinstance(labels, Exception):
            raise labels
        return types.SimpleNamespace(images=images, labels=np.array(labels), class_names=["a", "b"], dataset="own")

    dataset = datasets.Dataset(read=read)
    monkeypatch.setitem(datasets.DATASETS, "digits", dataset)
    with pytest.raises(UserError) as caught:
        sources.load(DataConfig(name="digits"), "train")
    assert str(caught.value).startswith(f"data.name='digits': its {message}")


def test_readers_get_the_data_dir(monkeypatch, tmp_path):
    def read(split, data_dir):
        labels = np.frombuffer((data_dir / split).read_bytes(), np.uint8)
        return cache.Arrays(IMAGES, labels.astype(np.int32), ("a", "b"), "own")

    (tmp_path / "train").write_bytes(bytes([0, 1, 1, 0]))
    monkeypatch.setitem(datasets.DATASETS, "digits", datasets.Dataset(read=read))
    arrays = sources.load(DataConfig(name="digits", data_dir=str(tmp_path)), "train")
    assert arrays.labels.tolist() == [0, 1, 1, 0]
