"""The stages of `benchmarks.accelerator`, each run in a process of its own by `python -m benchmarks.stages`."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax

from benchmarks import campaign, hardware, rehearsal, runs
from benchmarks.campaign import REPOSITORY, Settings
from benchmarks.device_profile import profile
from benchmarks.speedrun import Speedrun, measure
from benchmarks.variants import VARIANTS
from cifar_flax.errors import UserError
from cifar_flax.files import read_json
from cifar_flax.runtime import compilation

RACED = "airbench94_wide"  # the config whose seconds are compared with the peers: its few, wide steps suit a GPU
VARIANT_TRIALS = 10
MAX_ACCURACY_LOSS = 0.0015  # of a variant that may win
_WORKERS = 4  # processes that run the tests
_MARGIN = 5.0  # seconds between the last run of a stage and the stage's time limit

Save = Callable[[Any], None]


def machine(settings: Settings, save: Save) -> None:
    """Describe the devices, and measure the speed of a matrix product and of a copy in device memory."""
    device = jax.devices()[0]
    smi = "nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader"
    found = subprocess.run(smi.split(), capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    size = 256 if settings.rehearse else 8192
    save(
        {
            "devices": [str(one.device_kind) for one in jax.devices()],
            "driver": found.stdout.strip() if found else "",
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
            "speed": {
                dtype: dataclasses.asdict(hardware.measure_speed(dtype, size)) for dtype in ("float32", "bfloat16")
            },
            "versions": runs.versions(),
            **hardware.machine(),
        }
    )


def run_config(name: str, trials: int, *overrides: str) -> Callable[[Settings, Save], None]:
    """Return a stage that measures a config over seeds."""

    def stage(settings: Settings, save: Save) -> None:
        _measure(settings, save, name, trials, overrides)

    return stage


def _measure(
    settings: Settings,
    save: Save,
    name: str,
    trials: int,
    overrides: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
    time_compilation: bool = True,
) -> None:
    result = measure(
        settings.config(name, *overrides), name, settings.trials(trials), [Path(peer) for peer in peers], save,
        seconds=settings.seconds_left() - _MARGIN, time_compilation=time_compilation,
    )  # fmt: skip
    print(runs.text(result), flush=True)


def race(settings: Settings, save: Save) -> None:
    """Measure `RACED` alone and alternating with the peers."""
    _measure(settings, save, RACED, 20, peers=settings.peers)


def more_runs(settings: Settings, save: Save) -> None:
    """Measure `RACED` again, over as many seeds as the time allows."""
    _measure(settings, save, RACED, 200, time_compilation=False)


def variant(name: str) -> Callable[[Settings, Save], None]:
    """Return a stage that measures a variant of `RACED`."""

    def stage(settings: Settings, save: Save) -> None:
        chosen = VARIANTS[name]
        chosen.patch()
        _measure(settings, save, RACED, VARIANT_TRIALS, chosen.overrides, time_compilation=False)

    return stage


def winner(settings: Settings, save: Save) -> None:
    """Measure the fastest variant alternating with the peers, if one is faster than the config as it is."""
    name = best_variant(read_json(Path(settings.results))["stages"])
    if name is None:
        save({"skipped": "no variant is faster and as accurate"})
        return
    chosen = VARIANTS[name]
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {chosen.xla_flags}".strip()
    chosen.patch()

    def keep(result: dict[str, Any]) -> None:
        save(result | {"variant": name})

    _measure(settings, keep, RACED, 20, chosen.overrides, settings.peers, time_compilation=False)


def best_variant(results: dict[str, Any]) -> str | None:
    """Return the name of the fastest variant whose accuracy is that of the config as it is, or None.

    `results` are the stages of a results file. A variant is faster if the 95 % intervals of the seconds are apart.
    Raise `UserError` unless the config and at least one variant have been measured to the end.
    """
    done = {name: stage["result"]["ours"] for name, stage in results.items() if is_measured(stage)}
    variants = {name: done[f"variant_{name}"] for name in VARIANTS if f"variant_{name}" in done}
    if RACED not in done or not variants:
        raise UserError(f"the stages {RACED} and variant_... come first")
    base, good = done[RACED], {}
    for name, ours in variants.items():
        is_accurate = ours["accuracy"]["mean"] >= base["accuracy"]["mean"] - MAX_ACCURACY_LOSS
        if is_accurate and bounds(ours["seconds"])[1] < bounds(base["seconds"])[0]:
            good[name] = ours["seconds"]["mean"]
    return min(good, key=good.__getitem__) if good else None


def is_measured(stage: dict[str, Any]) -> bool:
    return stage["status"] == "done" and "ours" in stage["result"]


def bounds(metric: dict[str, float]) -> tuple[float, float]:
    """Return the ends of a mean's 95 % interval; the mean itself if there is a single value."""
    spread = metric["interval"] or 0.0
    return metric["mean"] - spread, metric["mean"] + spread


