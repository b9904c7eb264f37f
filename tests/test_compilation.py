import json
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import namespaces
import numpy as np
import pytest
from conftest import REPOSITORY, python_path
from jax.experimental.compilation_cache import compilation_cache

from cifar_flax import files
from cifar_flax.models.cpu.pooling import max_over_places
from cifar_flax.models.cpu.threefry import random_words
from cifar_flax.runtime import compilation
from cifar_flax.training.evaluator import Evaluator
from cifar_flax.training.trainer import Trainer

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.py")
CHANGED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
TINY = ("model.width=2", "model.hidden=8", "train.batch_size=256", "train.epochs=1", "optim.warmup_epochs=0")

# Run main.py with the command-line arguments, and print JAX's event counts of the compilation cache.
PROGRAM = """
import collections, json, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
from cifar_flax import cli
code = cli.main()
print(json.dumps(counts))
sys.exit(code)
"""


def start(tmp_path, number):
    arguments = [f"--config.{field}" for field in TINY]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--config", QUICKSTART, f"--workdir=runs/{number}", *arguments],
        env=os.environ | {"PYTHONPATH": python_path(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
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


def test_optimization_barriers_are_kept():
    """Without the option, jax 0.10 fuses the sine into its users."""
    run = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.sin(x)) + 1, compiler_options=compilation.options("cpu"))
    functions = run.lower(jnp.zeros(1000)).compile().as_text().split("\n\n")
    (with_sine,) = [function for function in functions if " sine(" in function]
    assert " add(" not in with_sine


def test_a_pooling_maximum_is_computed_once():
    """As in the reference network, an activation, a normalization and the gradient use the maximum."""

    def loss(x):
        y = jnp.abs(max_over_places(x) + 1)
        return jnp.sum(((y - jnp.mean(y)) / jnp.std(y)) ** 3)

    run = jax.jit(jax.value_and_grad(loss), compiler_options=compilation.options("cpu"))
    assert run.lower(jnp.zeros((64, 4, 128))).compile().as_text().count(" maximum(") == 3  # of four values


def test_random_words_are_computed_without_a_loop():
    run = jax.jit(lambda keys: random_words(keys, 100), compiler_options=compilation.options("cpu"))
    assert " while(" not in run.lower(jax.random.split(jax.random.key(0), 8)).compile().as_text()


