"""Shared fixtures and assertions. The tests check all jaxtyping annotations; implicit rank promotion raises."""

import contextlib
import io
import json
import os
import signal
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook("cifar_flax", "typecheck.check")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Hypothesis tries the same examples in every run, without a time limit.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

from cifar_flax import packages
from cifar_flax.checkpoints import manager
from cifar_flax.config import Config, EvalConfig, TrainConfig
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig
from cifar_flax.modes.train import train
from cifar_flax.runtime import signals
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.state import TrainState
from cifar_flax.training.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent
PREPARED = Path(os.environ.get("TFDS_DATA_DIR", "nowhere")).absolute()  # read before a fixture changes it


needs_tensorflow = pytest.mark.skipif(not packages.installed("tensorflow"), reason="TensorFlow is not installed")


def python_path(*folders):
    """Return PYTHONPATH with `folders` before those that it has, which may hold the packages of this project."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_addoption(parser):
    parser.addoption("--reduced", action="store_true", help="run the longest slow tests at reduced size")
    parser.addoption("--default-optimizations", action="store_true", help="keep the default XLA optimizations")


def pytest_configure(config):
    """Disable most XLA optimizations, which take most of the time; `.ci/run` enables them for the numerics tests."""
    jax.config.update("jax_disable_most_optimizations", not config.getoption("--default-optimizations"))


def pytest_terminal_summary(terminalreporter):
    """Print the devices that `test_accelerator.py` ran on."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    for devices in sorted({value for name, value in properties if name == "devices"}):
        terminalreporter.write_line(f"accelerator tests ran on {devices}, jax {jax.__version__}")


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Let all tests share one compilation cache."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def tf():
    """Return the module `tensorflow`, or skip the test if it is not installed."""
    if not packages.installed("tensorflow"):
        pytest.skip("TensorFlow is not installed")
    from cifar_flax.data import tensorflow

    return tensorflow.tf


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Run each test in `tmp_path`, with the user's home, cache and data folders redirected to it, and without a hub."""
    for name, folder in {
        "XDG_CACHE_HOME": "cache",
        "HOME": "home",
        "TFDS_DATA_DIR": "tfds",
        "HF_HUB_CACHE": "hub",
    }.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    if packages.installed("huggingface-hub"):  # it reads the variables when it is imported
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Reset the handlers: a background job of a script ignores SIGINT, and its children would inherit that."""
    defaults = dict.fromkeys(signals.SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_tiny_config() -> Config:
    """Return a config of three short epochs on digits: a small CNN with augmentation, dropout and a schedule."""
    return Config(
        data=DataConfig(name="digits", pipeline="resident"),
        augment=AugmentConfig(flip="random", crop_padding=2),
        model=CNNConfig(width=4, hidden=16),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, schedule="cosine", warmup_epochs=0.5, weight_decay=0.01),
        train=TrainConfig(batch_size=128, epochs=3, log_every=4),
        eval=EvalConfig(batch_size=100),
    )


@pytest.fixture
def tiny_config() -> Config:
    return make_tiny_config()


@pytest.fixture(scope="session")
def straight(tmp_path_factory, compile_once):
    """Return the workdir (not to be modified) and the output of an uninterrupted run of the tiny config."""
    folder, printed = tmp_path_factory.mktemp("straight") / "tiny", io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(make_tiny_config(), folder)
    return folder, printed.getvalue()


def make_state(step=3, width=2, dtype=jnp.float32):
    leaf = jnp.arange(3 * width, dtype=dtype).reshape(3, width)
    return TrainState(
        step=jnp.int32(step),
        seed=jnp.uint32(2**32 - 1),
        params={"layer": {"kernel": leaf}},
        batch_stats={"norm": {"mean": leaf + 1}},
        opt_state=({"mu": leaf + 2}, (), jnp.int32(7)),
        average=(),
    )


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_them(**fields):
        opened.append(manager.Checkpoints(tmp_path / "checkpoints", manager.CheckpointConfig(**fields)))
        return opened[-1]

    yield open_them
    for checkpoints in opened:
        checkpoints.close()


def steps_in(folder):
    return {path.name for path in folder.iterdir()}


# Entries in the workdir of a finished run.
FILES = {
    ".lock", "config.json", "metrics.jsonl", "checkpoints", "eval.json", "report.html", "confusion_matrix.png",
    "tensorboard",
}  # fmt: skip

# Fields of metrics.jsonl that depend neither on the machine nor on its load.
NOT_TIMES = ("step", "epoch", "split", "loss", "accuracy", "learning_rate")


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(config, workdir):
    trainer = Trainer(config)
    with manager.Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        return checkpoints.restore(checkpoints.newest_step(), trainer.initial_state)


def assert_same_run(config, one, other):
    """Assert bitwise equal final states, logged metrics (except times and rates) and evaluation results."""
    states = [final_state(config, folder) for folder in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    logs = [[{name: line[name] for name in NOT_TIMES} for line in read_metrics(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "eval.json").read_bytes() == (other / "eval.json").read_bytes()


# The following functions compare results of equivalent programs. Such programs may differ by rounding errors, because
# of the CPU's vector width and of XLA's fusions.


def widest_gap(values):
    """Return a threshold that no rounding error crosses: the middle of the widest gap in the middle half."""
    ordered = np.sort(np.asarray(values, np.float64))
    middle = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    place = np.diff(middle).argmax()
    assert middle[place + 1] - middle[place] > 1e-4
    return float(middle[place : place + 2].mean())


def assert_same_classes(found, expected):
    """Assert equal predicted classes, ignoring images whose two largest probabilities are almost equal."""
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(axis=1)[clear], expected.argmax(axis=1)[clear])


def assert_same_counts(found, expected):
    """Assert that confusion matrices are equal, except for one image, whose class may depend on rounding errors."""
    assert np.sum(found) == np.sum(expected)
    assert np.abs(np.subtract(found, expected)).sum() <= 2
