import logging
import re
import shutil
from pathlib import Path

import jax
import pytest
from conftest import REPOSITORY
from doctors import disk_with, everything, examine, leave_out_what_compiles, one

from cifar_flax import config as configs
from cifar_flax import packages, workdir
from cifar_flax.checkpoints import metadata
from cifar_flax.diagnosis import nvidia
from cifar_flax.modes import doctor
from cifar_flax.packages import installed_version
from cifar_flax.runtime import allocator, compilation


@pytest.fixture
def visit(tiny_config, tmp_path, monkeypatch):
    """The doctor's, but for what compiles."""
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
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    monkeypatch.setattr(nvidia, "why_unused", lambda told: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax.jit(abs)(1.0)  # JAX opens its folder
    compiled = Path(jax.config.jax_compilation_cache_dir)
    before = everything(tmp_path), set(compiled.iterdir())
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert reasons is None
    assert [finding.split()[:2] for finding in found] == [["ok", name] for name in doctor._CHECKS]
    assert one(found, "ok packages").endswith(
        f"scikit-learn=={installed_version('scikit-learn')} jaxlib==" + jax.lib.__version__
    )
    assert one(found, "ok data") == "ok data digits: 1442 images to train, 355 images to test"
    assert one(found, "ok start") == "ok start config, data and devices fit: 34 steps on cpu"
    assert one(found, "ok programs").endswith(str(compiled))
    assert (everything(tmp_path), set(compiled.iterdir())) == before


def test_programs_that_are_not_kept(visit, monkeypatch):
    monkeypatch.setattr(compilation, "why_not_kept", lambda: "the folder is full")
    found, reasons = visit()
    assert one(found, "note programs") == "note programs compiled at each start: the folder is full"
    assert reasons is None


def test_it_asks_for_what_requirements_txt_asks_for():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    wanted = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)
    ours = packages.NEEDED | packages.NEEDED_BY_SOME
    assert {name: wanted[name] for name in ours} == ours


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("flax", None, "flax is missing"),
        ("jax", "0.9.2", "jax 0.9.2 is older than 0.10"),
        ("scikit-learn", None, "scikit-learn is missing"),
        ("optax", "0.10", None),  # newer than 0.2.6
        ("tensorflow", None, None),  # not needed
    ],
)
def test_packages(visit, monkeypatch, package, version, message):
    monkeypatch.setattr(
        packages, "installed_version", lambda name: version if name == package else installed_version(name)
    )
    reasons = visit()[1]
    assert reasons == (
        message and f"exit code 1: a run would fail: packages: {message} (pip install -U -r requirements.txt)"
    )


def test_streaming_needs_tensorflow_under_any_name(tiny_config, visit, monkeypatch):
    tiny_config.data.pipeline = "streaming"
    names = {"tensorflow": ["tensorflow-elsewhere"]}
    monkeypatch.setattr(packages.importlib.metadata, "packages_distributions", lambda: names)
    others = {"tensorflow-elsewhere": "2.20", "tensorflow": None}
    monkeypatch.setattr(packages, "installed_version", lambda name: others.get(name) or installed_version(name))
    assert "tensorflow==2.20" in one(visit()[0], "ok packages")
    others["tensorflow-elsewhere"] = "2.19.1"
    assert "tensorflow 2.19.1 is older than 2.20" in visit()[1]


def test_optional_packages_are_told(visit, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda module: module not in ("tqdm", "PIL"))
    found, reasons = visit()
    assert reasons is None
    assert one(found, "note packages").endswith("left out: progress bar, --mode=predict (Pillow)")


@pytest.mark.parametrize(("pythons", "mark"), [(((3, 5), (3, 6)), "note"), (((3, 98), (3, 99)), "FAIL")])
def test_python(visit, monkeypatch, pythons, mark):
    monkeypatch.setattr(doctor, "_PYTHONS", pythons)
    assert one(visit()[0], f"{mark} python").endswith(f"; 3.{pythons[0][1]} to 3.{pythons[1][1]} are supported")


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


def test_a_gpu_that_is_not_used_is_told_with_what_jax_says(visit, monkeypatch):
    devices = jax.devices()
    monkeypatch.setattr(nvidia, "why_unused", lambda told: f"not used: {told}")

    def find():
        logging.getLogger("jax_plugins.xla_cuda13").warning("CUDA version check failed:\n%s", "cuDNN is too old")
        return devices

    monkeypatch.setattr(jax, "devices", find)
    assert one(visit()[0], "note devices").endswith("NVIDIA GPU: not used: CUDA version check failed: cuDNN is too old")
    assert not logging.getLogger("jax_plugins").handlers


def test_a_tpu_that_jax_does_not_find(visit, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(nvidia, "why_unused", lambda told: None)
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    assert "TPU: libtpu is installed, but JAX finds none (RuntimeError: " in one(visit()[0], "note devices")


def test_what_a_run_refuses_before_its_first_step(tiny_config, tmp_path):
    tiny_config.train.batch_size = 2000
    assert examine(tiny_config, tmp_path / "run")[1].startswith(
        "exit code 1: a run would fail: start: train.batch_size=2000: must be at most the 1442 examples"
    )


def test_a_run_that_would_crash(visit, monkeypatch):
    def crash(config):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "Trainer", crash)
    assert visit()[1] == "exit code 1: a run would fail: start: ZeroDivisionError: oh"


def test_a_check_that_fails_itself_is_a_note_among_others(visit, monkeypatch):
    def crash():
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "machine", crash)
    found, reasons = visit()
    assert one(found, "note devices") == "note devices cannot be told: ZeroDivisionError: oh"
    assert found[-1].startswith("ok disk")
    assert reasons is None


def test_a_full_disk(visit, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(10_000_000))
    assert "disk: the run: about 110 MB, of 10 MB free in " in visit()[1]


def test_a_run_that_goes_on_needs_room_for_fewer_checkpoints(visit, tiny_config, tmp_path):
    assert "about 110 MB" in one(visit()[0], "ok disk the run")
    begin(tmp_path / "run", tiny_config)
    before = everything(tmp_path)
    found, reasons = visit()
    assert reasons is None
    assert one(found, "ok workdir").endswith("run: a run, to go on after step 34")
    assert "about 80 MB" in one(found, "ok disk the run")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_a_folder_that_cannot_be_written(visit, tmp_path, monkeypatch, obstacle):
    if obstacle == "a file":
        (tmp_path / "run").touch(0o777)
    else:
        monkeypatch.setattr(doctor.os, "access", lambda *arguments: False)
    place = tmp_path / "run" if obstacle == "a file" else tmp_path
    assert visit()[1] == f"exit code 1: a run would fail: disk: {place} cannot be written to, for the run"


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
        (allocator.SETTINGS["GLIBC_TUNABLES"], "ok memory what a step frees is kept for the next"),
        ("", "a third of its time: GLIBC_TUNABLES is set"),
        (None, "a third of its time: an accelerator's plugin is installed, or this is not glibc"),
    ],
)
def test_memory(visit, monkeypatch, tunables, text):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    (finding,) = [finding for finding in visit()[0] if finding.split()[1] == "memory"]
    assert finding.endswith(text)