def test_training_and_evaluation_are_compiled_with_the_options(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config)
    monkeypatch.setattr(compilation, "options", lambda platform, **how: {f"no_such_option_of_{platform}": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option_of_cpu"):
        trainer.compile(trainer.initial_state)
    evaluator = Evaluator(trainer.task, trainer.arrays, trainer.examples, 16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option_of_cpu"):
        evaluator(trainer.initial_state)


@pytest.mark.parametrize(
    ("variable", "value", "used"),
    [("JAX_ENABLE_COMPILATION_CACHE", "false", None), ("JAX_COMPILATION_CACHE_DIR", "elsewhere", "elsewhere")],
)
def test_environment_variables_of_jax_take_precedence(tmp_path, variable, value, used):
    program = "import jax; from cifar_flax.runtime import compilation; compilation.enable_cache(); jax.jit(abs)(1.0)"
    environment = os.environ | {"PYTHONPATH": python_path(REPOSITORY), variable: value}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
    written = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache")}
    assert written == ({used} if used else set())


@pytest.fixture
def no_folder_yet():
    """Unset the folder of the compilation cache, and restore it after the test."""
    before = {name: getattr(jax.config, name) for name in CHANGED}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_compilation_cache_is_limited_in_size(monkeypatch, no_folder_yet):
    folder = files.user_cache() / "compiled"
    folder.mkdir(parents=True)
    for age in range(10):
        (folder / f"{age}-cache").write_bytes(bytes(1000))
        os.utime(folder / f"{age}-cache", (10**9 - age, 10**9 - age))
    (folder / "autotuned").mkdir()
    os.utime(folder / "autotuned", (1, 1))
    compilation.enable_cache()
    assert len(list(folder.glob("*-cache"))) == 10
    monkeypatch.setattr(compilation, "_MAX_BYTES", 3500)
    compilation.enable_cache()
    # The folder is set already, perhaps by the user, so nothing is removed.
    assert len(list(folder.glob("*-cache"))) == 10
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.enable_cache()
    assert sorted(path.name for path in folder.iterdir()) == ["0-cache", "1-cache", "2-cache", "autotuned"]


def test_the_cache_folder_becomes_accessible_to_its_owner_only(tmp_path, no_folder_yet):
    folder = tmp_path / "cache" / "cifar_flax" / "compiled"
    folder.mkdir(parents=True, mode=0o777)
    compilation.enable_cache()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_without_a_folder_programs_are_not_cached(tmp_path, no_folder_yet):
    (tmp_path / "cache").write_text("in the way")
    compilation.enable_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def cache_folder(tmp_path):
    """Return an empty folder that JAX will use as its compilation cache."""
    names = *CHANGED, "jax_enable_compilation_cache", "jax_persistent_cache_min_entry_size_bytes"
    before = {name: getattr(jax.config, name) for name in names}
    folder = tmp_path / "cache_folder"
    folder.mkdir()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_probe_of_the_compilation_cache_leaves_nothing(cache_folder):
    (cache_folder / "jit_other-cache").touch()
    assert compilation.cache_problem() is None
    assert [path.name for path in cache_folder.glob("jit*")] == ["jit_other-cache"]
    jax.jit(lambda x: x + 271828)(0)
    assert [path.name for path in cache_folder.glob("jit*")] == ["jit_other-cache"]
    jax.clear_caches()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: x + 271828)(0)
    assert len(list(cache_folder.glob("jit*"))) > 1


def test_why_programs_are_not_cached(cache_folder, tmp_path):
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 10**9)
    assert compilation.cache_problem().startswith(f"{cache_folder} ")
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    compilation_cache.reset_cache()
    assert re.search(f"{tmp_path}/file .*FileExistsError: ", compilation.cache_problem())
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation.cache_problem().startswith(f"{files.user_cache()}/compiled ")
    jax.config.update("jax_enable_compilation_cache", False)
    assert "JAX_ENABLE_COMPILATION_CACHE" in compilation.cache_problem()


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_programs_are_removed_with_one_line(cache_folder, capfd, damage):
    def compile_all():
        jax.clear_caches()
        events = []

        def listen(event, **_):
            events.append(event)

        jax.monitoring.register_event_listener(listen)
        try:
            for function in (jnp.sin, jnp.cos, jnp.tan):
                for size in (3, 4):
                    jax.jit(lambda x, function=function: function(x) + 1)(np.zeros(size))
        finally:
            jax.monitoring.unregister_event_listener(listen)
        return sum(event.endswith("/cache_hits") for event in events)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compile_all()
    programs = [path for path in cache_folder.iterdir() if path.name.endswith("-cache")]
    (cache_folder / "another_file").touch()
    for path in programs:
        DAMAGES[damage](path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        compilation.enable_cache()
        assert compile_all() == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"compiled programs in {cache_folder} cannot be read; they are removed")
    assert compile_all() == len(programs) > 3
    assert (cache_folder / "another_file").exists()


FULL_DISK = """
import os
import jax, jax.numpy as jnp
from cifar_flax.runtime import compilation

def compile_all():
    jax.clear_caches()
    compilation.enable_cache()
    for function in (jnp.sin, jnp.cos, jnp.sort, jnp.tan):
        jax.jit(function)(jnp.ones(3))

compilation.enable_cache()
filling = compilation.program_cache() + "/filling"
with open(filling, "wb") as file:
    file.write(bytes(95_000))
compile_all()
print(compilation.cache_problem())
os.remove(filling)
compile_all()  # prints a line if it finds an incomplete program
"""


def test_a_full_disk_is_one_line_and_leaves_no_incomplete_program(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": python_path(REPOSITORY)}
    done = namespaces.run_on_small_disk(tmp_path, "100k", [sys.executable, "-c", FULL_DISK], env=environment)
    folder = tmp_path / "cifar_flax" / "compiled"
    assert re.match(f"{folder} cannot be used .*No space left on device", done.stdout), done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(f"compiled programs in {folder} cannot be written; .*No space left on device", line)
