"""Measure everything on the accelerator of this machine, most valuable first, and write it to one JSON file.

    python -m benchmarks.accelerator --budget 480
    python -m benchmarks.accelerator --budget 480 --peer cifar10-airbench cifar10_speedrun.py --data cache/

Each stage runs in its own process with its own time limit. The results file is rewritten after each run, so a killed
campaign loses only the running stage; the same command then continues with that stage. `--rehearse` runs every stage at
toy size on the CPU.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from benchmarks import campaign, rehearsal, sheets
from benchmarks.arguments import at_least_one
from benchmarks.campaign import REPOSITORY, Settings
from benchmarks.speedrun import scripts_of
from benchmarks.stages import RACED, STAGES
from cifar_flax import files
from cifar_flax.data import cache, sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError, require

RESULTS = Path(__file__).parent / "results"
_STAGES_HELP = f"some of {', '.join(STAGES)} (default: all, in this order)"
_END_SECONDS = 3.0  # to write the results and print the summary


class Campaign:
    """Run stages until `end`, in seconds of `time.time`."""

    def __init__(self, out: Path, end: float, settings: Settings, log: IO[str]):
        self._out, self._end, self._settings, self._log = out, end, settings, log

    def run(self, names: list[str]) -> dict[str, str]:
        """Run the stages that are not finished; return the status of each stage that was started or finished."""
        found = {}
        for name in names:
            stage, known = STAGES[name], campaign.read(self._out)["stages"].get(name, {})
            left = self._end - time.time() - _END_SECONDS
            if known.get("status") == "done" and (not stage.has_peers or known.get("peers") == self._peers()):
                found[name] = "done"
                self._print(f"== {name}: finished before")
            elif left < (1 if self._settings.rehearse else stage.least):
                self._print(f"== {name}: not started: {left:.0f} s are left, and it needs {stage.least:.0f}")
            else:
                found[name] = self._run_stage(name, min(stage.limit, left))
                if found[name] != "done":
                    self._print(f"== {name}: what to do: {stage.advice}")
        return found

    def _run_stage(self, name: str, limit: float) -> str:
        self._print(f"== {name}: at most {limit:.0f} s")
        # An earlier result stays until there is a new one.
        campaign.update(self._out, name, status="running", seconds=0, error="", peers=self._peers())
        start, last = time.monotonic(), [""]
        settings = dataclasses.replace(self._settings, end=time.time() + limit)
        with subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "benchmarks.stages"),
                *(name, str(self._out.absolute()), json.dumps(dataclasses.asdict(settings))),
            ],
            cwd=REPOSITORY,
            env=os.environ | self._environment(name),
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends; then the stage ends too
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be killed with it
        ) as process:
            reader = threading.Thread(target=self._read, args=(process.stdout, last))
            reader.start()
            try:
                exit_code = process.wait(limit)
            except subprocess.TimeoutExpired:
                exit_code = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # the stage and its children have ended
                    os.killpg(process.pid, signal.SIGKILL)
            reader.join()
        status = {0: "done", None: "timed out"}.get(exit_code, "failed")
        error = {"done": "", "failed": last[0], "timed out": f"did not end within {limit:.0f} s"}[status]
        seconds = time.monotonic() - start
        campaign.update(self._out, name, status=status, seconds=seconds, error=error)
        self._print(f"== {name}: {status} after {seconds:.0f} s{error and f': {error}'}")
        return status

    def _peers(self) -> list[str]:
        return [Path(peer).name for peer in self._settings.peers]

    def _environment(self, name: str) -> dict[str, str]:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {STAGES[name].xla_flags}".strip()
        if not self._settings.rehearse:
            return {"XLA_FLAGS": flags}
        if name == "devices":
            flags += " --xla_force_host_platform_device_count=2"
        return {"XLA_FLAGS": flags} | rehearsal.environment(self._out.absolute().parent)

    def _read(self, lines: Iterable[str], last: list[str]) -> None:
        """Print and log `lines`; keep the last one that is not empty in `last`."""
        for line in lines:
            last[0] = line.strip() or last[0]
            self._print(line.rstrip())

    def _print(self, line: str) -> None:
        print(line, flush=True)
        print(f"{time.strftime('%H:%M:%S')} {line}", file=self._log, flush=True)


def device_name() -> str:
    """Return the kind of the first device as a part of a file's name, such as "nvidia_h100_80gb_hbm3".

    Another process looks it up, since this one would keep the device's memory. Raise `UserError` if JAX finds no
    device.
    """
    command = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"JAX finds no device: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return re.sub(r"\W+", "_", done.stdout.splitlines()[-1].lower())


def data_cache(paths: list[Path]) -> str:
    """Return the cache folder that `--data` names, or that its archives are unpacked to; "" without `--data`."""
    for path in paths:
        require(path.exists(), "--data", str(path), "no such file or folder")
    if not paths:
        return ""
    if paths[0].is_dir():
        require(len(paths) == 1, "--data", " ".join(map(str, paths)), "must be one folder, or archives")
        cached = cache.newest(sources.cache_folder(DataConfig(cache_dir=str(paths[0])), "train", "*"))
        require(cached is not None, "--data", str(paths[0]), "contains no decoded cifar10, such as cifar10/3.0.2/train")
        return str(paths[0].absolute())
    sheets.unpack(paths, files.user_cache())
    return ""


def main() -> int:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=at_least_one, default=480, metavar="SECONDS", help="default: 480")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME", help=_STAGES_HELP)
    parser.add_argument(
        "--peer", nargs="+", type=Path, default=[], metavar="PATH", help="checkouts of cifar10-airbench, or scripts"
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="PATH",
        help="a folder of decoded data, or archives of benchmarks.sheets (default: TFDS)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/campaign_DEVICE.json)")
    parser.add_argument("--rehearse", action="store_true", help="run every stage on the CPU, at toy size")
    args = parser.parse_args()
    try:
        found = run_campaign(args, begin)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BlockingIOError:
        print(f"error: --out={str(args.out)!r}: another campaign is writing to it", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the stage that was running", file=sys.stderr)
        return 130
    if not found:
        print(f"error: --budget={args.budget}: no stage was started; each needs more time", file=sys.stderr)
    return 0 if found and set(found.values()) == {"done"} else 1


def run_campaign(args: argparse.Namespace, begin: float) -> dict[str, str]:
    """Run the stages for the parsed arguments `args` until `args.budget` seconds after `begin`; return each status."""
    if args.rehearse:
        name, out = "cpu", args.out or Path(tempfile.mkdtemp(prefix="rehearsal_"), "campaign_rehearsal.json")
    else:
        cache, peers = data_cache(args.data), scripts_of(args.peer, RACED)
        name = device_name()
        if name == "cpu":
            raise UserError("JAX finds no GPU or TPU; --rehearse runs every stage on the CPU")
        out = args.out or RESULTS / f"campaign_{name}.json"
    require(not out.is_dir(), "--out", str(out), "is a folder")
    campaign.read(out)  # raises an error before anything is written
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        cache, peers = str(folder / "data"), rehearsal.write_peers(folder / "peers")
        rehearsal.write_data(folder / "data")
    settings = Settings(
        end=0,
        data_cache=cache,
        peers=tuple(str(peer.absolute()) for peer in peers),
        rehearse=args.rehearse,
        results=str(out.absolute()),
    )
    with files.locked(out.with_suffix(".lock"), wait=False), out.with_suffix(".log").open("a") as log:
        campaign.claim(out, device=name, rehearsal=args.rehearse)
        found = Campaign(out, begin + args.budget, settings, log).run(args.stages)
    print(f"written: {out} and {out.with_suffix('.log').name}")
    return found


if __name__ == "__main__":
    sys.exit(main())
