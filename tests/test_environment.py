import os

import pytest
from conftest import REPOSITORY

from cifar_flax.runtime import environment


@pytest.mark.parametrize(
    ("limit", "cores"),
    [(None, 4), ("max 100000\n", 4), ("250000 100000\n", 3), ("50000 100000\n", 1), ("900000 100000\n", 4), ("", 4)],
)
def test_only_usable_cores_are_counted(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6, 7}, raising=False)
    monkeypatch.setattr(environment, "_CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert environment.usable_cores() == cores
    assert environment.machine().startswith(f"{cores} core{'s' if cores > 1 else ''} of ")


def test_cores_are_counted_in_one_place():
    files = [*REPOSITORY.glob("cifar_flax/**/*.py"), *REPOSITORY.glob("benchmarks/**/*.py")]
    assert [path.name for path in files if "cpu_count" in path.read_text()] == ["environment.py"]
