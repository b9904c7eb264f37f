"""Toy sizes, toy data and fake peers for `benchmarks.accelerator --rehearse`."""

from pathlib import Path

import numpy as np

from cifar_flax.data import cache, sources
from cifar_flax.data.sources import DataConfig

_BATCH = 32
_SPLITS = {"train": 2 * _BATCH, "test": _BATCH}  # images
_RUN = (f"train.batch_size={_BATCH}", "train.epochs=4", f"eval.batch_size={_BATCH}")
_AIRBENCH = ("model.widths=(4,4,4)", "train.steps_per_call=2", "train.log_every=2")
# The learning rates of the configs are for batches of 250 to 2,000 images.
_MUON = ("optim.dense.learning_rate=1.", "optim.biases.learning_rate=1.")
_PHASES = ("train.resolutions=((0,24),(1,28),(2,32))", "optim.whitening.frozen_from=1")  # of one call or more each
_CNN = ("model.width=4", "model.hidden=16")
# Config -> overrides.
OVERRIDES = {
    "airbench94_wide": (*_RUN, *_AIRBENCH, *_MUON, *_PHASES),
    "airbench94_muon": (*_RUN, *_AIRBENCH, *_MUON),
    "airbench95": (*_RUN, *_AIRBENCH, *_MUON, "train.resolutions=((0,20),(2,32))", "optim.whitening.frozen_from=1"),
    "airbench96": (*_RUN, *_AIRBENCH),
    "resnet18": (*_RUN, "model.width=2"),
    "default": (*_RUN, *_CNN),
    "notebook": (*_RUN, *_CNN),
}
TRIALS = 2
TESTS = "bits or evaluation"  # of tests/test_accelerator.py
SEVERAL_DEVICES = ("default",)  # configs
# Prints like the scripts of airbench. `{fails}` is the run in which it fails.
_PEER = """
import time

def row(*cells):
    print("".join(f"|  {{cell}}  " for cell in cells) + "|")

def main(run):
    if run == {fails}:
        raise SystemExit("out of memory")
    time.sleep(0.01)
    row(run, 1, 0.9, 0.5, "", 0.01)
    row("", "eval", 0.9, 0.5, 0.5, 0.02)

row("run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds")
main("warmup")
for run in range(200):
    main(run)
"""


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of all stages: the CPU, and programs that compile quickly, and once."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "TFDS_DATA_DIR": str(folder / "no_data"),  # so that the cache of `write_data` is used
    }


def write_peers(folder: Path) -> list[Path]:
    """Write two fake peers, the first of which fails in its second counted run, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, fails in (("failing_peer.py", 2), ("fake_peer.py", -1)):
        paths.append(folder / name)
        paths[-1].write_text(_PEER.format(fails=fails))
    return paths


def write_data(folder: Path) -> None:
    """Write a cache of random images with the names of CIFAR-10's splits, unless `folder` has one."""
    rng = np.random.default_rng(0)
    config = DataConfig(cache_dir=str(folder))
    for split, count in _SPLITS.items():
        target = sources.cache_folder(config, split, "0.0.0")
        if not target.exists():
            images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
            labels = rng.integers(0, 10, count, np.int32)
            cache.store(
                target,
                [(images, labels)],
                num_examples=count,
                image_shape=(32, 32, 3),
                class_names=tuple("0123456789"),
                dataset="cifar10/0.0.0",
            )
