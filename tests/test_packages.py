"""Test that every mode reports missing, outdated or broken packages in one line, with the required version."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, needs_tensorflow, python_path

import cifar_flax
from cifar_flax import packages
from cifar_flax.errors import UserError

MODES = (
    ("--config=quickstart",),
    ("--mode=eval", "--workdir=run"),
    ("--mode=predict", "--workdir=run", "image.png"),
    ("--mode=compare", "one", "two"),
    ("--mode=export", "--workdir=run", "--output=exported"),
    ("--mode=doctor",),
)


def old(folder, name, version):
    """Write the metadata of another version of a package, which Python finds before the installed version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def broken(folder, module, error="ImportError"):
    """Write a module that cannot be imported."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(f"raise {error}('it was built for\\nanother NumPy')\n")


def start(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "cifar_flax", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path(folder / "first", REPOSITORY)},
        capture_output=True,
        text=True,
    )


def assert_one_line(error, *parts):
    """Assert that stderr is one error line that contains `parts`."""
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def advice(name):
    """Return the command that the error message suggests."""
    return f'pip install -U "{name}>={packages.PACKAGES[name].oldest}"'


@pytest.mark.parametrize("arguments", MODES, ids=lambda arguments: arguments[0])
def test_every_mode_reports_an_old_jax_in_one_line(tmp_path, arguments):
    old(tmp_path / "first", "jax", "0.9.1")
    done = start(tmp_path, *arguments)
    assert done.returncode == 1
    assert_one_line(done.stderr, "jax 0.9.1", "too old", advice("jax"))
    lines = done.stdout.splitlines()
    assert bool(lines) == (arguments == ("--mode=doctor",))
    if lines:
        assert lines[-1].startswith("FAIL  packages  jax 0.9.1")
    assert {path.name for path in tmp_path.iterdir()} == {"first"}


@pytest.mark.parametrize(("name", "version"), [("flax", "0.10.7"), ("optax", "0.2.5"), ("numpy", "1.26.4")])
def test_other_old_packages_are_reported_in_one_line(tmp_path, name, version):
    old(tmp_path / "first", name, version)
    done = start(tmp_path, "--config=quickstart")
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, f"{name} {version}", "too old", advice(name))


@pytest.mark.parametrize(("module", "name"), [("numpy", "numpy"), ("optax", "optax"), ("orbax", "orbax-checkpoint")])
@pytest.mark.parametrize("mode", ["--config=quickstart", "--mode=doctor"])
def test_a_broken_package_that_every_mode_needs_is_reported_in_one_line(tmp_path, module, name, mode):
    broken(tmp_path / "first", module)
    done = start(tmp_path, mode)
    assert done.returncode == 1
    reason = "ImportError: it was built for another NumPy"
    assert_one_line(done.stderr, f"{name} {packages.version(name)}", reason, advice(name))
    assert ("FAIL  packages" in done.stdout) == (mode == "--mode=doctor")


def test_a_run_works_without_broken_optional_packages(tmp_path):
    """JAX imports flatbuffers and ignores only an ImportError."""
    for module, error in (("PIL", "OSError"), ("tensorboardX", "TypeError"), ("flatbuffers", "RuntimeError")):
        broken(tmp_path / "first", module, error)
    names = ["pillow", "tensorboardX"]  # matplotlib imports Pillow
    if packages.installed("tensorflow"):
        broken(tmp_path / "first", "tensorflow", "TypeError")
        names.append("tensorflow")
    small = ("--config.train.epochs=1.5", "--config.model.width=2", "--config.model.hidden=8")
    done = start(tmp_path, "--config=quickstart", "--config.data.pipeline=auto", *small)
    assert (done.returncode, done.stderr) == (0, "")
    for name in names:
        (line,) = [line for line in done.stdout.splitlines() if name in line]
        assert f"{name} {packages.version(name)}" in line
        assert f"{name}>={packages.PACKAGES[name].oldest}" in line


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("sklearn", "scikit-learn", ("--config=quickstart",)),
        pytest.param(
            "tensorflow_datasets",
            "tensorflow-datasets",
            ("--config=resnet18", "--config.data.source=tfds"),
            marks=needs_tensorflow,
        ),
    ],
)
def test_a_broken_package_that_the_config_needs_is_reported_in_one_line(tmp_path, module, name, arguments):
    broken(tmp_path / "first", module)
    done = start(tmp_path, *arguments)
    assert done.returncode == 1
    assert_one_line(done.stderr, f"{name} {packages.version(name)}", "ImportError", advice(name))


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("PIL", "pillow", ("--mode=predict", "image.png")),
        ("safetensors", "safetensors", ("--mode=export", "--output=exported")),
        ("flatbuffers", "flatbuffers", ("--mode=export", "--output=exported")),
    ],
)
def test_a_broken_package_that_a_mode_needs_is_reported_in_one_line(straight, tmp_path, module, name, arguments):
    broken(tmp_path / "first", module)
    (tmp_path / "image.png").touch()
    done = start(tmp_path, *arguments, f"--workdir={straight[0]}")
    assert done.returncode == 1
    assert_one_line(done.stderr, f"{name} {packages.version(name)}", "ImportError", advice(name))
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import jax.not_there", "jax"),
        ("from optax import not_there", "optax"),
        ("import optax; optax.adam()", None),
        ("import json; json.loads('')", None),
    ],
)
def test_the_package_at_fault_is_found(code, name):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        exec(code)
    assert packages.culprit(raised.value) == name


def test_a_folder_left_of_an_uninstalled_package_is_reported(tmp_path, monkeypatch):
    (tmp_path / "left_over").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(packages.PACKAGES, "left-over", packages.Package("left_over", "1.0"))
    monkeypatch.setattr(packages, "_broken", {})
    for _ in range(2):
        with pytest.raises(UserError, match=r"left-over \(version unknown\) .*files are missing.*left-over>=1\.0"):
            packages.load("left-over")


def test_an_old_required_package_is_reported_to_programs(tmp_path, monkeypatch):
    old(tmp_path, "flax", "0.8.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"flax 0\.8\.0 .*too old.*flax>="):
        cifar_flax.load("run")


def test_old_optional_packages_are_refused(tmp_path, monkeypatch):
    old(tmp_path, "tqdm", "4.1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"tqdm 4\.1 .*too old.*tqdm>=4\.66"):
        packages.load("tqdm")


@pytest.mark.parametrize(
    ("version", "numbers"), [("0.12.0.1", [0, 12, 0, 1]), ("2.20.0rc1", [2, 20, 0]), ("0.10.dev3", [0, 10]), ("", [])]
)
def test_versions_are_compared_as_numbers(version, numbers):
    assert packages.numbers(version) == numbers
