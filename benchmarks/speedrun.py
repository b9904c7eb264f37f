"""Measure accuracy and training time of a config over many seeds, by the rules of the CIFAR-10 speedruns.

    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50
    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50 --peer cifar10-airbench

With `--peer`, the original PyTorch script in a checkout of KellerJordan/cifar10-airbench (or similar scripts) runs
alternately with this project on the same machine.
"""

import time

STARTED = time.perf_counter()  # start of the process, without Python's own start-up

from cifar_flax.runtime import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # re-executes this module, so it comes before the slow imports

import argparse
import functools
import itertools
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import runs
from benchmarks.arguments import at_least_one
from benchmarks.baselines import original
from benchmarks.runs import Measurement
from cifar_flax import arguments
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.errors import ConfigError, UserError, require
from cifar_flax.files import write_json
from cifar_flax.packages import has_module
from cifar_flax.runtime import compilation
from cifar_flax.training.evaluator import final_evaluator
from cifar_flax.training.loop import run_calls
from cifar_flax.training.operations import run_flops
from cifar_flax.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
# config -> script in a checkout of airbench for the same accuracy, not always with the same recipe
ORIGINALS = {
    "airbench94": "airbench94_muon.py",
    "airbench94_muon": "airbench94_muon.py",
    "airbench94_wide": "airbench94_muon.py",
    "airbench95": "legacy/airbench95.py",
    "airbench96": "legacy/airbench96.py",
}


class Speedrun:
    """The training and evaluation of a config, compiled once for all seeds by `compile`."""

    def __init__(self, config: Config, devices: Sequence[jax.Device] | None = None):
        self._config = config
        self._trainer = Trainer(config, devices)
        self.num_images = self._trainer.total_steps * config.train.batch_size

    def compile(self) -> None:
        """Compile initialization, training and evaluation."""
        trainer = self._trainer
        state = trainer.init(self._config.seed)
        trainer.programs.clear()
        self._train_call = trainer.compile(state)
        self._evaluator = final_evaluator(self._config, trainer.task, trainer.eval_arrays)
        self._evaluator.compile(state)

    def run(self, seed: int) -> Measurement:
        trainer = self._trainer
        start = time.perf_counter()
        inputs = trainer.inputs(seed, 0)
        state = trainer.init(seed)
        calls = trainer.timetable.calls(0, trainer.total_steps)
        state = jax.block_until_ready(run_calls(self._train_call, state, inputs, calls, lambda step, values: None))
        train_seconds = time.perf_counter() - start
        accuracy = self._evaluator.accuracy(state)  # a value on the host, so the device has finished
        seconds = time.perf_counter() - start
        return {"seed": seed, "accuracy": accuracy, "seconds": seconds, "train_seconds": train_seconds}

    def flops(self) -> int:
        """Return the floating-point operations of a run."""
        return run_flops(self._config, self._trainer.info, len(self._trainer.eval_arrays.labels))


def compile_seconds(run: Speedrun) -> Measurement:
    """Compile all programs with a "cold" and with a "warm" compilation cache, and return the seconds of each.

    Call this first: XLA remembers which kernels it chose for as long as the process lives.
    """
    kept = jax.config.jax_compilation_cache_dir
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for cache in ("cold", "warm"):
            compilation_cache.reset_cache()
            jax.clear_caches()
            start = time.perf_counter()
            run.compile()
            seconds[cache] = time.perf_counter() - start
        jax.config.update("jax_compilation_cache_dir", kept)
        compilation_cache.reset_cache()
        if kept:
            shutil.copytree(folder, kept, dirs_exist_ok=True)  # for the next process
    return seconds


