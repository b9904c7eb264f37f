"""Turn a results file of `benchmarks.accelerator` into Markdown: README rows, headers of configs, and a page.

python -m benchmarks.report benchmarks/results/campaign_nvidia_h200.json
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import campaign
from benchmarks.runs import CLOCKS, compilation
from cifar_flax.errors import UserError
from cifar_flax.training.operations import pflop

OPERATIONS = 15  # rows of the profile

Result = dict[str, Any]


def measured(results: Result) -> dict[str, Result]:
    """Return the results of the stages that measured a config over seeds, by the name of the stage."""
    found = {name: stage.get("result") or {} for name, stage in results["stages"].items()}
    return {name: result for name, result in found.items() if "ours" in result}


def device(result: Result) -> str:
    return result["machine"]["device"]


def accuracy(result: Result) -> str:
    mean, std = (result["ours"]["accuracy"][key] for key in ("mean", "std"))
    return f"{100 * mean:.2f} %" if std is None else f"{100 * mean:.2f} % ± {100 * std:.2f}"


def readme_rows(results: Result) -> Iterator[str]:
    """Yield a row per measured config for the table in README.md, which states mean and standard deviation."""
    for name, result in measured(results).items():
        ours = result["ours"]
        cells = (
            f"`{name}` on {device(result)}",
            accuracy(result),
            str(len(ours["trials"])),
            f"{ours['seconds']['mean']:.2f} s",
            pflop(result["flops"]),
        )
        yield f"| {' | '.join(cells)} |"


def header(result: Result) -> Iterator[str]:
    """Yield the lines that state a measurement in the docstring of a config."""
    versions, ours = result["versions"], result["ours"]
    mean, std = (ours["accuracy"][key] for key in ("mean", "std"))
    spread = "" if std is None else f"; standard deviation {100 * std:.2f}"
    yield f"Hardware: one {device(result)}; Python {versions['python']}, jax {versions['jax']}"
    yield f"Accuracy: {100 * mean:.2f} % (mean of n={len(ours['trials'])}{spread})"
    yield f"Operations: {pflop(result['flops'])}"
    yield (
        f"Time:     {ours['seconds']['mean']:.3f} s, {ours['train_seconds']['mean']:.3f} s without the final "
        f"evaluation; compilation {compilation(result)}"
    )


def page(results: Result) -> Iterator[str]:
    """Yield the lines of a page with the results of all stages."""
    stages = results["stages"]
    machine = stages.get("machine", {}).get("result")
    if machine:
        speeds = ", ".join(f"{dtype} {speed['flops'] / 1e12:,.0f} TFLOP/s" for dtype, speed in machine["speed"].items())
        moved = machine["speed"]["float32"]["bytes"] / 1e12
        yield f"{len(machine['devices'])} x {machine['devices'][0]} ({machine['driver'] or 'no NVIDIA driver'})."
        yield f"Measured: matrix products {speeds}; copies {moved:.2f} TB/s, read and written."
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        yield ""
    yield "| stage | status | seconds |"
    yield "|---|---|---|"
    for name, stage in stages.items():
        error = f": {stage['error']}" if stage.get("error") else ""
        yield f"| {name} | {stage['status']}{error} | {stage.get('seconds', 0):.0f} |"
    yield from _table_of_runs(results)
    yield from _table_of_peers(results)
    process = stages.get("process", {}).get("result") or {}
    for cache, run in process.items():
        yield f"\n`main.py`, {cache} compilation cache: {run['accuracy']:.2%} after {run['seconds']:.1f} s."
    profile = stages.get("profile", {}).get("result")
    if profile:
        side = profile.get("side", 32)  # missing in results of earlier versions
        step = f"{profile['step_ms']:.2f} ms, {profile['kernels_per_step']:.0f} operations"
        yield f"\nStep on images of {side}x{side} pixels: {step}.\n"
        yield "| operation | source | ms |"
        yield "|---|---|---|"
        for row in profile["operations"][:OPERATIONS]:
            yield f"| {row['name']} | {row['source']} | {row['ms']:.3f} |"
    tests = (stages.get("correctness", {}).get("result") or {}).get("tests", {})
    if tests:
        counts = {outcome: sum(one == outcome for one in tests.values()) for outcome in sorted(set(tests.values()))}
        yield "\nTests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _table_of_runs(results: Result) -> Iterator[str]:
    names = ", ".join(f"seconds {what}" for what in CLOCKS.values())
    yield f"\nMeans with 95 % confidence intervals; {names}.\n"
    yield "| stage | runs | accuracy | seconds | training seconds | operations per second, of the peak | compiled in |"
    yield "|---|---|---|---|---|---|---|"
    for name, result in measured(results).items():
        ours = result["ours"]
        rate = result["flops_per_second"]
        cells = (
            f"{name}{' with ' + result['variant'] if 'variant' in result else ''}",
            str(len(ours["trials"])),
            _interval(ours["accuracy"], 100, 2, " %"),
            *(_interval(ours[clock], 1, 3, "") for clock in CLOCKS),
            f"{rate / 1e12:,.0f} TFLOP/s, {rate / result['peak']['flops_per_second']:.1%}",
            compilation(result),
        )
        yield f"| {' | '.join(cells)} |"


def _table_of_peers(results: Result) -> Iterator[str]:
    rows = [
        (name, script, peer) for name, result in measured(results).items() for script, peer in result["peers"].items()
    ]
    if not rows:
        return
    yield "\nAlternating with other scripts on the same device; a ratio below 1 means that this project is faster.\n"
    yield "| stage | script | runs | accuracy | seconds | ratio of the seconds, median (min to max) | of training |"
    yield "|---|---|---|---|---|---|---|"
    for name, script, peer in rows:
        if "trials" not in peer:
            yield f"| {name} | {script} | 0: {peer.get('error', 'not started in time')} | | | | |"
            continue
        cells = (
            name,
            script,
            str(len(peer["trials"])) + (f", then: {peer['error']}" if "error" in peer else ""),
            _interval(peer["accuracy"], 100, 2, " %"),
            _interval(peer["seconds"], 1, 3, ""),
            *(_ratio(peer.get(key)) for key in ("time_ratio", "train_time_ratio")),
        )
        yield f"| {' | '.join(cells)} |"


def _interval(metric: Result, scale: float, digits: int, unit: str) -> str:
    spread = "" if metric["interval"] is None else f" ± {scale * metric['interval']:.{digits}f}"
    return f"{scale * metric['mean']:.{digits}f}{unit}{spread}"


def _ratio(ratio: Result | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def text(results: Result) -> str:
    lines = ["# Rows for README.md", "", *readme_rows(results)]
    for name, result in measured(results).items():
        lines += ["", f"# Header for {name}", "", *header(result)]
    return "\n".join([*lines, "", "# Page", "", *page(results)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results file of benchmarks.accelerator")
    path = parser.parse_args().results
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        print(text(campaign.read(path)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
