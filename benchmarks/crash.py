"""Kill runs at random moments, restart them, and compare their results with an uninterrupted run.

    python -m benchmarks.crash --runs 200

Each run is killed one to three times. Its results must be bitwise equal to those of the uninterrupted run: parameters,
batch statistics, optimizer state, eval.json and every line of metrics.jsonl (except times and rates). No restart may
resume before the newest checkpoint. Everything except the timing of the machine is a function of the seed.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.arguments import at_least_one
from cifar_flax import arguments
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.checkpoints.metadata import saved_steps
from cifar_flax.files import write_json
from cifar_flax.training.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent
# A small network on the digits dataset; the settings use every part of the training state.
ARGUMENTS = (
    f"--config={REPOSITORY / 'configs' / 'quickstart.py'}",
    "--config.train.epochs=4",
    "--config.model.width=8",
    "--config.model.hidden=128",
    "--config.data.validation_fraction=0.1",
    "--config.checkpoint.keep_best=1",
    "--config.averaging.name=ema",
)
TIMES = ("images_per_second", "input_wait_fraction", "checkpoint_blocked_seconds")
TIMEOUT = 300  # seconds
POLL = 0.002  # seconds

# A signal is sent at any time, or up to SOON seconds after the event becomes visible in the run's folder.
MOMENTS = ("any time", "a save", "an evaluation", "the end of training")
SOON = 0.08


@dataclass(slots=True)
class Outcome:
    """Outcome of one interrupted run."""

    signals: list[tuple[str, str]] = field(default_factory=list)  # (moment, name) pairs
    starts: int = 0  # number of starts of main.py
    fell_back: int = 0  # number of starts that found a damaged checkpoint
    lost: list[str] = field(default_factory=list)  # descriptions of lost steps and of differences


@dataclass(frozen=True, slots=True)
class Reference:
    """The uninterrupted run that all others are compared with."""

    trainer: Trainer
    seconds: float  # from start to end, with a warm compilation cache
    content: dict[str, Any]  # return value of `content`


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "main.py"), *ARGUMENTS, f"--workdir={folder / 'run'}"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache"), "JAX_PLATFORMS": "cpu"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def reference(folder: Path) -> Reference:
    trainer = Trainer(arguments.parse(ARGUMENTS).config)
    for name in ("compiles", "uninterrupted"):
        (folder / name).mkdir()
        begin = time.monotonic()
        if start(folder / name).wait(TIMEOUT):
            raise SystemExit((folder / name / "log.txt").read_text())
    seconds = time.monotonic() - begin
    return Reference(trainer, seconds, content(folder / "uninterrupted" / "run", trainer))


def content(workdir: Path, trainer: Trainer) -> dict[str, Any]:
    """Return the results that must be equal to those of the uninterrupted run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with Checkpoints(workdir / "checkpoints", trainer.config.checkpoint) as checkpoints:
        state = checkpoints.restore(trainer.total_steps, trainer.initial_state)
    return {
        "state": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)],
        "metrics.jsonl": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "eval.json": (workdir / "eval.json").read_bytes(),
        "set of checkpoints": saved_steps(workdir / "checkpoints"),
        "set of files": {path.name for path in workdir.iterdir()},
    }


def wait_for(process: subprocess.Popen, workdir: Path, moment: str, delay: float, last_step: int) -> bool:
    """Wait until `delay` seconds after `moment`; return False if the process ends first."""
    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"

    def lines() -> list[str]:
        return metrics.read_text().splitlines() if metrics.exists() else []

    known = len(lines())
    has_come = {
        "any time": lambda: True,
        "a save": lambda: any(folder.glob("*.unfinished")),
        # The last line holds the metrics of training steps: those of the evaluation are not written yet.
        "an evaluation": lambda: len(lines()) > known and '"train"' in lines()[-1],
        "the end of training": lambda: any(folder.glob(f"{last_step}*")),
    }[moment]
    end = math.inf
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if end == math.inf and has_come():
            end = time.monotonic() + delay
        time.sleep(POLL)
    return True


