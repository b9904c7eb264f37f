"""`--mode=doctor` reports why a run would fail, and changes nothing."""

import logging
import re
from pathlib import Path

import jax
import pytest
from doctors import examine, one, skip_compilation, snapshot

from cifar_flax import config as configs
from cifar_flax import packages, workdir
from cifar_flax.checkpoints import metadata
from cifar_flax.checkpoints.storage import Storage
from cifar_flax.diagnosis import devices, nvidia
from cifar_flax.runtime import allocator


@pytest.fixture
def examination(tiny_config, tmp_path, monkeypatch):
    """Return a function that examines the tiny config, without the checks that compile programs."""
    skip_compilation(monkeypatch)
    return lambda: examine(tiny_config, tmp_path / "run")


def start_run(folder, config):
    """Write the files of a run that has one checkpoint, at step 34."""
    with workdir.opened(folder, config):
        path = folder / "checkpoints" / "34"
        path.mkdir(parents=True)
        metadata.write_metadata(path, {"step": 34, "config": configs.to_dict(config)})


def test_a_run_that_can_start(tiny_config, tmp_path, monkeypatch):
    packages.load("matplotlib")  # its first import writes a cache
    monkeypatch.setenv(*next(iter(allocator.SETTINGS.items())))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax.jit(abs)(1.0)  # opens the compilation cache
    compiled = Path(jax.config.jax_compilation_cache_dir)
    before = snapshot(tmp_path), {path.name for path in compiled.glob("jit*")}
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert reasons is None
    names = ["python", "packages", "devices", "programs", "memory", "data", "start", "workdir", "disk"]
    assert [finding.split()[1] for finding in found if finding.startswith("ok")] == names
    assert one(found, "ok packages").endswith(f"jaxlib=={packages.version('jaxlib')}")
    assert re.search(r"digits\b.*\b1442\b.*\b355\b", one(found, "ok data"))
    assert re.search(r"\b34 steps\b.*\bcpu\b", one(found, "ok start"))
    assert one(found, "ok programs").endswith(str(compiled))
    assert (snapshot(tmp_path), {path.name for path in compiled.glob("jit*")}) == before


def test_an_unavailable_platform_is_reported(examination, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Unable to initialize\nbackend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(packages, "cuda_fault", lambda: None)
    found, reasons = examination()
    wanted = "devices JAX_PLATFORMS=cuda: RuntimeError: Unable to initialize backend 'cuda'"
    assert one(found, "FAIL") == f"FAIL {wanted}"
    assert re.fullmatch(f"exit code 1: .*: {re.escape(wanted.replace(' ', ': ', 1))}", reasons)
    assert not [finding for finding in found if finding.split()[1] in ("programs", "memory")]


def test_the_warnings_of_jax_are_the_reason_for_an_unused_gpu(examination, monkeypatch):
    found_devices = jax.devices()
    monkeypatch.setattr(nvidia, "why_unused", lambda warned: f"not used: {warned}")

    def find():
        logging.getLogger("jax_plugins.xla_cuda13").warning("CUDA version check failed:\n%s", "cuDNN is too old")
        return found_devices

    monkeypatch.setattr(jax, "devices", find)
    assert one(examination()[0], "note devices").endswith(": not used: CUDA version check failed: cuDNN is too old")
    assert not logging.getLogger("jax_plugins").handlers


def test_errors_before_the_first_step_are_reported(tiny_config, tmp_path):
    tiny_config.train.batch_size = 2000
    reasons = examine(tiny_config, tmp_path / "run")[1]
    assert re.search(r"^exit code 1: .*start: train\.batch_size=2000: .*1442", reasons)


def test_an_error_of_a_check_is_a_note(examination, monkeypatch):
    def crash():
        raise ZeroDivisionError("unexpected")

    monkeypatch.setattr(devices, "machine", crash)
    found, reasons = examination()
    assert one(found, "note devices").endswith("ZeroDivisionError: unexpected")
    assert found[-1].startswith("ok disk")
    assert reasons is None


def test_a_resumed_run_needs_space_for_fewer_checkpoints(examination, tiny_config, tmp_path):
    assert "110 MB" in one(examination()[0], "ok disk the run")
    start_run(tmp_path / "run", tiny_config)
    before = snapshot(tmp_path)
    found, reasons = examination()
    assert reasons is None
    assert re.search(r"/run: .*\b34$", one(found, "ok workdir"))
    assert "80 MB" in one(found, "ok disk the run")
    assert snapshot(tmp_path) == before


def test_an_unwritable_folder_is_reported(examination, tmp_path):
    (tmp_path / "run").touch(0o777)
    assert re.search(f"^exit code 1: .*disk: {tmp_path / 'run'} .*writable", examination()[1])


def test_a_name_that_the_system_refuses_is_reported(tiny_config, tmp_path, monkeypatch):
    skip_compilation(monkeypatch)
    reasons = examine(tiny_config, tmp_path / ("a" * 300))[1]
    assert re.search("^exit code 1: .*workdir: .*File name too long", reasons)


def test_a_checkpoint_that_cannot_be_saved_is_reported(examination, tmp_path, monkeypatch):
    """The doctor saves and restores one, in a folder of which nothing is left."""
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "verify", lambda storage, path, described: 1 / 0)
        assert re.search("^exit code 1: .*workdir: .*step 1 could not be saved in .*/run;", examination()[1])
    assert examination()[1] is None
    assert snapshot(tmp_path) == before


def test_a_run_that_another_process_trains_is_reported(examination, tiny_config, tmp_path):
    with workdir.opened(tmp_path / "run", tiny_config):
        before = snapshot(tmp_path)
        assert re.search(r"workdir: --workdir=.*: .*process \d+ on ", examination()[1])
        assert snapshot(tmp_path) == before
    assert examination()[1] is None


def test_a_run_of_another_config_is_reported(examination, tiny_config, tmp_path):
    start_run(tmp_path / "run", tiny_config)
    tiny_config.seed = 1
    assert re.search(r"workdir: --workdir=.*seed: 0 .*\b1 ", examination()[1])


@pytest.mark.parametrize(
    ("tunables", "pattern"),
    [
        (allocator.SETTINGS["GLIBC_TUNABLES"], "^ok memory .*glibc"),
        ("", "^note memory .*GLIBC_TUNABLES"),
    ],
)
def test_allocator_settings_are_reported(examination, monkeypatch, tunables, pattern):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    (finding,) = [finding for finding in examination()[0] if finding.split()[1] == "memory"]
    assert re.search(pattern, finding)
