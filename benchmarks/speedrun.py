"""How accurate and how fast a config is over many seeds, by the rules of the CIFAR-10 speedruns.

    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50
    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50 --peer cifar10-airbench

With `--peer`, the PyTorch original in a checkout of KellerJordan/cifar10-airbench, or any script of its kind, has its
runs in turn with ours on the same machine.
"""

import time

STARTED = time.perf_counter()  # of the process, but for Python's own start

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import scipy.stats
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.arguments import at_least_one
from benchmarks.flops import forward_flops
from benchmarks.hardware import PEAKS, machine, measure_speed
from benchmarks.peers import original
from cifar_flax import allocator, cli, compilation, evaluate
from cifar_flax import config as configs
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.augment import VIEWS
from cifar_flax.errors import UserError, require
from cifar_flax.imports import installed
from cifar_flax.loop import run_calls
from cifar_flax.train import Trainer

RESULTS = Path(__file__).parent / "results"
TIMED = "first weights and whitening, the order of the examples, training with augmentation, the final evaluation"
NOT_TIMED = "start and imports of Python, reading the data (and, resident, its way to the device), compilation"

# config -> its original in a checkout of airbench
ORIGINALS = {
    "airbench94": "airbench94_muon.py",
    "airbench95": "legacy/airbench95.py",
    "airbench96": "legacy/airbench96.py",
}

Record = dict[str, Any]


class Runner:
    """A config, compiled once for any seed."""

    def __init__(self, config: Config):
        self.config = config
        self.trainer = Trainer(config)
        test = sources.load(config.data, config.data.eval_split)
        self._num_tests = len(test.labels)
        self._evaluator = evaluate.final_evaluator(config, self.trainer.task, test)
        self.num_images = self.trainer.total_steps * config.train.batch_size

    def compile(self) -> None:
        state = self.trainer.init(self.config.seed)
        self._train_call = self.trainer.compile(state)
        self._evaluator.compile(state)

    def run(self, seed: int) -> Record:
        start = time.perf_counter()
        inputs = self.trainer.inputs(seed, 0)
        state = self.trainer.init(seed)
        calls = self.trainer.calls(0, self.trainer.total_steps)
        state = run_calls(self._train_call, state, inputs, calls, lambda step, values: None)
        accuracy = self._evaluator(state).summary["accuracy"]  # on the host: the device has done all its work
        return {"seed": seed, "accuracy": accuracy, "seconds": time.perf_counter() - start}

    def flops(self) -> float:
        """Operations of a run: an image takes three times its forward pass in training, and one for each view after it.

        Where only images of which the network is unsure get several views, one view of each is counted.
        """
        info, settings = self.trainer.info, self.config.eval
        views = len(VIEWS[settings.tta]) if settings.tta_below is None else 1
        forward = forward_flops(self.config.model, info.image_shape, len(info.class_names))
        return forward * (3 * self.num_images + views * self._num_tests)


def compile_seconds(runner: Runner) -> Record:
    """To trace and compile all programs, with an empty cache and with one that holds them."""
    kept = jax.config.jax_compilation_cache_dir
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for cache in ("cold", "warm"):
            compilation_cache.reset_cache()
            jax.clear_caches()
            start = time.perf_counter()
            runner.compile()
            seconds[cache] = time.perf_counter() - start
        jax.config.update("jax_compilation_cache_dir", kept)
        compilation_cache.reset_cache()
    return seconds


def mean_of(values: list[float]) -> Record:
    """Mean, standard deviation and, by Student's t, half of the mean's 95 % interval; None where there is one value."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return {"mean": mean, "deviation": None, "interval": None}
    deviation = statistics.stdev(values)
    interval = float(scipy.stats.t.ppf(0.975, count - 1)) * deviation / count**0.5
    return {"mean": mean, "deviation": deviation, "interval": interval}


def summary_of(trials: list[Record]) -> Record:
    return {"trials": trials} | {name: mean_of([trial[name] for trial in trials]) for name in ("accuracy", "seconds")}


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that is known before the first run."""

    config_file: str
    config: Config
    num_images: int
    flops: float  # of a run
    peak: float  # operations per second
    peak_is: str
    compile_seconds: Record

    def result(self, ours: list[Record], theirs: list[Record], script: Path | None) -> Record:
        summary = summary_of(ours)
        seconds = summary["seconds"]["mean"]
        result = {
            "config_file": self.config_file,
            "machine": machine() | {"device": jax.devices()[0].device_kind, "devices": jax.device_count()},
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
            "timed": TIMED,
            "not_timed": NOT_TIMED,
            "process_seconds": time.perf_counter() - STARTED,
            "compile_seconds": self.compile_seconds,
            "images_per_second": self.num_images / seconds,
            "flops": self.flops,
            "flops_per_second": self.flops / seconds,
            "peak_flops_per_second": self.peak,
            "peak_is": self.peak_is,
            "ours": summary,
        }
        if script is not None and theirs:
            result["peer"] = {"script": script.name} | summary_of(theirs)
            pairs = zip(ours, theirs, strict=True)
            result["time_ratio"] = statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs)
        return result | {"config": configs.to_dict(self.config)}


