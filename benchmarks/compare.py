"""This project beside Keras and PyTorch: the same networks, batch sizes and optimizers, alternating on one machine.

    python -m benchmarks.compare --rounds 5 --out benchmarks/results/compare.json
    python -m benchmarks.compare --accuracy --rounds 1

Each measurement is a process of its own; in every round each contestant has its turn. Ratios are taken round by round:
what else the machine did meets both sides of them.
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

from benchmarks import setting
from benchmarks.arguments import at_least_one
from benchmarks.hardware import machine
from cifar_flax import allocator

OURS = "this project"
# name -> (module of benchmarks.peers, environment)
CONTESTANTS: dict[str, tuple[str, dict[str, str]]] = {
    OURS: ("ours", allocator.SETTINGS),  # as main.py sets them
    "PyTorch": ("pytorch", {}),
    "PyTorch, our allocator settings": ("pytorch", allocator.SETTINGS),
    "PyTorch, torch.compile": ("pytorch", {"COMPILE": "1"}),
    "Keras on TensorFlow": ("keras_", {"KERAS_BACKEND": "tensorflow"}),
    "Keras on JAX": ("keras_", {"KERAS_BACKEND": "jax"}),
}
SPEED = {"cnn": (128, 512), "airbench": (256, 1024)}  # network -> batch sizes
RATES = ("train_images_per_second", "evaluate_images_per_second")

Record = dict[str, Any]


def measure(contestant: str, folder: str, task: str, seconds: float) -> Record:
    """What the contestant's process says; `error` where it could not."""
    module, environment = CONTESTANTS[contestant]
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
        "STARTED": str(time.time()),
    } | environment
    command = [sys.executable, "-m", "benchmarks.contestant", module, folder, task, str(seconds)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(job: str, folder: str, task: str, contestants: list[str], rounds: int, seconds: float) -> list[Record]:
    """In turn, as often as `rounds`; who fails once is left out from then on."""
    records, left = [], list(contestants)
    for number in range(rounds):
        for contestant in list(left):
            result = measure(contestant, folder, task, seconds)
            records.append({"job": job, "round": number, "contestant": contestant} | result)
            print(f"{job}, round {number}, {contestant}: {result}", file=sys.stderr)
            if "error" in result:
                left.remove(contestant)
    return records


def tables(records: list[Record]) -> str:
    """A table for each job; ratios above 1 mean that this project is faster."""
    lines = []
    for job in dict.fromkeys(record["job"] for record in records):
        here = [record for record in records if record["job"] == job and "error" not in record]
        table = accuracy_table if any("accuracy_per_epoch" in record for record in here) else speed_table
        lines += ["", f"**{job}**", "", *table(here)]
    return "\n".join(lines)


def accuracy_table(records: list[Record]) -> list[str]:
    lines = ["| | seconds to 73 % | epochs |", "|---|---|---|"]
    for record in records:
        seconds = record["seconds_to_73_percent"]
        shown = "not reached" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {record['contestant']} | {shown} | {len(record['accuracy_per_epoch'])} |")
    return lines


def speed_table(records: list[Record]) -> list[str]:
    lines = [
        "| | training, images/s | ratio | evaluation, images/s | ratio | first step, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    by_round = {(record["contestant"], record["round"]): record for record in records}
    for contestant in dict.fromkeys(record["contestant"] for record in records):
        mine = [record for record in records if record["contestant"] == contestant]
        cells = [contestant]
        for rate in RATES:
            cells.append(spread([record[rate] for record in mine], "{:,.0f}"))
            pairs = [(by_round.get((OURS, record["round"])), record) for record in mine]
            cells.append(spread([ours[rate] / theirs[rate] for ours, theirs in pairs if ours], "{:.2f}"))
        for figure, form in (("seconds_to_first_step", "{:.1f}"), ("peak_memory_mib", "{:,.0f}")):
            cells.append(form.format(statistics.median(record[figure] for record in mine)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """Median (least to most)."""
    if not values:
        return ""
    median, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of training per measurement")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--networks", nargs="+", choices=("cnn", "airbench"), default=["cnn", "airbench"])
    parser.add_argument("--accuracy", action="store_true", help="time to 73 %% on CIFAR-10 instead of speed")
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    args = parser.parse_args()
    jobs: dict[str, Callable[[Path], None]] = {"time to 73 %": setting.write_accuracy}
    if not args.accuracy:
        jobs = {
            f"{network}, batch {size}": partial(setting.write_speed, network=network, batch_size=size)
            for network in args.networks
            for size in SPEED[network]
        }
    records = []
    for job, write in jobs.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            task = "accuracy" if args.accuracy else "speed"
            records += compare(job, folder, task, args.contestants, args.rounds, args.seconds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    print(json.dumps(machine()))
    print(tables(records))


if __name__ == "__main__":
    main()
