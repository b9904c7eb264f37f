"""The results of many runs of one config, and of its peers, as a JSON object and as text."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import backend

from benchmarks.hardware import PEAKS, machine, measure_speed
from cifar_flax import config as configs
from cifar_flax.config import Config
from cifar_flax.report.statistics import differences
from cifar_flax.report.statistics import mean_of as mean_of_seeds
from cifar_flax.training.operations import pflop

TIMED = "initial weights and whitening, shuffling, training with augmentation, final evaluation"
NOT_TIMED = (
    "start and imports of Python; reading the data and copying it to the device; compilation; one warm-up run (on "
    "accelerators and of a peer). Disabled: evaluations between epochs, checkpoints, logs"
)
# Name -> what it includes. Some peers measure the first only.
CLOCKS = {"seconds": "with the final evaluation", "train_seconds": "without it"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

Measurement = dict[str, Any]


def head(name: str, config: Config, num_images: int, flops: float) -> Measurement:
    """Return the metadata of a benchmark; `num_images` (training) and `flops` are those of one run."""
    device = jax.devices()[0].device_kind
    half = jax.default_backend() != "cpu"
    peak = {"flops_per_second": PEAKS.get(device), "is": f"the bfloat16 peak of {device} (data sheet)"}
    if device not in PEAKS:
        dtype = "bfloat16" if half else "float32"
        peak = {"flops_per_second": measure_speed(dtype).flops, "is": f"the measured speed of a {dtype} matrix product"}
    return {
        "config_file": name,
        "machine": machine() | {"device": device},
        "versions": versions(),
        "timed": TIMED,
        "not_timed": NOT_TIMED,
        "num_images": num_images,
        "flops": flops,
        "peak": peak,
        "config": configs.to_dict(config),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, XLA and the packages, XLA_FLAGS and other settings of XLA."""
    found = {"python": platform.python_version(), "platform": backend.get_backend().platform_version}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = {name: value for name, value in os.environ.items() if name.startswith("XLA_PYTHON")}
    return found | settings | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def metrics(known: Measurement, ours: list[Measurement]) -> Measurement:
    """Return the metrics of all runs so far; `known` is the return value of `head`."""
    summary = _summary(ours)
    seconds = summary["seconds"]["mean"]
    return {
        "ours": summary,
        "images_per_second": known["num_images"] / seconds,
        "flops_per_second": known["flops"] / seconds,
    }


def comparison(pairs: list[tuple[Measurement, Measurement]]) -> Measurement:
    """Return the metrics of a peer's runs, the ratios of both clocks, and the difference of the accuracies.

    `pairs` are (one of this project's runs, the peer's run after it).
    """
    ours, theirs = zip(*pairs, strict=True)
    result = _summary(theirs) | {"ours": list(ours)}
    for name, clock in (("time_ratio", "seconds"), ("train_time_ratio", "train_seconds")):
        ratios = [mine[clock] / its[clock] for mine, its in pairs if its.get(clock)]
        if ratios:
            result[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    result["accuracy_difference"] = _difference(*([run["accuracy"] for run in runs] for runs in (ours, theirs)))
    return result


def mean_of(values: list[float]) -> Measurement:
    """Return the mean, the sample standard deviation (`std`) and the half-width of the mean's 95 % confidence interval.

    The interval is Student's t. For a single value, `std` and `interval` are None; for equal values, `interval`.
    """
    found = mean_of_seeds(values)
    return {"mean": found.mean, "std": found.std, "interval": None if found.high is None else found.high - found.mean}


def _summary(runs: Sequence[Measurement]) -> Measurement:
    means = {name: [run[name] for run in runs if run.get(name)] for name in ("accuracy", *CLOCKS)}
    return {"trials": list(runs)} | {name: mean_of(values) for name, values in means.items() if values}


def _difference(ours: list[float], theirs: list[float]) -> Measurement:
    """Return the difference of the means with its 95 % confidence interval (Welch's t)."""
    # Equal seeds of two programs have nothing in common, so that no seed is shared.
    samples = {"ours": dict(enumerate(ours)), "theirs": {-1 - i: value for i, value in enumerate(theirs)}}
    (found,) = differences(samples)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def shown(run: Measurement) -> str:
    return f"{run['accuracy']:.2%} in {run['seconds']:.3f} s"


def compilation(result: Measurement) -> str:
    times = result["compile_seconds"]
    return f"{times['cold']:.1f} s, {times['warm']:.1f} s with a warm cache" if times else "not measured"


def text(result: Measurement) -> str:
    peak, rate = result["peak"], result["flops_per_second"]
    fraction = rate / peak["flops_per_second"]
    lines = [
        f"{result['config_file']} on {result['machine']['device']}",
        f"  timed        {result['timed']}",
        f"  not timed    {result['not_timed']}",
        *_lines(result["ours"]),
        f"  rate         {result['images_per_second']:,.0f} training images/s over the whole timed part",
        f"  operations   {pflop(result['flops'])} per run, {rate / 1e12:,.3f} TFLOP/s",
        f"               {fraction:.1%} of {peak['is']}",
        f"  compilation  {compilation(result)}",
    ]
    if "process_seconds" in result:
        first, total = result["seconds_to_first_accuracy"], result["process_seconds"]
        lines.append(f"  process      {first:.1f} s from its start to the first accuracy, {total:.1f} s total")
    for script, peer in result["peers"].items():
        lines += [f"{script}, alternating with this project", *(_peer_lines(peer) if "trials" in peer else ())]
        if "error" in peer:
            lines.append(f"  failed       {peer['error']}")
    return "\n".join(lines)


def _peer_lines(peer: Measurement) -> list[str]:
    lines, difference, interval = _lines(peer), peer["accuracy_difference"], ""
    for name, clock in (("time_ratio", "seconds"), ("train_time_ratio", "train_seconds")):
        if name in peer:
            ratio = peer[name]
            spread = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
            lines.append(f"  ratio        {spread}, ours / the peer's, {CLOCKS[clock]}")
    if difference["low"] is not None:
        interval = f" ({100 * difference['low']:+.3f} to {100 * difference['high']:+.3f}, 95 % interval)"
    shown = f"{100 * difference['mean']:+.3f} points of accuracy, ours - the peer's{interval}"
    return [*lines, f"  difference   {shown}"]


def _lines(summary: Measurement) -> list[str]:
    lines = [f"  runs         {len(summary['trials'])}"]
    for name, what, scale, unit in (
        ("accuracy", "", 100, "%"),
        *((clock, f" {what}", 1, "s") for clock, what in CLOCKS.items()),
    ):
        if name not in summary:
            continue
        mean, std, interval = (summary[name][key] for key in ("mean", "std", "interval"))
        line = f"  {name.removeprefix('train_'):11}  {mean * scale:.3f} {unit}"
        if interval is not None:
            line += f" ± {interval * scale:.3f} (95 % interval), standard deviation {std * scale:.3f}"
        lines.append(line + what)
    return lines
