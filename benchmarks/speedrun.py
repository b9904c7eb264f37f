"""Measure accuracy and training time of a config over many seeds, by the rules of the CIFAR-10 speedruns.

    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50
    python -m benchmarks.speedrun --config configs/airbench94.py --trials 50 --baseline cifar10-airbench

With `--baseline`, the original PyTorch script in a checkout of KellerJordan/cifar10-airbench (or a similar script)
runs alternately with this project on the same machine.
"""

import time

STARTED = time.perf_counter()  # start of the process, without Python's own start-up

from cifar_flax.runtime import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # re-executes this module, so it comes before the slow imports

import argparse
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import report
from benchmarks.arguments import at_least_one
from benchmarks.baselines import original
from benchmarks.report import Measurement
from cifar_flax import arguments
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.augment import VIEWS
from cifar_flax.errors import ConfigError, UserError, require
from cifar_flax.files import write_json
from cifar_flax.models.summary import forward_flops
from cifar_flax.packages import has_module
from cifar_flax.runtime import compilation
from cifar_flax.training.evaluator import final_evaluator
from cifar_flax.training.loop import run_calls
from cifar_flax.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
# config -> script in a checkout of airbench
ORIGINALS = {
    "airbench94": "airbench94_muon.py",
    "airbench95": "legacy/airbench95.py",
    "airbench96": "legacy/airbench96.py",
}


class Speedrun:
    """The training and evaluation of a config, compiled once for all seeds."""

    def __init__(self, config: Config):
        self._config = config
        self._trainer = Trainer(config)
        self.num_images = self._trainer.total_steps * config.train.batch_size
        self.compile()

    def compile(self) -> None:
        """Compile initialization, training and evaluation."""
        trainer = self._trainer
        state = trainer.init(self._config.seed)
        self._train_call = trainer.compile(state)
        self._evaluator = final_evaluator(self._config, trainer.task, trainer.eval_arrays)
        self._evaluator.compile(state)

    def run(self, seed: int) -> Measurement:
        trainer = self._trainer
        start = time.perf_counter()
        inputs = trainer.inputs(seed, 0)
        state = trainer.init(seed)
        calls = trainer.calls(0, trainer.total_steps)
        state = run_calls(self._train_call, state, inputs, calls, lambda step, values: None)
        accuracy = self._evaluator(state).summary["accuracy"]  # a value on the host, so the device has finished
        return {"seed": seed, "accuracy": accuracy, "seconds": time.perf_counter() - start}

    def flops(self) -> float:
        """Return the floating-point operations of a run.

        Count three forward passes per training image and one per test-time augmentation (TTA) view of a test image. If
        `eval.tta_below` is set, count a single view of each test image.
        """
        info, settings = self._trainer.info, self._config.eval
        views = len(VIEWS[settings.tta]) if settings.tta_below is None else 1
        forward = forward_flops(self._config.model, info.image_shape, len(info.class_names))
        return forward * (3 * self.num_images + views * len(self._trainer.eval_arrays.labels))


def compile_seconds(run: Speedrun) -> Measurement:
    """Return the seconds to trace and compile all programs with a "cold" and with a "warm" compilation cache."""
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
    return seconds


def measure(config: Config, name: str, trials: int, script: Path | None, out: Path) -> Measurement:
    """Measure `trials` seeds, alternating with `script` if there is one; print and write to `out` after each run."""
    compiled = Speedrun(config)
    result = report.head(name, config, compiled.num_images, compiled.flops())
    with ExitStack() as stack:
        if script is not None:
            baseline = stack.enter_context(
                original.start(script, {split: sources.load(config.data, split) for split in ("train", "test")})
            )
            baseline.run()
        if jax.default_backend() != "cpu":
            compiled.run(config.seed)
        ours: list[Measurement] = []
        theirs: list[Measurement] = []
        for seed in range(config.seed, config.seed + trials):
            ours.append(compiled.run(seed))
            print(f"seed {seed}: {report.shown(ours[-1])}", flush=True)
            result.setdefault("seconds_to_first_accuracy", time.perf_counter() - STARTED)
            if script is not None:
                theirs.append(baseline.run())
                print(f"{script.name}: {report.shown(theirs[-1])}", flush=True)
            result |= report.metrics(result, ours, script and script.name, theirs)
            write_json(out, result)
    result["compile_seconds"] = compile_seconds(compiled)
    result["process_seconds"] = time.perf_counter() - STARTED
    write_json(out, result)
    return result


def original_of(path: Path, config_name: str) -> Path:
    """Return the script to compare the config with. Raise `ConfigError` if PyTorch or the script is missing."""
    require(has_module("torch"), "--baseline", str(path), "requires PyTorch, which is not installed")
    if path.is_dir():
        known = f"a folder works only with {', '.join(ORIGINALS)}; pass the path of a script"
        require(config_name in ORIGINALS, "--baseline", str(path), known)
        path = path / ORIGINALS[config_name]
    require(path.is_file(), "--baseline", str(path), "no such file")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both processes share the GPU's memory
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE overrides a field of it")
    parser.add_argument("--trials", type=at_least_one, default=10, help="seeds, starting at config.seed (default: 10)")
    parser.add_argument("--baseline", type=Path, metavar="PATH", help="a checkout of cifar10-airbench, or a script")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args, overrides = parser.parse_known_args()
    compilation.enable_cache()
    try:
        config = arguments.parse(["--config", args.config, *overrides]).config
        require(config.seed + args.trials <= 2**32, "--trials", args.trials, f"seeds must be at most {2**32 - 1}")
        script = None if args.baseline is None else original_of(args.baseline, Path(args.config).stem)
        fraction = config.data.validation_fraction
        fits = script is None or fraction == 0
        require(fits, "data.validation_fraction", fraction, "must be 0 with --baseline, which trains on all images")
        device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
        out = args.out or RESULTS / f"speedrun_{Path(args.config).stem}_{device}.json"
        require(not out.is_dir(), "--out", str(out), "is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        print(report.text(measure(config, args.config, args.trials, script, out)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (UserError, OSError) as error:  # the baseline's process ended, or the folder is not writable
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; all finished runs are written to the JSON file", file=sys.stderr)
        return 130
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
