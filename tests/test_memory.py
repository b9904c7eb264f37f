"""Measure the memory of a training process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, needs_tensorflow, python_path
from processes import environment

from cifar_flax.data import cache
from cifar_flax.runtime.allocator import SETTINGS

CONFIG = """
from cifar_flax.config import Config, TrainConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig

def get_config():
    return Config(
        data=DataConfig(name="squares:1.0.0", pipeline="streaming"),
        model=CNNConfig(width=4, hidden=16),
        train=TrainConfig(batch_size=128, epochs=12),
    )
"""
# Runs main.py and prints the number of resident memory pages at each evaluation, once per epoch.
WATCHED = """
import sys
from cifar_flax import cli
from cifar_flax.training.evaluator import Evaluator

call = Evaluator.__call__

def watched(self, state, *stopping):
    print("PAGES", open("/proc/self/statm").read().split()[1])
    return call(self, state, *stopping)

Evaluator.__call__ = watched
sys.exit(cli.main())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc of Linux")
@needs_tensorflow
@pytest.mark.slow
def test_memory_does_not_grow_from_epoch_to_epoch(tmp_path):
    """A leak of the images (6 MB per epoch) would exceed the limit well before the twelfth epoch."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2000), ("test", 100)):
        cache.store(
            Path(os.environ["XDG_CACHE_HOME"]) / "cifar_flax" / "squares" / "1.0.0" / split,
            [(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 2, count, np.int32))],
            num_examples=count,
            image_shape=(32, 32, 3),
            class_names=("a", "b"),
            dataset="squares/1.0.0",
        )
    (tmp_path / "config.py").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "--config", str(tmp_path / "config.py"), "--workdir=run"],
        env=environment(PYTHONPATH=python_path(REPOSITORY), **SETTINGS),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["step"] == 12 * 2000 // 128 + 1
    pages = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PAGES")]
    assert len(pages) == 13  # 12 epochs and the final evaluation
    assert pages[11] < 1.05 * pages[2], f"MB at each evaluation: {[page // 256 for page in pages]}"
