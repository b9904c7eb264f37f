"""The doctor finds what would keep a run from starting, and changes nothing."""

import logging
import re
from pathlib import Path

import jax
import pytest
from doctors import everything, examine, leave_out_what_compiles, one

from cifar_flax import config as configs
from cifar_flax import packages, workdir
from cifar_flax.checkpoints import metadata
from cifar_flax.diagnosis import devices, nvidia
from cifar_flax.runtime import allocator


@pytest.fixture
def visit(tiny_config, tmp_path, monkeypatch):
    """Examines the tiny config, but for what compiles."""
    leave_out_what_compiles(monkeypatch)
    return lambda: examine(tiny_config, tmp_path / "run")


def begin(folder, config):
    """A run that has come to its first checkpoint."""
    with workdir.opened(folder, config):
        path = folder / "checkpoints" / "34"
        path.mkdir(parents=True)
        metadata.write_metadata(path, {"step": 34, "config": configs.to_dict(config)})


def test_a_run_that_can_start(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv(*next(iter(allocator.SETTINGS.items())))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax.jit(abs)(1.0)  # JAX opens its folder
    compiled = Path(jax.config.jax_compilation_cache_dir)
    before = everything(tmp_path), {path.name for path in compiled.glob("jit*")}
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert reasons is None
    names = ["python", "packages", "devices", "programs", "memory", "data", "start", "workdir", "disk"]
    assert [finding.split()[1] for finding in found if finding.startswith("ok")] == names
    assert one(found, "ok packages").endswith(f"jaxlib=={packages.version('jaxlib')}")
    assert one(found, "ok data") == "ok data digits: 1442 images to train, 355 images to test"
    assert one(found, "ok start") == "ok start config, data and devices fit: 34 steps on cpu"
    assert one(found, "ok programs").endswith(str(compiled))
    assert (everything(tmp_path), {path.name for path in compiled.glob("jit*")}) == before


def test_the_platform_that_is_asked_for_is_not_there(visit, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Unable to initialize\nbackend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found, reasons = visit()
    wanted = "devices JAX_PLATFORMS=cuda: RuntimeError: Unable to initialize backend 'cuda'"
    assert one(found, "FAIL") == f"FAIL {wanted}"
    assert reasons == f"exit code 1: a run would fail: {wanted.replace(' ', ': ', 1)}"
    assert not [finding for finding in found if finding.split()[1] in ("programs", "memory")]


def test_what_jax_warns_of_is_the_reason_for_an_unused_gpu(visit, monkeypatch):
    found_devices = jax.devices()
    monkeypatch.setattr(nvidia, "why_unused", lambda warned: f"not used: {warned}")

    def find():
        logging.getLogger("jax_plugins.xla_cuda13").warning("CUDA version check failed:\n%s", "cuDNN is too old")
        return found_devices

    monkeypatch.setattr(jax, "devices", find)
    assert one(visit()[0], "note devices").endswith("NVIDIA GPU: not used: CUDA version check failed: cuDNN is too old")
    assert not logging.getLogger("jax_plugins").handlers


def test_what_a_run_refuses_before_its_first_step(tiny_config, tmp_path):
    tiny_config.train.batch_size = 2000
    assert examine(tiny_config, tmp_path / "run")[1].startswith(
        "exit code 1: a run would fail: start: train.batch_size=2000: must be at most the 1442 examples"
    )


def test_a_check_that_fails_itself_is_a_note_among_others(visit, monkeypatch):
    def crash():
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(devices, "machine", crash)
    found, reasons = visit()
    assert one(found, "note devices") == "note devices the check itself failed: ZeroDivisionError: oh"
    assert found[-1].startswith("ok disk")
    assert reasons is None


def test_a_run_that_goes_on_needs_room_for_fewer_checkpoints(visit, tiny_config, tmp_path):
    assert "about 110 MB" in one(visit()[0], "ok disk the run")
    begin(tmp_path / "run", tiny_config)
    before = everything(tmp_path)
    found, reasons = visit()
    assert reasons is None
    assert one(found, "ok workdir").endswith("run: a run, to go on after step 34")
    assert "about 80 MB" in one(found, "ok disk the run")
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_written(visit, tmp_path):
    (tmp_path / "run").touch(0o777)
    reason = f"disk: {tmp_path / 'run'} cannot be written to, for the run"
    assert visit()[1] == f"exit code 1: a run would fail: {reason}"


def test_the_run_of_another(visit, tiny_config, tmp_path):
    with workdir.opened(tmp_path / "run", tiny_config):
        before = everything(tmp_path)
        assert re.search(r"workdir: --workdir=.*: process \d+ on .* trains there", visit()[1])
        assert everything(tmp_path) == before
    assert visit()[1] is None


def test_a_run_of_another_config(visit, tiny_config, tmp_path):
    begin(tmp_path / "run", tiny_config)
    tiny_config.seed = 1
    assert "holds a run of another config (seed: 0 in the checkpoint, 1 in the config)" in visit()[1]


@pytest.mark.parametrize(
    ("tunables", "text"),
    [
        (allocator.SETTINGS["GLIBC_TUNABLES"], "ok memory glibc malloc keeps freed memory for the next step"),
        ("", "CPU steps are about 1.5 times slower: GLIBC_TUNABLES is set"),
    ],
)
def test_memory(visit, monkeypatch, tunables, text):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    (finding,) = [finding for finding in visit()[0] if finding.split()[1] == "memory"]
    assert finding.endswith(text)
