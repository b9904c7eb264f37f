"""The settings of JAX and the hardware that a run depends on."""

import contextlib
import os
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, assert_same_run, make_tiny_config

import cifar_flax
from cifar_flax import cli
from cifar_flax.modes.train import train
from cifar_flax.runtime import environment, settings

OTHERS = {False: True, True: False, "allow": "disallow", "standard": "strict", "ignore": "raise"}


@contextlib.contextmanager
def other_settings(names=tuple(settings.PINNED)):
    """Set every pinned setting of this version of JAX to another value."""
    others = {name: OTHERS[settings.PINNED[name]] for name in names if hasattr(jax.config, name)}
    before = {name: getattr(jax.config, name) for name in others}
    with pytest.MonkeyPatch.context() as patch:
        try:
            for name, value in others.items():
                jax.config.update(name, value)
                patch.setenv(name.upper(), str(value))
            yield others
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


def test_settings_of_other_programs_do_not_change_a_run(straight, tmp_path):
    with other_settings() as others:
        lines = settings.pin()
        train(make_tiny_config(), tmp_path / "run")
    assert [line.partition("=")[0].lower() for line in lines] == list(others)
    assert_same_run(make_tiny_config(), straight[0], tmp_path / "run")


def test_the_command_line_pins_the_settings(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--mode=eval"])
    with other_settings(["jax_enable_x64"]):
        assert cli.main() == 2
        assert not jax.config.jax_enable_x64
    assert "JAX_ENABLE_X64=True: ignored" in capsys.readouterr().err.splitlines()[0]


# Settings of the program that calls `cifar_flax.load`. The others are for debugging or concern random numbers.
OF_A_PROGRAM = [name for name in settings.PINNED if not name.startswith(("jax_error", "jax_no_", "jax_scan3"))]


def test_a_program_with_other_settings_uses_a_model_and_keeps_them(straight):
    model = cifar_flax.load(straight[0])
    images = np.random.default_rng(0).integers(0, 256, (5, *model.image_shape), np.uint8)
    expected = model.predict(images)
    with other_settings(OF_A_PROGRAM) as others:
        found = cifar_flax.load(straight[0]).predict(images)
        assert {name: getattr(jax.config, name) for name in others} == others
    np.testing.assert_array_equal(found, expected)


def test_changes_that_round_differently_are_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    before = environment.provenance("cpu")
    assert environment.changes(before, before) == []
    monkeypatch.setattr(environment, "usable_cores", lambda: 99)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    hardware, flags = environment.changes(before, environment.provenance("cpu"))
    assert hardware.startswith("hardware: ")
    assert "now 99 cores of " in hardware
    assert flags == "XLA_FLAGS: not set, now --xla_cpu_enable_fast_math=true"


@pytest.mark.parametrize("cores", [1, 4])
def test_only_usable_cores_are_counted(monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3, 3 + cores)), raising=False)
    assert environment.usable_cores() == cores
    assert environment.machine().startswith(f"{cores} core{'s' if cores > 1 else ''} of ")


def test_cores_are_counted_in_one_place():
    files = [*REPOSITORY.glob("cifar_flax/**/*.py"), *REPOSITORY.glob("benchmarks/**/*.py")]
    assert [path.name for path in files if "cpu_count" in path.read_text()] == ["environment.py"]