def measure(config: Config, config_file: str, trials: int, script: Path | None, out: Path) -> Record:
    """Prints each run; writes the result to `out` after each, so that none is lost."""
    runner = Runner(config)
    times = compile_seconds(runner)
    device = jax.devices()[0].device_kind
    peak, peak_is = PEAKS.get(device, 0.0), f"the bfloat16 peak of {device}"
    if not peak:
        peak, peak_is = measure_speed().flops, "the speed of a float32 matrix product here"
    known = Measurement(config_file, config, runner.num_images, runner.flops(), peak, peak_is, times)
    if jax.default_backend() != "cpu":
        runner.run(config.seed)  # a program's first run on an accelerator loads libraries and takes memory
    ours: list[Record] = []
    theirs: list[Record] = []
    with ExitStack() as stack:
        if script is not None:
            splits = {split: sources.load(config.data, split) for split in ("train", "test")}
            peer = stack.enter_context(original.start(script, splits))
        for number in range(trials):
            ours.append(runner.run(config.seed + number))
            print(f"seed {config.seed + number}: {shown(ours[-1])}", flush=True)
            if script is not None:
                theirs.append(peer.run())
                print(f"{script.name}: {shown(theirs[-1])}", flush=True)
            result = known.result(ours, theirs, script)
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def shown(trial: Record) -> str:
    return f"{trial['accuracy']:.2%} in {trial['seconds']:.3f} s"


def report(result: Record) -> str:
    times = result["compile_seconds"]
    share = result["flops_per_second"] / result["peak_flops_per_second"]
    lines = [
        f"{result['config_file']} on {result['machine']['device']}",
        f"  timed        {result['timed']}",
        f"  not timed    {result['not_timed']}",
        *figures(result["ours"]),
        f"  training     {result['images_per_second']:,.0f} images/s, over all that is timed",
        f"  operations   {result['flops'] / 1e15:.3f} PFLOP a run, {result['flops_per_second'] / 1e12:,.3f} TFLOP/s",
        f"               {share:.1%} of {result['peak_is']}",
        f"  compilation  {times['cold']:.1f} s, with a warm cache {times['warm']:.1f} s",
        f"  process      {result['process_seconds']:.1f} s from its start",
    ]
    if "peer" in result:
        lines += [f"{result['peer']['script']}, in turn with it", *figures(result["peer"])]
        lines.append(f"  ratio        {result['time_ratio']:.3f}: our time over its time, median of the pairs")
    return "\n".join(lines)


def figures(summary: Record) -> list[str]:
    lines = [f"  runs         {len(summary['trials'])}"]
    for name, scale, unit in (("accuracy", 100, "%"), ("seconds", 1, "s")):
        mean, deviation, interval = (summary[name][key] for key in ("mean", "deviation", "interval"))
        line = f"  {name:11}  {mean * scale:.3f} {unit}"
        if deviation is not None:
            line += f" ± {interval * scale:.3f} (95 % interval), standard deviation {deviation * scale:.3f}"
        lines.append(line)
    return lines


def original_of(path: Path, config_name: str) -> Path:
    """The script to run in turn with the config; raises `ConfigError` where there is none."""
    require(installed("torch"), "--peer", str(path), "needs PyTorch, which is not installed")
    if path.is_dir():
        known = f"is a folder: name a script in it (known for {', '.join(ORIGINALS)})"
        require(config_name in ORIGINALS, "--peer", str(path), known)
        path = path / ORIGINALS[config_name]
    require(path.is_file(), "--peer", str(path), "no such file")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card's memory is for both
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE changes a field of it")
    parser.add_argument("--trials", type=at_least_one, default=10, help="seeds, from the config's on (default: 10)")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="a checkout of airbench, or a script of its kind")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args, overrides = parser.parse_known_args()
    allocator.keep_freed_memory()
    compilation.keep_programs()
    try:
        config = cli.parse(["--config", args.config, *overrides], ("train",)).config
        script = None if args.peer is None else original_of(args.peer, Path(args.config).stem)
        device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
        out = args.out or RESULTS / f"speedrun_{Path(args.config).stem}_{device}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        result = measure(config, args.config, args.trials, script, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # the peer's process ended, a folder cannot be written to
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(result))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
