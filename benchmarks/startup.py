"""Measure the seconds from the start of `main.py` to the end of its first step, with empty and with warm caches.

python -m benchmarks.startup --config configs/quickstart.py configs/default.py --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import at_least_one

REPOSITORY = Path(__file__).parent.parent
POLL_SECONDS = 0.005


def first_step(config: str, folder: Path) -> float:
    """Start a run with its caches in `folder`, kill it when its first step is logged, and return the seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        metrics = Path(workdir) / "metrics.jsonl"
        command = [sys.executable, str(REPOSITORY / "main.py"), "--config", config, "--config.train.log_every=1"]
        log = folder / "log.txt"
        start = time.perf_counter()
        with log.open("w") as output:
            run = subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                env=os.environ | {"XDG_CACHE_HOME": str(folder)},
                stdout=output,
                stderr=output,
            )
            while not (metrics.exists() and "\n" in metrics.read_text()):
                if run.poll() is not None:
                    raise SystemExit(f"{config} ended before its first step:\n{log.read_text()}")
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - start
            run.kill()
            run.wait()
    return seconds


def import_tensorflow() -> float:
    """Return the seconds of a process that only imports TensorFlow."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tensorflow"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for config in args.config:
            with tempfile.TemporaryDirectory() as folder:
                for caches in ("empty", "warm"):
                    seconds.setdefault(f"{config}, caches {caches}", []).append(first_step(config, Path(folder)))
        seconds.setdefault("python -c 'import tensorflow'", []).append(import_tensorflow())
    print("| process start to first step | median, s | min, s | max, s |")
    print("|---|---|---|---|")
    for start, times in seconds.items():
        print(f"| {start} | {statistics.median(times):.1f} | {min(times):.1f} | {max(times):.1f} |")


if __name__ == "__main__":
    main()
