"""Compare the time of a study of one config over seeds with that of the training loops of single runs.

python -m benchmarks.studies --config configs/quickstart.py --seeds 20
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import at_least_one
from cifar_flax.study.space import VALIDATION_FRACTION

REPOSITORY = Path(__file__).parent.parent


def timed(arguments: list[str]) -> tuple[list[tuple[float, str]], float]:
    """Run `main.py`; return its lines with the seconds since the start of the process, and the seconds of the whole."""
    start, lines = time.perf_counter(), []
    command = [sys.executable, "-u", str(REPOSITORY / "main.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = [(time.perf_counter() - start, line) for line in run.stdout]
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(line for _, line in lines)}")
    return lines, time.perf_counter() - start


def start_and_loop(config: str, seed: int) -> tuple[float, float]:
    """Return the seconds of a single run until its programs are compiled, and those of its training loop.

    The loop has the evaluation and the checkpoint of each epoch, but not the final evaluation and the report.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"--config.data.validation_fraction={VALIDATION_FRACTION}", f"--config.seed={seed}"]
        lines, _ = timed(["--config", config, *settings, f"--workdir={folder}/run"])
    begin = next(seconds for seconds, line in lines if line.startswith("compiled"))
    end = [seconds for seconds, line in lines if line.startswith("epoch")][-1]
    return begin, end - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--seeds", type=at_least_one, default=20)
    parser.add_argument("--rounds", type=at_least_one, default=2, help="single runs before and after the study")
    args = parser.parse_args()
    start_and_loop(args.config, 0)  # fills the compilation cache
    runs = [start_and_loop(args.config, seed) for seed in range(args.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        study = ["--mode=study", "--config", args.config, f"--seeds={args.seeds}", f"--workdir={folder}/study", "--yes"]
        _, seconds = timed(study)
    runs += [start_and_loop(args.config, seed) for seed in range(args.rounds)]
    starts, loops = zip(*runs, strict=True)
    start, loop = statistics.median(starts), statistics.median(loops)
    whole = args.seeds * loop + start
    print("| config | seeds | start, s | training loop, s | study, s | loops and one start, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    of_runs = f"{start:.1f} | {loop:.2f} ({min(loops):.2f} to {max(loops):.2f})"
    print(f"| {args.config} | {args.seeds} | {of_runs} | {seconds:.1f} | {whole:.1f} | {seconds / whole:.3f} |")


if __name__ == "__main__":
    main()
