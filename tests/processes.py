"""Start the processes of a run on this machine, and compare their results."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import jax
import pytest
from conftest import NOT_TIMES, REPOSITORY, assert_same_counts, read_metrics

CONFIG = """
from cifar_flax.config import Config, EvalConfig, TrainConfig
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig
from cifar_flax.training.optimizers import OptimConfig

def get_config():
    return Config(
        data=DataConfig(name="digits", pipeline="resident"),
        augment=AugmentConfig(flip="random", crop_padding=2),
        model=CNNConfig(width=4, hidden=16),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, schedule="cosine", weight_decay=0.01),
        train=TrainConfig(batch_size=128, epochs=3, log_every=4),
        eval=EvalConfig(batch_size=100),
    )
"""
TIMEOUT = 240  # seconds


def free_port(ports=(0,)):
    """Return the first free port among `ports`; 0 stands for any free port."""
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise OSError("no port is free")


def environment(**variables):
    """Return the environment of test processes: few XLA optimizations, a shared compilation cache."""
    ours = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "MPLBACKEND": "module://not_installed",  # as in a notebook, for whose processes it is set
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    return os.environ | ours | variables


def virtual_devices(count):
    """Return XLA_FLAGS for `count` CPU devices, in addition to the flags that are set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}".strip()}


def start(folder, *arguments, devices=1):
    """Start `main.py` with `devices` virtual CPU devices."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), *arguments],
        cwd=folder,
        env=environment(**virtual_devices(devices)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(folder, devices, *arguments):
    """Start the processes of one run; `devices` has the number of devices of each."""
    coordinator = f"--config.parallel.coordinator=127.0.0.1:{free_port()}"
    common = (*arguments, coordinator, f"--config.parallel.num_processes={len(devices)}")
    return [
        start(folder, *common, f"--config.parallel.process_id={number}", devices=count)
        for number, count in enumerate(devices)
    ]


def end(processes):
    """Wait for all processes, and kill those that do not end; return stdout and stderr of each."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        return [process.communicate(timeout=TIMEOUT) for process in processes]


def run(folder, devices, *arguments):
    """Run all processes of one run to success; return stdout of each."""
    processes = start_all(folder, devices, *arguments)
    printed = end(processes)
    assert [process.returncode for process in processes] == [0] * len(devices), printed
    return [out for out, _ in printed]


def reference(folder, devices, *arguments):
    """Train in one process with `devices` devices, in the workdir `one`."""
    process = start(folder, *arguments, "--workdir=one", devices=devices)
    ((_, err),) = end([process])
    assert process.returncode == 0, err


def assert_same_run(folder, one, other, rel=1e-5):
    records = [read_metrics(folder / name) for name in (one, other)]
    assert len(records[0]) == len(records[1])
    for ours, theirs in zip(*records, strict=True):
        for name in NOT_TIMES:
            # Sums over processes and over the devices of one process differ by rounding errors. These may change the
            # predicted class of one image: of 355 in the test split, or of at least 128 in a logged line.
            expected = theirs[name]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=rel, abs=1.01 / 128 if name == "accuracy" else 0)
            assert ours[name] == expected, (name, ours)
    results = [json.loads((folder / name / "eval.json").read_text()) for name in (one, other)]
    assert_same_counts(*(result["confusion_matrix"] for result in results))


def wait_for_checkpoint(workdir, processes):
    """Return as soon as `workdir` has a checkpoint."""
    while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.01)
