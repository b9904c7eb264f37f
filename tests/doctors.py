"""Helpers that run `--mode=doctor` and parse its findings."""

import contextlib
import io
import re
from types import SimpleNamespace

import jax
import numpy as np

from cifar_flax.diagnosis import run
from cifar_flax.errors import UserError
from cifar_flax.modes import doctor
from cifar_flax.runtime import compilation


def examine(config, folder, **options):
    """Run the doctor; return its findings as lines "mark name text", and the text of its error or None."""
    printed, reasons = io.StringIO(), None
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    with contextlib.redirect_stdout(printed):
        try:
            doctor.doctor(config, folder, **options)
        except UserError as error:
            reasons = f"exit code {error.exit_code}: {error}"
        finally:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    lines = printed.getvalue().splitlines()
    assert len(lines) <= 25, printed.getvalue()
    assert all(len(line) <= 100 or " " not in line.strip() for line in lines)  # paths are not wrapped
    assert "\n" not in (reasons or "")
    assert (lines[-1] == "a run can start") == (reasons is None)
    found = re.sub(r"\n {16}", " ", printed.getvalue()).splitlines()[1 : None if reasons else -1]
    marked = [re.fullmatch(r"(ok|note|FAIL) +(\w+) +(.*)", line).groups() for line in found]
    assert (reasons is not None) == any(mark == "FAIL" for mark, _, _ in marked)
    return [" ".join(finding) for finding in marked], reasons


def skip_compilation(monkeypatch):
    """Replace the checks that compile programs by stubs."""
    trainer = SimpleNamespace(
        total_steps=34, layout="cpu", no_tensorflow="", initial_state=np.zeros(30_000_000, np.uint8)
    )
    monkeypatch.setattr(run, "Trainer", lambda config: trainer)
    monkeypatch.setattr(compilation, "cache_problem", lambda: None)


def one(found, start):
    """Return the only finding that starts with `start`."""
    (finding,) = [finding for finding in found if finding.startswith(start)]
    return finding


def snapshot(folder):
    """Return all that is below `folder`, with the modification times of files, to detect changes."""
    return {path: path.stat().st_mtime_ns * path.is_file() for path in folder.rglob("*")}


def disk_with(free):
    """Return a stand-in for `shutil.disk_usage` that reports `free` bytes."""
    return lambda place: SimpleNamespace(total=10**12, used=0, free=free)
