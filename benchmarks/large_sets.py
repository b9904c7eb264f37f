"""Measure memory, start, resume and input rate of runs on a small and on a large set of random images.

    python -m benchmarks.large_sets --folder /tmp/large --images 2000000

Each run is `main.py` with the same config; a signal stops it in its middle, and the same command resumes it. Memory is
the peak of RssAnon, which leaves out the memory-mapped images. The folder keeps the images, 3 KB each.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import at_least_one
from cifar_flax.data import cache, sources, streaming
from cifar_flax.data.batches import to_device
from cifar_flax.data.config import DataConfig
from cifar_flax.runtime import allocator

REPOSITORY = Path(__file__).parent.parent
GATHERED_BY = ("tf.data", "NumPy")
BATCH = 256
TEST_IMAGES = 10_000
STEPS = 200
INPUT_STEPS = 300  # per timed chunk; the median of several is reported
CHUNKS = 7
POLL_SECONDS = 0.02
_WITHOUT_TENSORFLOW = "import sys; sys.modules['tensorflow'] = None; from cifar_flax import cli; cli.entry_point()"


def random_set(folder: Path, count: int) -> DataConfig:
    """Return the data config of `count` random training images in the cache `folder`, which are written if missing."""
    config = DataConfig(name=f"random{count}", cache_dir=str(folder))
    for number, (split, size) in enumerate((("train", count), ("test", TEST_IMAGES))):
        target = sources.cache_folder(config, split, "1.0.0")
        if not target.exists():
            images, names = _random_images(np.random.default_rng(number), size), tuple("0123456789")
            cache.store(target, images, image_shape=(32, 32, 3), class_names=names, dataset=f"{config.name}/1.0.0")
    return config


def _random_images(rng: np.random.Generator, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        yield rng.integers(0, 256, (size, 32, 32, 3), np.uint8), rng.integers(0, 10, size, np.int32)


def run(data: DataConfig, count: int, gathered_by: str, workdir: Path, overrides: list[str]) -> dict[str, float]:
    """Run the default config for `STEPS` steps, stopped and resumed in the middle."""
    program = ["main.py"] if gathered_by == "tf.data" else ["-c", _WITHOUT_TENSORFLOW]
    settings = f"data.name={data.name} data.cache_dir={data.cache_dir} data.pipeline=streaming optim.warmup_epochs=0 "
    settings += f"train.batch_size={BATCH} train.epochs={STEPS * BATCH / count} train.log_every=1"
    flags = [f"--config.{setting}" for setting in settings.split()]
    command = [sys.executable, *program, "--config", "configs/default.py", f"--workdir={workdir}", *flags, *overrides]
    first, peak = _start(command, workdir / "metrics.jsonl", stop_at=STEPS // 2)
    again, later = _start(command, workdir / "metrics.jsonl", stop_at=sys.maxsize)
    return {"start_seconds": first, "resume_seconds": again, "peak_anonymous_mb": max(peak, later)}


def _start(command: list[str], metrics: Path, stop_at: int) -> tuple[float, float]:
    """Run `command`, up to step `stop_at`; return the seconds to its first step and the peak of RssAnon in MB."""
    before, begin, first, peak = _lines(metrics), time.perf_counter(), 0.0, 0.0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        while process.poll() is None:
            done = _lines(metrics)
            if done > before and not first:
                first = time.perf_counter() - begin
            if done >= stop_at:
                process.send_signal(signal.SIGTERM)
                stop_at = sys.maxsize
            with suppress(OSError, IndexError):  # the process has ended
                anonymous = Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1]
                peak = max(peak, int(anonymous.split()[0]) / 1e3)
            time.sleep(POLL_SECONDS)
        if process.returncode not in (0, 128 + signal.SIGTERM):
            log.seek(0)
            raise SystemExit(f"a run failed:\n{log.read()}")
    return first, peak


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def input_rate(data: DataConfig, gathered_by: str) -> float:
    """Return the images per second that arrive on the device, without training."""
    arrays = sources.load(data, "train")
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    if gathered_by == "NumPy":
        streaming.tensorflow_fault = lambda: "not used"
    stop = (CHUNKS + 1) * INPUT_STEPS
    source = streaming.training_batches(arrays, examples, batch_size=BATCH, seed=0, start=0, stop=stop)
    batches, rates = to_device(source), []
    for _ in range(CHUNKS + 1):  # the first includes the start
        begin = time.perf_counter()
        for batch in itertools.islice(batches, INPUT_STEPS):
            batch.image.block_until_ready()
        rates.append(INPUT_STEPS * BATCH / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def measure(folder: Path, counts: list[int], overrides: list[str]) -> list[dict[str, Any]]:
    """Return the measurements of sets of `counts` images, with `tf.data` and with NumPy."""
    rows: list[dict[str, Any]] = []
    for gathered_by, count in itertools.product(GATHERED_BY, counts):
        data = random_set(folder, count)
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            row = run(data, count, gathered_by, Path(workdir) / "run", overrides)
        rate = [sys.executable, "-m", "benchmarks.large_sets", "--folder", str(folder), f"--images={count}"]
        out = subprocess.run([*rate, f"--rate={gathered_by}"], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
        rows.append({"gathered_by": gathered_by, "images": count, **row, "input_images_per_second": float(out.stdout)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the random images")
    parser.add_argument("--images", type=at_least_one, default=2_000_000, help="in the large set (default: 2000000)")
    parser.add_argument("--small", type=at_least_one, default=60_000, help="in the small set (default: 60000)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rate", choices=GATHERED_BY, help="only print the input rate of the large set")
    args, overrides = parser.parse_known_args()
    if args.rate:
        allocator.keep_freed_memory()
        print(input_rate(random_set(args.folder, args.images), args.rate))
        return
    os.environ["TFDS_DATA_DIR"] = str(args.folder / "none")  # so that the cache is used
    rows = measure(args.folder.absolute(), [args.small, args.images], overrides)
    print("| gathered by | images | start, s | resume, s | peak anonymous memory, MB | input, images/s |")
    print("|---|---|---|---|---|---|")
    for by, images, start, resume, memory, rate in (row.values() for row in rows):
        print(f"| {by} | {images:,} | {start:.1f} | {resume:.1f} | {memory:,.0f} | {rate:,.0f} |")
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
