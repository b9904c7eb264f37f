"""What `benchmarks.speedrun` says of its runs: the JSON file, and the same for people."""

import importlib.metadata
import os
import platform
import statistics
from typing import Any

import jax
import numpy as np
import scipy.stats
from jax.extend import backend

from benchmarks.hardware import PEAKS, machine, measure_speed
from cifar_flax import config as configs
from cifar_flax.config import Config

TIMED = "first weights and whitening, the order of the examples, training with augmentation, the final evaluation"
NOT_TIMED = (
    "start and imports of Python; reading the data and, resident, its way to the device; compilation; one run before "
    "the first, on an accelerator and for a peer. Left out: evaluations between epochs, checkpoints, logs"
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

Record = dict[str, Any]


def head(name: str, config: Config, num_images: int, flops: float) -> Record:
    """What is known before the first run; `flops` and `num_images` are a run's."""
    device = jax.devices()[0].device_kind
    half = jax.default_backend() != "cpu"
    peak = {"flops_per_second": PEAKS.get(device), "is": f"the bfloat16 peak of {device}, by its maker"}
    if device not in PEAKS:
        dtype = "bfloat16" if half else "float32"
        peak = {"flops_per_second": measure_speed(dtype).flops, "is": f"the speed of a {dtype} matrix product here"}
    versions = {"python": platform.python_version(), "platform": backend.get_backend().platform_version}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config_file": name,
        "machine": machine() | {"device": device},
        "versions": versions | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "timed": TIMED,
        "not_timed": NOT_TIMED,
        "num_images": num_images,
        "flops": flops,
        "peak": peak,
        "config": configs.to_dict(config),
    }


def figures(known: Record, ours: list[Record], script: str | None, theirs: list[Record]) -> Record:
    """Of all runs so far; `known` is from `head`."""
    summary = _summary(ours)
    seconds = summary["seconds"]["mean"]
    result = {
        "ours": summary,
        "images_per_second": known["num_images"] / seconds,
        "flops_per_second": known["flops"] / seconds,
    }
    if script is not None:
        pairs = zip(ours, theirs, strict=True)
        ratios = [mine["seconds"] / its["seconds"] for mine, its in pairs]
        result["peer"] = {"script": script} | _summary(theirs)
        result["time_ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        result["accuracy_difference"] = _difference(*([run["accuracy"] for run in runs] for runs in (ours, theirs)))
    return result


def mean_of(values: list[float]) -> Record:
    """Mean, standard deviation and, by Student's t, half of the mean's 95 % interval; None where there is one value."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return {"mean": mean, "deviation": None, "interval": None}
    deviation = statistics.stdev(values)
    interval = float(scipy.stats.t.ppf(0.975, count - 1)) * deviation / count**0.5
    return {"mean": mean, "deviation": deviation, "interval": interval}


def _summary(runs: list[Record]) -> Record:
    return {"trials": list(runs)} | {name: mean_of([run[name] for run in runs]) for name in ("accuracy", "seconds")}


def _difference(ours: list[float], theirs: list[float]) -> Record:
    """Of the means, with its 95 % interval by Welch's t."""
    low = high = None
    if len(ours) > 1 and np.ptp(ours) + np.ptp(theirs) > 0:
        low, high = map(float, scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95))
    return {"mean": statistics.fmean(ours) - statistics.fmean(theirs), "low": low, "high": high}


def shown(run: Record) -> str:
    return f"{run['accuracy']:.2%} in {run['seconds']:.3f} s"


def text(result: Record) -> str:
    times, peak, rate = result["compile_seconds"], result["peak"], result["flops_per_second"]
    share, first = rate / peak["flops_per_second"], result["seconds_to_first_accuracy"]
    lines = [
        f"{result['config_file']} on {result['machine']['device']}",
        f"  timed        {result['timed']}",
        f"  not timed    {result['not_timed']}",
        *_lines(result["ours"]),
        f"  training     {result['images_per_second']:,.0f} images/s, over all that is timed",
        f"  operations   {result['flops'] / 1e15:.3f} PFLOP a run, {rate / 1e12:,.3f} TFLOP/s",
        f"               {share:.1%} of {peak['is']}",
        f"  compilation  {times['cold']:.1f} s, with a warm cache {times['warm']:.1f} s",
        f"  process      {first:.1f} s from its start to the first accuracy, {result['process_seconds']:.1f} s in all",
    ]
    if "peer" in result:
        ratio, difference = result["time_ratio"], result["accuracy_difference"]
        interval = ""
        if difference["low"] is not None:
            interval = f" ({100 * difference['low']:+.3f} to {100 * difference['high']:+.3f}, 95 % interval)"
        lines += [
            f"{result['peer']['script']}, in turn with it",
            *_lines(result["peer"]),
            f"  ratio        {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f}), our time over its",
            f"  difference   {100 * difference['mean']:+.3f} points of accuracy, ours less its{interval}",
        ]
    return "\n".join(lines)


def _lines(summary: Record) -> list[str]:
    lines = [f"  runs         {len(summary['trials'])}"]
    for name, scale, unit in (("accuracy", 100, "%"), ("seconds", 1, "s")):
        mean, deviation, interval = (summary[name][key] for key in ("mean", "deviation", "interval"))
        line = f"  {name:11}  {mean * scale:.3f} {unit}"
        if deviation is not None:
            line += f" ± {interval * scale:.3f} (95 % interval), standard deviation {deviation * scale:.3f}"
        lines.append(line)
    return lines