def process(settings: Settings, save: Save) -> None:
    """Measure `main.py` from its start to its end, first with a cold and then with a warm compilation cache."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            workdir = Path(folder, cache)
            command = [sys.executable, "main.py", *settings.command_line(RACED), f"--workdir={workdir}"]
            start = time.perf_counter()
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"},
                capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise UserError(f"main.py ended with exit code {done.returncode}: {(done.stderr + done.stdout)[-300:]}")
            accuracy = read_json(workdir / "eval.json")["accuracy"]
            result[cache] = {"seconds": seconds, "accuracy": accuracy}
            print(f"main.py with a {cache} compilation cache: {accuracy:.2%} in {seconds:.1f} s", flush=True)
            save(result)


def profiled(settings: Settings, save: Save) -> None:
    """List the slowest operations of a step, without CUDA graphs, which hide the names of their kernels."""
    result = profile(settings.config(RACED))
    peak = hardware.PEAKS.get(jax.devices()[0].device_kind)
    rate = result["flops_per_step"] / (result["step_ms"] / 1e3)
    save(result | {"fraction_of_peak": rate / peak if peak else None})
    operations = f"{result['busy_ms']:.3f} ms in {result['kernels_per_step']:.0f} operations"
    print(f"step on images of {result['side']} pixels: {result['step_ms']:.3f} ms, {operations}")
    for row in result["operations"][:20]:
        print(f"  {row['ms']:8.4f} ms  {row['name']:40}  {row['source'][:100]}")


def correctness(settings: Settings, save: Save) -> None:
    """Run the tests that need an accelerator."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "accelerator", "-v", "tests/test_accelerator.py"]
        command += ["-o", "junit_family=xunit1"]  # the tests record the devices that they ran on
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the device
        if settings.rehearse:
            os.environ["REHEARSE"] = "1"
            command += ["-k", rehearsal.TESTS]
        elif shutil.which("nvidia-smi"):  # only one process at a time can use a TPU, so this one must not ask JAX
            command += ["-n", str(_WORKERS)]
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=REPOSITORY)
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []
        outcomes = {case.get("name", ""): _outcome(case) for case in cases}
    save({"exit_code": done.returncode, "tests": outcomes})
    if done.returncode:
        raise UserError(f"pytest ended with exit code {done.returncode}")
    if "passed" not in outcomes.values():
        raise UserError("no test ran: pytest found no accelerator")


def _outcome(case: ElementTree.Element) -> str:
    """Return the outcome of a test in JUnit's XML, which has an element for each outcome but success."""
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def several_devices(settings: Settings, save: Save) -> None:
    """Measure the step time of each backend on 1, 2, 4, ... devices."""
    count = len(jax.devices())
    if count == 1:
        save({"skipped": "there is one device"})
        print("skipped: there is one device")
        return
    result = []
    for name in rehearsal.SEVERAL_DEVICES if settings.rehearse else (RACED, "resnet18"):
        for number in (2**power for power in range(count.bit_length()) if 2**power <= count):
            for backend in ("jit", "shard_map", "pmap") if number > 1 else ("jit",):
                config = settings.config(name, f"parallel.backend={backend}")
                compiled = Speedrun(config, jax.devices()[:number])
                compiled.compile()
                compiled.run(config.seed)
                measured = [compiled.run(config.seed) for _ in range(3)]
                seconds = statistics.median(run["train_seconds"] for run in measured)
                row = {"config": name, "devices": number, "backend": backend, "train_seconds": seconds}
                result.append(row | {"accuracy": measured[-1]["accuracy"]})
                print(f"{name} on {number} devices with {backend}: {seconds:.3f} s", flush=True)
                save(result)


@dataclass(frozen=True, slots=True)
class Stage:
    run: Callable[[Settings, Save], None]
    limit: float  # seconds
    least: float  # seconds that must be left to start it
    advice: str  # what to do if it fails
    xla_flags: str = ""
    has_peers: bool = False  # whether it measures the peers


_RERUN = "read the log; then run the same command again, which skips the finished stages"
_SINGLE = "run `python -m benchmarks.speedrun --config configs/{}.py --trials 1` to see the error alone"

# In order of value.
STAGES = {
    "machine": Stage(machine, 60, 10, "check that `python -c 'import jax; print(jax.devices())'` lists the devices"),
    RACED: Stage(race, 300, 60, _SINGLE.format(RACED), has_peers=True),
    "process": Stage(process, 120, 40, f"run `python main.py --config configs/{RACED}.py` to see the error alone"),
    **{
        f"variant_{name}": Stage(variant(name), 60, 40, f"the other variants still count; {_RERUN}", one.xla_flags)
        for name, one in VARIANTS.items()
    },
    "winner": Stage(winner, 200, 60, _RERUN, has_peers=True),
    "airbench95": Stage(run_config("airbench95", 3), 150, 90, _SINGLE.format("airbench95")),
    "airbench96": Stage(run_config("airbench96", 3), 120, 60, _SINGLE.format("airbench96")),
    "resnet18_16_epochs": Stage(run_config("resnet18", 2, "train.epochs=16"), 90, 50, _SINGLE.format("resnet18")),
    "default": Stage(run_config("default", 3), 60, 30, _SINGLE.format("default")),
    "notebook": Stage(run_config("notebook", 3), 60, 30, _SINGLE.format("notebook")),
    "profile": Stage(profiled, 60, 30, _RERUN, "--xla_gpu_enable_command_buffer="),
    "correctness": Stage(correctness, 120, 40, "run `python -m pytest -m accelerator` and report the failing test"),
    "devices": Stage(several_devices, 240, 20, _RERUN),
    "resnet18": Stage(run_config("resnet18", 1), 400, 240, _SINGLE.format("resnet18")),
    "more_runs": Stage(more_runs, 500, 60, _RERUN),
}


def follow_parent() -> None:
    """End this process and its children when the campaign ends, even if it is killed."""

    def wait() -> None:
        sys.stdin.read()
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    name, out, settings = sys.argv[1], Path(sys.argv[2]), Settings(**json.loads(sys.argv[3]))
    follow_parent()
    compilation.enable_cache()
    try:
        STAGES[name].run(settings, functools.partial(campaign.save_result, out, name))
    except UserError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
