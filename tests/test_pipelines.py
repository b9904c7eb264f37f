"""Test which pipeline `data.pipeline=auto` selects."""

import re
import sys
from types import SimpleNamespace

import pytest
from conftest import needs_tensorflow
from doctors import examine, one

from cifar_flax import data, packages
from cifar_flax.data import pipelines
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.modes import doctor, evaluate
from cifar_flax.modes.train import train
from cifar_flax.runtime import processes
from cifar_flax.training.trainer import Trainer

GIB = 2**30


def hide_tensorflow(monkeypatch):
    fault, missing = packages.fault, "tensorflow is not installed"
    monkeypatch.setattr(packages, "fault", lambda name: missing if name == "tensorflow" else fault(name))


@pytest.mark.parametrize(
    ("platform", "memory", "size", "expected"),
    [
        ("cpu", 16 * GIB, 1, "streaming"),
        ("gpu", 16 * GIB, 4 * GIB, "resident"),
        ("gpu", 16 * GIB, 4 * GIB + 1, "streaming"),
        ("gpu", None, GIB, "resident"),
        ("tpu", None, GIB + 1, "streaming"),
    ],
)
def test_auto_keeps_the_data_on_accelerators_if_it_fits(platform, memory, size, expected):
    layout = layout_of(platform, memory)
    assert resolve("auto", layout, size) == expected
    for name in ("streaming", "resident"):
        assert resolve(name, layout, size) == name


@pytest.mark.parametrize(("platform", "memory"), [("gpu", 2_000_000_000), ("cpu", None)])
def test_data_larger_than_the_memory_of_the_device_is_refused(monkeypatch, tmp_path, platform, memory):
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "unlimited").write_text("max\n")
    monkeypatch.setattr(pipelines, "_LIMITS", [str(tmp_path / name) for name in ("none", "memory.max", "unlimited")])
    layout = layout_of(platform, memory)
    assert resolve("resident", layout, 2_000_000_000) == "resident"
    with pytest.raises(ConfigError, match=r"data\.pipeline='resident': .*6\.1 GB.*2\.0 GB; use streaming"):
        resolve("resident", layout, 6_144_000_000)
    for name in ("auto", "streaming"):
        assert resolve(name, layout, 6_144_000_000) == "streaming"


def layout_of(platform, memory):
    device = SimpleNamespace(memory_stats=lambda: memory and {"bytes_limit": memory})
    return SimpleNamespace(platform=platform, mesh=SimpleNamespace(local_devices=[device]))


resolve = pipelines.resolve.__wrapped__  # bypasses the type check of the tests


@needs_tensorflow
def test_a_run_prints_its_pipeline_and_saves_auto(tiny_config, tmp_path, monkeypatch, capsys):
    """Without TensorFlow, the same config trains on the same batches to the same bits."""
    tiny_config.data.pipeline, tiny_config.train.epochs = "auto", 1
    tiny_config.train.steps_per_call = 4
    results = []
    for name in ("with", "without"):
        if name == "without":
            hide_tensorflow(monkeypatch)
        train(tiny_config, tmp_path / name)
        printed = capsys.readouterr().out
        assert "images (streaming), 12 steps" in printed
        assert ("batches are gathered with NumPy" in printed) == (name == "without")
        assert '"pipeline": "auto"' in (tmp_path / name / "config.json").read_text()
        results.append(evaluate.evaluate(tiny_config, tmp_path / name))
    assert results[0]["loss"] == results[1]["loss"]


def test_processes_must_agree_on_the_pipeline(tiny_config, monkeypatch):
    """One of them may have less memory."""
    tiny_config.data.pipeline, agreed = "auto", []
    monkeypatch.setattr(processes, "require_agreement", lambda **values: agreed.append(values))
    trainer = Trainer(tiny_config)
    assert trainer.pipeline in ("streaming", "resident")
    assert trainer.pipeline in [values.get("pipeline") for values in agreed]


def test_the_doctor_does_not_ask_for_tensorflow(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.data.pipeline = "streaming"
    hide_tensorflow(monkeypatch)
    doctor.doctor(tiny_config, tmp_path / "run")
    assert "a run can start" in capsys.readouterr().out


def test_a_run_does_without_a_tensorflow_that_cannot_be_imported(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(packages._broken, "tensorflow", UserError("tensorflow 1.0 cannot be imported"))
    monkeypatch.delitem(sys.modules, "cifar_flax.data.tensorflow", raising=False)
    monkeypatch.delattr(data, "tensorflow", raising=False)
    tiny_config.data.pipeline = "streaming"
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert re.search("NumPy.*: tensorflow 1.0 cannot be imported$", one(found, "note start"))
    assert reasons is None
