import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY

from cifar_flax import compilation

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.py")
CHANGED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
TINY = ("model.width=2", "model.hidden=8", "train.batch_size=256", "train.epochs=1", "optim.warmup_epochs=0")

# Runs main.py with the arguments given, and prints what JAX counts of its compilation cache.
PROGRAM = """
import collections, json, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
import main
code = main.main()
print(json.dumps(counts))
sys.exit(code)
"""


def start(tmp_path, number):
    arguments = [f"--config.{field}" for field in TINY]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--config", QUICKSTART, f"--workdir=runs/{number}", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_second_start_compiles_nothing(tmp_path):
    first, second = start(tmp_path, 1), start(tmp_path, 2)
    assert first["cache_misses"] > 0
    assert "cache_misses" not in second
    assert second["cache_hits"] == second["compile_requests_use_cache"] > 0
    results = [(tmp_path / "runs" / number / "eval.json").read_bytes() for number in "12"]
    assert results[0] == results[1]
    folder = tmp_path / "cache" / "cifar_flax" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any(folder.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "used"),
    [("JAX_ENABLE_COMPILATION_CACHE", "false", None), ("JAX_COMPILATION_CACHE_DIR", "elsewhere", "elsewhere")],
)
def test_jax_own_variables_are_the_switch(tmp_path, variable, value, used):
    program = "import jax; from cifar_flax import compilation; compilation.keep_programs(); jax.jit(abs)(1.0)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), variable: value}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
    written = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache")}
    assert written == ({used} if used else set())


@pytest.fixture
def no_folder_yet():
    before = {name: getattr(jax.config, name) for name in CHANGED}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_open_to_others_is_closed(tmp_path, no_folder_yet):
    folder = tmp_path / "cache" / "cifar_flax" / "compiled"
    folder.mkdir(parents=True, mode=0o777)
    compilation.keep_programs()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_without_a_folder_programs_are_not_kept(tmp_path, no_folder_yet):
    (tmp_path / "cache").write_text("in the way")
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