def crash(number: int, seed: int, folder: Path, uninterrupted: Reference) -> Outcome:
    """Interrupt one run, restart it, and compare its results with `uninterrupted`."""
    rng, outcome, workdir = random.Random(f"{seed} {number}"), Outcome(), folder / "run"
    folder.mkdir()
    for left in range(rng.randint(1, 3), -1, -1):
        newest = max(saved_steps(workdir / "checkpoints"), default=0)
        log_size = (folder / "log.txt").stat().st_size if outcome.starts else 0
        moment, sent = rng.choice(MOMENTS), rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        delay = rng.uniform(0, uninterrupted.seconds if moment == "any time" else SOON)
        process = start(folder)
        outcome.starts += 1
        if left and wait_for(process, workdir, moment, delay, uninterrupted.trainer.total_steps):
            process.send_signal(sent)
            outcome.signals.append((moment, sent.name))
        code = process.wait(TIMEOUT)
        log = (folder / "log.txt").read_text()[log_size:]
        outcome.fell_back += "is damaged" in log
        resumed = re.search(r"resuming from step (\d+)|is finished: (\d+)", log)
        first = int(resumed[1] or resumed[2]) if resumed else 0 if re.search(r"images, \d+ steps", log) else newest
        if first < newest:
            outcome.lost.append(f"resumed at step {first} instead of {newest}")
        if code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            outcome.lost.append(f"exit code {code}: {log[-300:]}")
        if code == 0:
            break
    if code == 0:
        ours = content(workdir, uninterrupted.trainer)
        outcome.lost += [f"different {name}" for name, value in uninterrupted.content.items() if ours[name] != value]
    else:
        outcome.lost.append(f"did not finish: exit code {code}")
    return outcome


def table(outcomes: list[Outcome]) -> str:
    sent = Counter(one for outcome in outcomes for one in outcome.signals)
    lines = ["| moment of the signal | SIGKILL | SIGTERM |", "|---|---|---|"]
    for moment in MOMENTS:
        lines.append(f"| {moment} | {sent[moment, 'SIGKILL']} | {sent[moment, 'SIGTERM']} |")
    total = [sum(count for (_, name), count in sent.items() if name == of) for of in ("SIGKILL", "SIGTERM")]
    lines += [f"| all | {total[0]} | {total[1]} |", "", "| runs | |", "|---|---|"]
    equal = sum(not outcome.lost for outcome in outcomes)
    lines += [
        f"| interrupted, restarted, compared | {len(outcomes)} |",
        f"| bitwise equal to the uninterrupted run | {equal} |",
        f"| found a damaged checkpoint and fell back | {sum(outcome.fell_back > 0 for outcome in outcomes)} |",
        f"| lost anything | {len(outcomes) - equal} |",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=at_least_one, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=at_least_one, default=1, help="concurrent runs (default: 1)")
    parser.add_argument("--out", type=Path, help="JSON file to write the outcomes to")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        uninterrupted = reference(folder)
        print(f"an uninterrupted run takes {uninterrupted.seconds:.1f} s", flush=True)
        futures = [pool.submit(crash, i, args.seed, folder / str(i), uninterrupted) for i in range(args.runs)]
        for number, future in enumerate(futures):
            outcomes.append(future.result())
            signals = ", ".join(f"{name} at {moment}" for moment, name in outcomes[-1].signals) or "no signal sent"
            print(f"{number}: {signals}: {'; '.join(outcomes[-1].lost) or 'equal'}", flush=True)
    print(f"\n{table(outcomes)}")
    if args.out:
        versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
        command = f"python -m benchmarks.crash --runs {args.runs} --seed {args.seed} --jobs {args.jobs}"
        write_json(args.out, {"command": command, **versions, "runs": [asdict(outcome) for outcome in outcomes]})
    return int(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
