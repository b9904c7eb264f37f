"""A PyTorch speedrun's own script, one of its runs at a time: `benchmarks.speedrun --peer`.

The script is left as it is and runs in a process of its own. Its loop over runs, `for run in range(...)` outside of any
function, gets a `range` that says READY and waits for a line on standard input before each run. Its data lies where its
loader keeps what it has downloaded: in the folder cifar10 of its working folder.
"""

import itertools
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

READY = "ready for the next run"
REPOSITORY = Path(__file__).parent.parent.parent


class Peer:
    """The script in its process, up to its first run."""

    def __init__(self, script: Path, process: subprocess.Popen[str]):
        self._script, self._process = script, process
        head = next((line for line in self._until_ready() if "tta_val_acc" in line), "")
        self._columns = _cells(head)

    def run(self) -> dict[str, Any]:
        """One run more: its accuracy with test-time augmentation and its seconds, both as the script counts them."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        rows = [dict(zip(self._columns, _cells(line), strict=False)) for line in self._until_ready()]
        last = [row for row in rows if row.get("tta_val_acc")][-1]
        seconds = next(value for name, value in last.items() if name.endswith("time_seconds"))
        return {"accuracy": float(last["tta_val_acc"]), "seconds": float(seconds)}

    def _until_ready(self) -> list[str]:
        """What it prints before it waits for its next run; raises `ChildProcessError` where it ends instead."""
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            if line.strip() == READY:
                return lines
            lines.append(line)
        raise ChildProcessError(f"{self._script} ended with exit code {self._process.wait()}: see above")


@contextmanager
def start(script: Path, splits: dict[str, Any]) -> Iterator[Peer]:
    """`splits` are "train" and "test" as `cifar_flax.data.sources` loads them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in splits.items():
            np.savez(Path(folder, name), images=arrays.images, labels=arrays.labels, classes=arrays.class_names)
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.peers.original", str(script.absolute())],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield Peer(script, process)
            finally:
                process.kill()


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _turns(*bounds: int) -> Iterable[int]:
    """The `range` of the script."""
    return _wait() if sys._getframe(1).f_code.co_name == "<module>" else range(*bounds)


def _wait() -> Iterator[int]:
    for run in itertools.count():
        print(f"\n{READY}", flush=True)
        if not sys.stdin.readline():
            return
        yield run


def _keep_data(folder: Path) -> None:
    import torch

    folder.mkdir()
    for split in ("train", "test"):
        with np.load(f"{split}.npz") as data:
            images, labels = torch.tensor(data["images"]), torch.tensor(data["labels"], dtype=torch.int64)
            kept = {"images": images, "labels": labels, "classes": data["classes"].tolist()}
            torch.save(kept, folder / f"{split}.pt")


if __name__ == "__main__":
    _keep_data(Path("cifar10"))
    runpy.run_path(sys.argv[1], init_globals={"range": _turns}, run_name="__main__")
