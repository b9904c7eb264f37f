"""Training with the required packages alone: no TensorFlow, scikit-learn, matplotlib, tensorboardX, tqdm etc."""

import importlib.metadata
import json
import re
import subprocess
import sys

import cifar_copies
import numpy as np
import pytest
from conftest import REPOSITORY
from processes import environment

from cifar_flax import packages
from cifar_flax.data import cache

NEEDED = packages.REQUIRED
CONFIG = """
from cifar_flax.config import Config, TrainConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig

def get_config():
    return Config(
        data=DataConfig(name="squares", pipeline="streaming"),
        model=CNNConfig(width=4, hidden=16),
        train=TrainConfig(batch_size=50, epochs=2, steps_per_call=2, log_every=2),
    )
"""


def needed_distributions():
    """Return the distributions of `NEEDED` and of their requirements, recursively."""
    found, names = {}, list(NEEDED)
    while names:
        name = re.sub("[-_.]+", "-", names.pop().lower())
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        needs = [need for need in found[name].requires or () if "extra ==" not in need]
        names += [re.match(r"[\w.-]+", need)[0] for need in needs]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with links to the files of the required packages and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for distribution in needed_distributions().values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def start(site, tmp_path, *arguments):
    """Run `main.py` in a Python process that finds only the standard library and `site`."""
    code = f"import sys; sys.path += {[str(REPOSITORY), str(site)]}; from cifar_flax import cli; cli.entry_point()"
    command = [sys.executable, "-I", "-S", "-c", code, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


def test_training_and_evaluation_from_the_data_cache(site, tmp_path, config_file):
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 30)):
        labels = rng.integers(0, 2, count, np.int32)
        images = (rng.integers(0, 100, (count, 32, 32, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
        cache.store(
            tmp_path / "decoded" / "squares" / "1.0.0" / split,
            [(images, labels)],
            num_examples=count,
            image_shape=(32, 32, 3),
            class_names=("dark", "bright"),
            dataset="squares/1.0.0",
        )
    cache_dir = "--config.data.cache_dir=decoded"
    done = start(site, tmp_path, "--config", config_file, cache_dir, "--workdir=run")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (result["num_examples"], result["step"]) == (30, 8)
    assert result["accuracy"] > 0.9
    assert "images (streaming)" in done.stdout
    assert "\ndata.pipeline: batches are gathered with NumPy, not tf.data: tensorflow is not installed" in done.stdout
    for package in ("tensorboardX", "matplotlib"):
        assert len([line for line in done.stdout.splitlines() if f"{package} is not installed" in line]) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "checkpoints", "eval.json", "report.html",
    }  # fmt: skip
    trained = (tmp_path / "run" / "eval.json").read_bytes()
    done = start(site, tmp_path, "--mode=eval", "--workdir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "eval.json").read_bytes() == trained
    for arguments, package in (
        (("--mode=predict", "photo.png"), "pillow"),
        (("--mode=export", "--output=exported"), "safetensors is not installed.*flatbuffers"),
    ):
        done = start(site, tmp_path, *arguments, "--workdir=run")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.search(f"^error: .*{package} is not installed.*pip install", done.stderr)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ("", "data.name='squares': .*train.*tensorflow-datasets is not installed"),
        ("--config.data.name=cifar10", "cifar10 is not on this machine.*huggingface-hub is not installed"),
        ("--config.data.name=digits", "data.name=digits: scikit-learn is not installed"),
    ],
)
def test_a_missing_package_is_reported_in_one_line(site, tmp_path, config_file, arguments, pattern):
    done = start(site, tmp_path, "--config", config_file, *arguments.split())
    assert done.returncode == 1
    assert re.search(f"^error: {pattern}", done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_an_archive_is_read(site, tmp_path):
    cifar_copies.write_npz(tmp_path / "a.npz", 3)
    load = "sources.load(sources.DataConfig(archive='a.npz'), 'train').labels[0]"
    code = f"import sys; sys.path += {[str(REPOSITORY), str(site)]}; from cifar_flax.data import sources; print({load})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_missing_required_package_is_reported(site, tmp_path):
    hide = "sys.modules['optax'] = None; from cifar_flax import cli; cli.entry_point()"
    code = f"import sys; sys.path += {[str(REPOSITORY), str(site)]}; {hide}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch('error: optax is not installed.*pip install.* "optax>=0.2.6".*\n', done.stderr)
