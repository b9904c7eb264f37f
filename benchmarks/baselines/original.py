"""Run the script of a PyTorch speedrun, one trial at a time, for `benchmarks.speedrun --peer`.

The script runs in its own process, unchanged except for the `range(...)` of its top-level loop over trials: the
replacement prints READY and waits for a line on standard input before each trial. The data is written to the folder
`cifar10` in the working directory, where the script's loader looks for downloaded files.
"""

import ast
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cifar_flax.packages import has_module

READY = "ready for the next run"
REPOSITORY = Path(__file__).parent.parent.parent


class Baseline:
    """A script in its own process, paused between trials."""

    def __init__(self, script: Path, process: subprocess.Popen[str]):
        self._script, self._process = script, process
        heads = [line for line in self._until_ready() if "tta_val_acc" in line]
        self._columns = _cells(heads[0]) if heads else []
        self._time = next((name for name in self._columns if name.endswith("time_seconds")), None)
        if self._time is None:
            raise ChildProcessError(f"{script.name} printed no table with columns tta_val_acc and time_seconds")

    def run(self) -> dict[str, Any]:
        """Run one more trial; return the accuracy (with test-time augmentation) and seconds that the script prints.

        `train_seconds`, without the final evaluation, are those of the last row before it, if the script prints one.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        printed = self._until_ready()
        rows = [dict(zip(self._columns, _cells(line), strict=False)) for line in printed]
        results = [row for row in rows if row.get("tta_val_acc") and row.get(self._time)]
        if not results:
            raise ChildProcessError(f"{self._script.name} printed no accuracy: {''.join(printed[-3:])!r}")
        before = [row[self._time] for row in rows[: rows.index(results[-1])] if row.get(self._time)]
        measured = {"accuracy": float(results[-1]["tta_val_acc"]), "seconds": float(results[-1][self._time])}
        return measured | ({"train_seconds": float(before[-1])} if before else {})

    def _until_ready(self) -> list[str]:
        """Return the lines printed before the next READY; raise `ChildProcessError` if the script ends instead."""
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            if line.strip() == READY:
                return lines
            lines.append(line)
        last = lines[-1].strip() if lines else "nothing"
        raise ChildProcessError(f"{self._script.name} ended with exit code {self._process.wait()}; last line: {last}")


@contextmanager
def start(script: Path, splits: dict[str, Any], seconds: float = threading.TIMEOUT_MAX) -> Iterator[Baseline]:
    """Start `script` on `splits`, the "train" and "test" arrays loaded by `cifar_flax.data.sources`.

    Kill it after `seconds`, since a script may take minutes to compile; then `run` raises `ChildProcessError`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in splits.items():
            np.savez(Path(folder, name), images=arrays.images, labels=arrays.labels, classes=arrays.class_names)
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.baselines.original", str(script.absolute())],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            try:
                yield Baseline(script, process)
            finally:
                timer.cancel()
                process.kill()


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


class _TakeTurns(ast.NodeTransformer):
    """Replace each top-level `range(...)` with `turns()`; functions stay unchanged, as they may be compiled."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "range":
            return ast.copy_location(ast.Call(ast.copy_location(ast.Name("turns", ast.Load()), node), [], []), node)
        return self.generic_visit(node)


def _turns() -> Iterator[int]:
    for run in itertools.count():
        print(f"\n{READY}", flush=True)
        if not sys.stdin.readline():
            return
        yield run


def _keep_data(folder: Path) -> None:
    if not has_module("torch"):  # the script itself may not need it
        return
    import torch

    folder.mkdir()
    for split in ("train", "test"):
        with np.load(f"{split}.npz") as data:
            images, labels = torch.tensor(data["images"]), torch.tensor(data["labels"], dtype=torch.int64)
            kept = {"images": images, "labels": labels, "classes": data["classes"].tolist()}
            torch.save(kept, folder / f"{split}.pt")


def _run(script: str) -> None:
    sys.argv = [script]
    tree = _TakeTurns().visit(ast.parse(Path(script).read_text()))
    exec(compile(tree, script, "exec"), {"__name__": "__main__", "__file__": script, "turns": _turns})


if __name__ == "__main__":
    _keep_data(Path("cifar10"))
    _run(sys.argv[1])
