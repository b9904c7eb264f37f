"""Test which pipeline `data.pipeline=auto` selects."""

import sys
from types import SimpleNamespace

import pytest
from conftest import needs_tensorflow
from doctors import examine, one

from cifar_flax import data, packages
from cifar_flax.data import pipelines
from cifar_flax.errors import UserError
from cifar_flax.modes import doctor, evaluate
from cifar_flax.modes.train import train
from cifar_flax.runtime import processes
from cifar_flax.training.trainer import Trainer

GIB = 2**30


def hide_tensorflow(monkeypatch):
    fault, missing = packages.fault, "tensorflow is not installed"
    monkeypatch.setattr(packages, "fault", lambda name: missing if name == "tensorflow" else fault(name))


@pytest.mark.parametrize(
    ("platform", "memory", "size", "has_tensorflow", "expected"),
    [
        ("cpu", 16 * GIB, 1, True, "streaming"),
        ("cpu", 16 * GIB, 1, False, "resident"),
        ("gpu", 16 * GIB, 4 * GIB, True, "resident"),
        ("tpu", 16 * GIB, 4 * GIB, False, "resident"),
        ("gpu", 16 * GIB, 4 * GIB + 1, True, "streaming"),
        ("gpu", 16 * GIB, 4 * GIB + 1, False, "resident"),
        ("gpu", None, GIB, True, "resident"),
        ("tpu", None, GIB + 1, True, "streaming"),
    ],
)
def test_auto_keeps_the_data_on_accelerators_if_it_fits(monkeypatch, platform, memory, size, has_tensorflow, expected):
    monkeypatch.setattr(packages, "fault", lambda name: None)
    if not has_tensorflow:
        hide_tensorflow(monkeypatch)
    device = SimpleNamespace(memory_stats=lambda: memory and {"bytes_limit": memory})
    layout = SimpleNamespace(platform=platform, mesh=SimpleNamespace(local_devices=[device]))
    assert pipelines.resolve.__wrapped__("auto", layout, size) == expected  # bypasses the type check of the tests
    for name in ("streaming", "resident"):
        assert pipelines.resolve.__wrapped__(name, layout, size) == name


@needs_tensorflow
def test_a_run_prints_its_pipeline_and_saves_auto(tiny_config, tmp_path, monkeypatch, capsys):
    """Without TensorFlow, the same config trains from device memory, also in evaluation."""
    tiny_config.data.pipeline, tiny_config.train.epochs = "auto", 1
    tiny_config.train.steps_per_call = 4
    results = []
    for name, pipeline in (("with", "streaming"), ("without", "resident")):
        if name == "without":
            hide_tensorflow(monkeypatch)
        train(tiny_config, tmp_path / name)
        assert f"images ({pipeline}), 12 steps" in capsys.readouterr().out
        assert '"pipeline": "auto"' in (tmp_path / name / "config.json").read_text()
        results.append(evaluate.evaluate(tiny_config, tmp_path / name))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)


def test_processes_must_agree_on_the_pipeline(tiny_config, monkeypatch):
    """One of them may have less memory, or no TensorFlow."""
    tiny_config.data.pipeline, agreed = "auto", []
    monkeypatch.setattr(processes, "require_agreement", lambda **values: agreed.append(values))
    trainer = Trainer(tiny_config)
    assert trainer.pipeline in ("streaming", "resident")
    assert trainer.pipeline in [values.get("pipeline") for values in agreed]


def test_the_doctor_does_not_ask_for_tensorflow(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.data.pipeline = "auto"
    hide_tensorflow(monkeypatch)
    doctor.doctor(tiny_config, tmp_path / "run")
    assert "a run can start" in capsys.readouterr().out
    tiny_config.data.pipeline = "streaming"
    with pytest.raises(UserError, match="tensorflow is not installed"):
        doctor.doctor(tiny_config, tmp_path / "run")


def test_auto_does_without_a_tensorflow_that_cannot_be_imported(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(packages._broken, "tensorflow", UserError("tensorflow 1.0 cannot be imported"))
    monkeypatch.setattr(pipelines, "resolve", lambda *arguments: "streaming")
    for module in ("streaming", "tensorflow"):
        monkeypatch.delitem(sys.modules, f"cifar_flax.data.{module}", raising=False)
        monkeypatch.delattr(data, module, raising=False)
    tiny_config.data.pipeline = "auto"
    found, reasons = examine(tiny_config, tmp_path / "run")
    assert one(found, "note start").endswith("data.pipeline is resident: tensorflow 1.0 cannot be imported")
    assert reasons is None
    tiny_config.data.pipeline = "streaming"
    assert "tensorflow 1.0 cannot be imported" in examine(tiny_config, tmp_path / "run")[1]
