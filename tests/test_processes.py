"""Test runs with several processes on this machine."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest
from conftest import FILES, assert_same_counts, needs_tensorflow
from processes import CONFIG, assert_same_run, end, free_port, reference, run, start, start_all, wait_for_checkpoint

from cifar_flax.arguments import parse
from cifar_flax.data import cache
from cifar_flax.modes import evaluate


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def test_two_processes_train_like_one(folder):
    reference(folder, 2, "--config", "config.py")
    first, second = run(folder, [1, 1], "--config", "config.py", "--workdir=two")
    assert_same_run(folder, "one", "two")
    host = re.escape(socket.gethostname())
    for number, out in enumerate((first, second)):
        lines = [line for line in out.splitlines() if "Gloo" not in line]
        assert lines[0] == f"[process {number} of 2, {socket.gethostname()}] 1 of 2 devices"
        assert len(lines) == 1 if number else re.match(rf"\[process 0 of 2, {host}\] digits: 1442 images", lines[1])
    assert first.count("test loss") == 3
    assert {path.name for path in (folder / "two").iterdir()} == FILES
    assert len(list((folder / "two" / "tensorboard").glob("events*"))) == 1  # only one process writes them

    # Evaluate with two processes, then with one: the number may differ from that in training.
    result = (folder / "two" / "eval.json").read_bytes()
    (folder / "two" / "eval.json").unlink()
    run(folder, [1, 1], "--mode=eval", "--workdir=two")
    assert (folder / "two" / "eval.json").read_bytes() == result
    command = parse(["--mode=eval", f"--workdir={folder / 'two'}"])
    one, two = json.loads(result), evaluate.evaluate(command.config, command.workdir)
    assert_same_counts(one["confusion_matrix"], two["confusion_matrix"])


@pytest.mark.slow
def test_two_processes_resume_a_killed_run_of_four(folder):
    """Kill one of four processes: the others end with an error within a minute. Two resume from the checkpoint."""
    # With a low learning rate, runs on two and on four devices differ only by small rounding errors after 136 steps.
    arguments = ("--config", "config.py", "--config.train.epochs=12", "--config.optim.learning_rate=1e-4")
    reference(folder, 2, *arguments)
    processes = start_all(folder, [1] * 4, *arguments, "--workdir=four")
    wait_for_checkpoint(folder / "four", processes)
    processes[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = [process.wait(timeout=60) for process in processes]
    assert time.monotonic() - killed < 60
    assert codes[2] == -signal.SIGKILL
    assert all(code != 0 for code in codes)
    end(processes)
    first, _ = run(folder, [1, 1], *arguments, "--workdir=four")
    assert re.search(r"resuming from step \d+ of 136, on 2 x cpu", first)
    assert_same_run(folder, "one", "four", rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--config.parallel.backend=jit", "--config.data.pipeline=streaming"), marks=needs_tensorflow),
        ("--config.train.sync_batchnorm=False", "--config.data.drop_last=True", "--config.train.steps_per_call=11"),
    ],
    ids=["jit, streaming", "batch statistics per device, loops"],
)
def test_two_processes_of_two_devices_train_like_one_of_four(folder, arguments):
    """The evaluation includes test-time augmentation of the images with the lowest confidence."""
    common = ("--config.eval.tta=mirror", "--config.eval.tta_fraction=0.5", "--config.train.log_every=11")
    arguments = ("--config", "config.py", *common, *arguments)
    reference(folder, 4, *arguments)
    run(folder, [2, 2], *arguments, "--workdir=two")
    assert_same_run(folder, "one", "two")


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(folder):
    """A stopped process closes no connection: the other one ends because its heartbeats are missing."""
    arguments = ("--config", "config.py", "--workdir=two", "--config.train.epochs=100")
    processes = start_all(folder, [1, 1], *arguments, "--config.parallel.heartbeat_timeout_seconds=10")
    wait_for_checkpoint(folder / "two", processes)
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert processes[0].wait(timeout=60) != 0
    assert time.monotonic() - stopped < 40
    processes[1].kill()
    (_, err), _ = end(processes)
    assert "another task died" in err


def test_processes_with_different_configs_are_refused(folder):
    coordinator = f"--config.parallel.coordinator=127.0.0.1:{free_port()}"
    common = ("--config", "config.py", "--workdir=run", coordinator, "--config.parallel.num_processes=2")
    processes = [
        start(folder, *common, f"--config.parallel.process_id={number}", f"--config.optim.learning_rate=0.0{number}1")
        for number in range(2)
    ]
    printed = end(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for number, (_, err) in enumerate(printed):
        label, _, message = err.splitlines()[0].partition(" error: ")
        assert label == f"[process {number} of 2, {socket.gethostname()}]"
        assert re.search(r"process 1\b.*\bconfig\b", message)
    assert not (folder / "run").exists()


def test_pmap_with_several_processes_is_refused(folder):
    arguments = ("--config", "config.py", "--workdir=run", "--config.parallel.backend=pmap")
    processes = start_all(folder, [1, 1], *arguments)
    for _, err in end(processes):
        assert "parallel.backend='pmap': " in err
    assert [process.returncode for process in processes] == [2, 2]


def test_processes_with_different_numbers_of_devices_are_refused(folder):
    processes = start_all(folder, [2, 1], "--config", "config.py", "--workdir=run")
    for _, err in end(processes):
        assert re.search(r"error: .*\bdevices\b.* 2, 1", err)
    assert [process.returncode for process in processes] == [1, 1]


def test_the_workdir_must_be_shared(folder):
    """Start two processes with different folders under the same name, as on hosts without a shared file system."""
    coordinator, processes = f"--config.parallel.coordinator=127.0.0.1:{free_port()}", []
    for number in range(2):
        (folder / f"host{number}").mkdir()
        common = ("--config", str(folder / "config.py"), coordinator, "--config.parallel.num_processes=2")
        processes.append(start(folder / f"host{number}", *common, f"--config.parallel.process_id={number}"))
    (_, first), (_, second) = end(processes)
    assert re.search(r"error: --workdir=.*\bprocess", second)
    assert "another process" in first
    assert all(process.returncode != 0 for process in processes)


def test_processes_with_different_data_are_refused(folder):
    """Start two processes with different cache folders; the last test label differs."""
    for host in range(2):
        for split in ("train", "test"):
            labels = np.arange(128, dtype=np.int32) % 2
            labels[-1] ^= host if split == "test" else 0
            cache.store(
                folder / f"cache{host}" / "squares" / "1.0.0" / split,
                [(np.zeros((128, 32, 32, 3), np.uint8), labels)],
                num_examples=128,
                image_shape=(32, 32, 3),
                class_names=("even", "odd"),
                dataset="squares/1.0.0",
            )
    coordinator = f"--config.parallel.coordinator=127.0.0.1:{free_port()}"
    common = ("--config", "config.py", "--workdir=run", "--config.data.name=squares", coordinator)
    common += ("--config.parallel.num_processes=2",)
    processes = [
        start(folder, *common, f"--config.data.cache_dir=cache{host}", f"--config.parallel.process_id={host}")
        for host in range(2)
    ]
    for _, err in end(processes):
        assert re.search(r"error: process 1\b.*\bdata\b", err)
    assert [process.returncode for process in processes] == [1, 1]