def measure(
    config: Config,
    name: str,
    trials: int,
    peers: Sequence[Path],
    save: Callable[[Measurement], None],
    *,
    seconds: float = math.inf,
    time_compilation: bool = True,
    started: float | None = None,
) -> Measurement:
    """Measure `trials` seeds; print each run and pass the results so far to `save`.

    Then start each of `peers`, scripts, and measure up to `trials` more seeds alternating with it. This project comes
    first since a script may take minutes to start. A peer that fails is reported, and the others still run. Start no
    run that might not end within `seconds`. `time_compilation` compiles everything twice to measure it. With `started`,
    the start of the process, the results include its duration.
    """
    begin = time.perf_counter()
    compiled = Speedrun(config)
    result = runs.head(name, config, compiled.num_images, compiled.flops())
    result |= {"compile_seconds": {}, "peers": {}}
    if time_compilation:
        result["compile_seconds"] = compile_seconds(compiled)
        print(f"compiled in {runs.compilation(result)}", flush=True)
    else:
        compiled.compile()
    if jax.default_backend() != "cpu":
        compiled.run(config.seed)
    seeds = itertools.count(config.seed)

    def run_ours() -> Measurement:
        run = compiled.run(next(seeds))
        print(f"seed {run['seed']}: {runs.shown(run)}", flush=True)
        return run

    ours: list[Measurement] = []
    deadline = Deadline(begin + seconds)
    while len(ours) < trials and deadline.allows_another():
        ours.append(run_ours())
        if started is not None:
            result.setdefault("seconds_to_first_accuracy", time.perf_counter() - started)
        result |= runs.metrics(result, ours)
        save(result)
    splits = {split: sources.load(config.data, split) for split in ("train", "test")} if peers else {}
    for path in peers:
        known = result["peers"][path.name] = {}
        save(result)
        pairs: list[tuple[Measurement, Measurement]] = []
        start = time.perf_counter()
        left = min(max(begin + seconds - start, 0.0), threading.TIMEOUT_MAX)
        try:
            with original.start(path, splits, left) as script:
                script.run()
                known["start_seconds"] = time.perf_counter() - start
                print(f"{path.name}: started in {known['start_seconds']:.0f} s", flush=True)
                deadline = Deadline(begin + seconds)
                while len(pairs) < trials and deadline.allows_another():
                    mine = run_ours()
                    pairs.append((mine, script.run()))
                    print(f"{path.name}: {runs.shown(pairs[-1][1])}", flush=True)
                    known.update(runs.comparison(pairs))
                    save(result)
        except ChildProcessError as error:
            known["error"] = str(error)
            print(f"{path.name} failed: {error}", flush=True)
    if started is not None:
        result["process_seconds"] = time.perf_counter() - started
    save(result)
    return result


class Deadline:
    """Allow rounds of work that end before a time, if they take as long as the longest one so far.

    The first round is always allowed.
    """

    def __init__(self, end: float):
        self._end, self._longest, self._last = end, 0.0, math.nan

    def allows_another(self) -> bool:
        now = time.perf_counter()
        if not math.isnan(self._last):
            self._longest = max(self._longest, now - self._last)
        first, self._last = math.isnan(self._last), now
        return first or now + self._longest <= self._end


def scripts_of(paths: Sequence[Path], config_name: str) -> list[Path]:
    """Return the scripts that `--peer` names. Raise `ConfigError` if PyTorch or a script is missing."""
    scripts = [_script_of(path, config_name) for path in paths]
    names = [script.name for script in scripts]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "--peer", twice, "there are two scripts of this name; rename one")
    if scripts:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # all processes share the GPU's memory
    return scripts


def _script_of(path: Path, config_name: str) -> Path:
    require(has_module("torch"), "--peer", str(path), "requires PyTorch, which is not installed")
    if path.is_dir():
        known = f"a folder works only with {', '.join(ORIGINALS)}; pass the path of a script"
        require(config_name in ORIGINALS, "--peer", str(path), known)
        path = path / ORIGINALS[config_name]
    require(path.is_file(), "--peer", str(path), "no such file")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE overrides a field of it")
    parser.add_argument("--trials", type=at_least_one, default=10, help="seeds, starting at config.seed (default: 10)")
    parser.add_argument(
        "--peer", nargs="+", type=Path, default=[], metavar="PATH", help="checkouts of cifar10-airbench, or scripts"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args, overrides = parser.parse_known_args()
    compilation.enable_cache()
    try:
        config = arguments.parse(["--config", args.config, *overrides]).config
        require(config.seed + args.trials <= 2**32, "--trials", args.trials, f"seeds must be at most {2**32 - 1}")
        peers = scripts_of(args.peer, Path(args.config).stem)
        fraction = config.data.validation_fraction
        fits = not peers or fraction == 0
        require(fits, "data.validation_fraction", fraction, "must be 0 with --peer, which trains on all images")
        device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
        out = args.out or RESULTS / f"speedrun_{Path(args.config).stem}_{device}.json"
        require(not out.is_dir(), "--out", str(out), "is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        save = functools.partial(write_json, out)
        result = measure(config, args.config, args.trials, peers, save, started=STARTED)
        print(runs.text(result))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (UserError, OSError) as error:  # such as a folder that is not writable
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; all finished runs are written to the JSON file", file=sys.stderr)
        return 130
    print(f"written: {out}")
    failed = [peer for peer, found in result["peers"].items() if "error" in found]
    for peer in failed:
        print(f"error: {result['peers'][peer]['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
