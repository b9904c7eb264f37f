"""Packages that are missing, too old or broken: one line that names the version which is needed, in every mode."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

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
    """Make a distribution of that version, which Python finds before the installed one."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def broken(folder, module):
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise ImportError('it was built for\\nanother NumPy')\n")


def start(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "cifar_flax", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder / 'first'}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", MODES, ids=lambda arguments: arguments[0])
def test_an_old_jax_is_one_line_in_every_mode(tmp_path, arguments):
    old(tmp_path / "first", "jax", "0.9.1")
    done = start(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr == 'error: jax 0.9.1 is too old; jax>=0.10 is needed (pip install -U "jax>=0.10")\n'
    found = done.stdout.splitlines()
    assert bool(found) == (arguments == ("--mode=doctor",))
    if found:
        assert found[-1] == 'FAIL  packages  jax 0.9.1 is too old; jax>=0.10 is needed (pip install -U "jax>=0.10")'
    assert {path.name for path in tmp_path.iterdir()} == {"first"}


@pytest.mark.parametrize(("name", "version"), [("flax", "0.10.7"), ("optax", "0.2.5"), ("numpy", "1.26.4")])
def test_other_old_packages_are_one_line(tmp_path, name, version):
    old(tmp_path / "first", name, version)
    done = start(tmp_path, "--config=quickstart")
    wanted = f"{name}>={packages.PACKAGES[name].oldest}"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'error: {name} {version} is too old; {wanted} is needed (pip install -U "{wanted}")\n'


@pytest.mark.parametrize(("module", "name"), [("optax", "optax"), ("orbax", "orbax-checkpoint")])
@pytest.mark.parametrize("mode", ["--config=quickstart", "--mode=doctor"])
def test_a_broken_package_that_every_mode_needs_is_one_line(tmp_path, module, name, mode):
    broken(tmp_path / "first", module)
    done = start(tmp_path, mode)
    assert done.returncode == 1
    reason = "cannot be imported (ImportError: it was built for another NumPy)"
    wanted = f"{name}>={packages.PACKAGES[name].oldest}"
    assert (
        done.stderr
        == f'error: {name} {packages.version(name)} {reason}; {wanted} is needed (pip install -U "{wanted}")\n'
    )
    assert ("FAIL  packages" in done.stdout) == (mode == "--mode=doctor")


def test_a_run_survives_broken_packages_that_it_can_do_without(tmp_path):
    for module in ("matplotlib", "tensorboardX"):
        broken(tmp_path / "first", module)
    small = ("--config.train.epochs=1.5", "--config.model.width=2", "--config.model.hidden=8")
    done = start(tmp_path, "--config=quickstart", *small)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("matplotlib", "tensorboardX"):
        (line,) = [line for line in done.stdout.splitlines() if name in line]
        assert f"{name} {packages.version(name)} cannot be imported" in line
        assert f"{name}>={packages.PACKAGES[name].oldest} is needed" in line


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("sklearn", "scikit-learn", ("--config=quickstart",)),
        ("tensorflow", "tensorflow", ("--config=quickstart", "--config.data.pipeline=streaming")),
        ("tensorflow_datasets", "tensorflow-datasets", ("--config=resnet18",)),
    ],
)
def test_a_broken_package_that_the_run_needs_is_one_line(tmp_path, module, name, arguments):
    broken(tmp_path / "first", module)
    done = start(tmp_path, *arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"{name} {packages.version(name)} cannot be imported (ImportError: it was built for" in done.stderr
    assert f"{name}>={packages.PACKAGES[name].oldest} is needed" in done.stderr


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("PIL", "pillow", ("--mode=predict", "image.png")),
        ("safetensors", "safetensors", ("--mode=export", "--output=exported")),
    ],
)
def test_a_broken_package_that_a_mode_needs_is_one_line(straight, tmp_path, module, name, arguments):
    broken(tmp_path / "first", module)
    (tmp_path / "image.png").touch()
    done = start(tmp_path, *arguments, f"--workdir={straight[0]}")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"{name} {packages.version(name)} cannot be imported (ImportError: it was built for" in done.stderr
    assert f"{name}>={packages.PACKAGES[name].oldest} is needed" in done.stderr
    assert not (tmp_path / "exported").exists()


def test_old_optional_packages_are_refused(tmp_path, monkeypatch):
    old(tmp_path, "tqdm", "4.1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"the progress bar: tqdm 4\.1 is too old; tqdm>=4\.66 is needed"):
        packages.load("tqdm")


@pytest.mark.parametrize(
    ("version", "numbers"), [("0.12.0.1", [0, 12, 0, 1]), ("2.20.0rc1", [2, 20, 0]), ("0.10.dev3", [0, 10]), ("", [])]
)
def test_versions_are_compared_as_numbers(version, numbers):
    assert packages.numbers(version) == numbers
