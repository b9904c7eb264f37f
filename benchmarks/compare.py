"""Compare this project with PyTorch and Keras: the same networks, batch sizes and optimizers on one machine.

    python -m benchmarks.compare --rounds 5 --out benchmarks/results/compare.json
    python -m benchmarks.compare --accuracy --rounds 1

Each measurement runs in its own process, and every round measures each runner once. Ratios are computed within a round,
so that other load on the machine affects both runners.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.arguments import at_least_one
from benchmarks.hardware import machine
from cifar_flax.runtime import allocator

OURS = "this project"
# name -> (module of benchmarks.baselines, environment)
RUNNERS: dict[str, tuple[str, dict[str, str]]] = {
    OURS: ("ours", allocator.SETTINGS),  # main.py sets them too
    "PyTorch": ("pytorch", {}),
    "PyTorch, our allocator settings": ("pytorch", allocator.SETTINGS),
    "PyTorch, torch.compile": ("pytorch", {"COMPILE": "1"}),
    "Keras on TensorFlow": ("keras_", {"KERAS_BACKEND": "tensorflow"}),
    "Keras on JAX": ("keras_", {"KERAS_BACKEND": "jax"}),
}
SPEED = {"cnn": (128, 512), "airbench": (256, 1024, 2000)}  # network -> batch sizes
RATES = ("train_images_per_second", "evaluate_images_per_second")

Measurement = dict[str, Any]


def measure(runner: str, folder: str, task: str, seconds: float) -> Measurement:
    """Measure `runner` in a new process; if it fails, return the last line of its stderr as "error"."""
    module, environment = RUNNERS[runner]
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
        "STARTED": str(time.time()),
    } | environment
    command = [sys.executable, "-m", "benchmarks.runner", module, folder, task, str(seconds)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(job: str, folder: str, task: str, runners: list[str], rounds: int, seconds: float) -> list[Measurement]:
    """Measure each of `runners` once per round; skip a runner that has failed in the later rounds."""
    measurements, left = [], list(runners)
    for number in range(rounds):
        for runner in list(left):
            result = measure(runner, folder, task, seconds)
            measurements.append({"job": job, "round": number, "runner": runner} | result)
            print(f"{job}, round {number}, {runner}: {result}", file=sys.stderr)
            if "error" in result:
                left.remove(runner)
    return measurements


def tables(measurements: list[Measurement]) -> str:
    """Return one Markdown table per job; ratios above 1 mean that this project is faster."""
    lines = []
    for job in dict.fromkeys(measurement["job"] for measurement in measurements):
        of_job = [one for one in measurements if one["job"] == job and "error" not in one]
        table = accuracy_table if any("accuracy_per_epoch" in measurement for measurement in of_job) else speed_table
        lines += ["", f"**{job}**", "", *table(of_job)]
    return "\n".join(lines)


def accuracy_table(measurements: list[Measurement]) -> list[str]:
    lines = ["| | seconds to 73 % | epochs |", "|---|---|---|"]
    for measurement in measurements:
        seconds = measurement["seconds_to_73_percent"]
        shown = "not reached" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {measurement['runner']} | {shown} | {len(measurement['accuracy_per_epoch'])} |")
    return lines


def speed_table(measurements: list[Measurement]) -> list[str]:
    lines = [
        "| | training, images/s | ratio | evaluation, images/s | ratio | first step, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    by_round = {(measurement["runner"], measurement["round"]): measurement for measurement in measurements}
    for runner in dict.fromkeys(measurement["runner"] for measurement in measurements):
        mine = [measurement for measurement in measurements if measurement["runner"] == runner]
        cells = [runner]
        for rate in RATES:
            cells.append(spread([measurement[rate] for measurement in mine], "{:,.0f}"))
            pairs = [(by_round.get((OURS, measurement["round"])), measurement) for measurement in mine]
            cells.append(spread([ours[rate] / theirs[rate] for ours, theirs in pairs if ours], "{:.2f}"))
        for metric, form in (("seconds_to_first_step", "{:.1f}"), ("peak_memory_mib", "{:,.0f}")):
            cells.append(form.format(statistics.median(measurement[metric] for measurement in mine)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """Return "median (minimum to maximum)"."""
    if not values:
        return ""
    median, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="training time per measurement (default: 15)")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--networks", nargs="+", choices=("cnn", "airbench"), default=["cnn", "airbench"])
    parser.add_argument("--accuracy", action="store_true", help="measure the time to 73 %% accuracy instead")
    parser.add_argument("--out", type=Path, help="JSON file to write all measurements to")
    args = parser.parse_args()
    jobs: dict[str, Callable[[Path], None]] = {"time to 73 %": workload.write_accuracy}
    if not args.accuracy:
        jobs = {
            f"{network}, batch {size}": partial(workload.write_speed, network=network, batch_size=size)
            for network in args.networks
            for size in SPEED[network]
        }
    measurements = []
    for job, write in jobs.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            task = "accuracy" if args.accuracy else "speed"
            measurements += compare(job, folder, task, args.runners, args.rounds, args.seconds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "measurements": measurements}, indent=1) + "\n")
    print(json.dumps(machine()))
    print(tables(measurements))


if __name__ == "__main__":
    main()
