"""Exported networks, used by programs that do not import this package."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PREPARED, REPOSITORY, assert_same_classes, make_tiny_config, python_path
from safetensors.numpy import load_file

from cifar_flax.checkpoints import metadata
from cifar_flax.data import sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.export import program, run_program
from cifar_flax.models import AirbenchConfig, ResNetConfig
from cifar_flax.modes import export
from cifar_flax.modes.train import train
from cifar_flax.restore import restore, saved_config
from cifar_flax.training import evaluator
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.optimizers import OptimConfig

TOLERANCE = 1e-5  # in float32 on a CPU
INDEPENDENT = REPOSITORY / "tests" / "independent.py"
RECIPES = {
    "cnn": {},
    "cnn-tta": {"tta": "mirror_translate", "tta_fraction": 0.5},
    "airbench": {"model": AirbenchConfig(widths=(8, 8, 16)), "tta": "mirror_translate"},
    "airbench-deep": {
        "model": AirbenchConfig(widths=(8, 8, 16), depth=3, residual=True, init="sgd"),
        "tta": "mirror",
        "learning_rate": 0.1,  # its initial logits are close to 0
    },
    "resnet18": {"model": ResNetConfig(width=4), "averaging": AveragingConfig(name="ema", decay=0.9)},
}


def run_script(script, folder, images, tmp_path):
    """Run a copy of `script` in a process that cannot import this package; return the probabilities."""
    script = shutil.copy(script, tmp_path)
    fake = tmp_path / "fake" / "cifar_flax"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "__init__.py").write_text("raise SystemExit('imports cifar_flax')")
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "images.npy"), str(tmp_path / "found.npy")]
    environment = os.environ | {"PYTHONPATH": python_path(fake.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "found.npy")


def probabilities(run):
    """Return the test images of a run and the probabilities that evaluation computes for them, with TTA for all."""
    config = saved_config(run)
    config.eval.tta_fraction = 1.0
    trained = restore(config, run)
    arrays = sources.load(config.data, config.data.eval_split)
    return arrays.images, evaluator.final_evaluator(config, trained.task, arrays)(trained.state).probabilities


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory, straight):
    """Return a function that trains a recipe briefly at its first call and returns the workdir."""
    workdirs = {"cnn": straight[0]}

    def get(name):
        if name == "cnn-tta" and name not in workdirs:
            workdirs[name] = shutil.copytree(straight[0], tmp_path_factory.mktemp("runs") / name)
            saved = metadata.read_metadata(workdirs[name] / "checkpoints", 34)
            saved["config"]["eval"] |= RECIPES[name]
            metadata.write_metadata(workdirs[name] / "checkpoints" / "34", saved)
        if name not in workdirs:
            recipe = dict(RECIPES[name])
            config, rate = make_tiny_config(), recipe.pop("learning_rate", 3e-3)
            tta = {field: recipe.pop(field) for field in ("tta",) if field in recipe}
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **tta), **recipe)
            config.optim = OptimConfig(name="adamw", learning_rate=rate)
            config.train = dataclasses.replace(config.train, epochs=0.5)
            workdirs[name] = tmp_path_factory.mktemp("runs") / name
            train(config, workdirs[name])
        return workdirs[name]

    return get


SLOW = ("airbench", "airbench-deep", "resnet18")  # their compilation takes long


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RECIPES])
def test_programs_agree_with_evaluation(trained_runs, name, tmp_path, capsys):
    """Test the StableHLO program, run by JAX alone, and a NumPy program that reads the weights."""
    run, output = trained_runs(name), tmp_path / "exports" / "export"
    export.export(saved_config(run), run, output)
    assert {path.name for path in output.iterdir()} == {
        "config.json", "labels.txt", "model.safetensors", "model.stablehlo",
    }  # fmt: skip
    assert [path.name for path in output.parent.iterdir()] == ["export"]
    assert re.search(r"model\.stablehlo.*\b355\b.*\baccuracy\b", capsys.readouterr().out)
    images, expected = probabilities(run)
    found = run_script(run_program.__file__, output, images, tmp_path)
    assert_same_classes(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    found = run_script(INDEPENDENT, output, images, tmp_path)
    assert_same_classes(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def folder(straight, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "export"
    export.export(saved_config(straight[0]), straight[0], output)
    return output


def test_one_program_serves_all_batch_sizes_and_platforms(folder, straight):
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0]).startswith("uint8[batch,32,32,3]")
    images, expected = probabilities(straight[0])
    for count in (1, 2, 7):
        np.testing.assert_allclose(program.call(images[:count]), expected[:count], rtol=0, atol=TOLERANCE)


def test_all_files_have_the_same_permissions(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_exported_files_describe_the_network(folder, straight):
    exported = json.loads((folder / "config.json").read_text())
    assert exported["model"]["name"] == "cnn"
    assert exported["num_classes"] == len((folder / "labels.txt").read_text().splitlines()) == 10
    result = json.loads((straight[0] / "eval.json").read_text())
    assert exported["checked"]["accuracy"] == pytest.approx(result["accuracy"], abs=1.01 / 355)
    assert exported["checked"]["num_examples"] == result["num_examples"]
    trained = restore(saved_config(straight[0]), straight[0])
    weights = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(weights["hidden.kernel"], trained.state.params["hidden"]["kernel"])
    assert len(weights) == len(jax.tree.leaves(trained.weights))


def test_a_program_that_disagrees_is_not_written(straight, tmp_path, monkeypatch):
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 32, 32, 3), np.uint8)

    def wrong(trained):
        always_class_0 = jax.jit(lambda x: jax.nn.one_hot(jnp.zeros(x.shape[0], int), 10))
        return bytes(jax.export.export(always_class_0)(shape).serialize())

    monkeypatch.setattr(program, "stablehlo", wrong)
    with pytest.raises(UserError, match=r"\b355 test images.*probabilities"):
        export.export(saved_config(straight[0]), straight[0], tmp_path / "export")
    monkeypatch.setattr(program, "stablehlo", lambda trained: b"no program")
    with pytest.raises(UserError, match="another process"):
        export.export(saved_config(straight[0]), straight[0], tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "platform", "allowed"),
    [
        ("float32", "cpu", 1e-5), ("auto", "cpu", 1e-5), ("bfloat16", "cpu", 2**-5), ("float16", "cpu", 2**-8),
        ("float32", "gpu", 2**-8), ("auto", "gpu", 2**-5), ("float16", "gpu", 2**-8), ("auto", "tpu", 2**-5),
    ],
)  # fmt: skip
def test_the_allowed_difference_follows_from_dtype_and_platforms(dtype, platform, allowed):
    assert export.tolerance(dtype, platform, platform) == allowed
    assert export.tolerance(dtype, platform, "cpu") == export.tolerance(dtype, "cpu", platform) == allowed


def test_near_ties_may_change_their_class():
    expected = np.array([[0.5, 0.4, 0.1], [0.45, 0.44, 0.11], [0.2, 0.3, 0.5]])
    assert export.changed_classes(expected, expected, 0.02) == (0, 0)
    assert export.changed_classes(expected[:, [1, 0, 2]], expected, 0.02) == (1, 1)
    assert export.changed_classes(expected[:, [1, 0, 2]], expected, 0.2) == (0, 2)
    assert export.changed_classes(expected[:, [1, 0, 2]], expected, 1e-5) == (2, 0)
    swapped, expected = np.array([[0.494, 0.496, 0.01]]), np.array([[0.510, 0.480, 0.01]])  # both moved by 0.016
    assert export.changed_classes(swapped, expected, 0.02) == (0, 1)
    assert export.changed_classes(swapped, expected, 0.014) == (1, 0)


@pytest.mark.parametrize(("platform", "used"), [("tpu", "cpu"), ("gpu", None), ("cpu", None)])
def test_the_check_leaves_a_tpu_to_this_process(monkeypatch, platform, used):
    """Other platforms keep the user's choice, and leave the rest of a GPU's memory to both processes."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    variables = program.variables_beside(platform)
    assert variables.get("JAX_PLATFORMS") == used
    assert platform == "tpu" or variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_beside_a_tpu_the_program_runs_on_the_cpu(folder, straight, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # only for new processes
    images, expected = probabilities(straight[0])
    found, platform = program.run_in_new_process(folder, images[:5], "tpu")
    assert platform == "cpu"
    np.testing.assert_allclose(found, expected[:5], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "platform", "difference", "passes"), [
    ("float32", "cpu", 9e-6, True), ("float32", "cpu", 2e-5, False), ("float32", "gpu", 2e-3, True),
    ("bfloat16", "cpu", 0.02, True), ("bfloat16", "cpu", 0.04, False), ("float32", "gpu", 5e-3, False),
])  # fmt: skip
def test_export_allows_the_difference_of_dtype_and_platforms(
    straight, tmp_path, monkeypatch, dtype, platform, difference, passes
):
    """A program whose largest probability differs agrees in all classes."""
    shutil.copytree(straight[0], tmp_path / "run")
    saved = metadata.read_metadata(tmp_path / "run" / "checkpoints", 34)
    saved["config"]["model"]["dtype"] = dtype
    metadata.write_metadata(tmp_path / "run" / "checkpoints" / "34", saved)
    config = saved_config(tmp_path / "run")
    trained = restore(config, tmp_path / "run")
    arrays = sources.load(config.data, config.data.eval_split)
    expected = evaluator.final_evaluator(config, trained.task, arrays)(trained.state).probabilities
    found = expected + np.float32(difference) * np.eye(10, dtype=np.float32)[expected.argmax(axis=1)]
    monkeypatch.setattr(program, "run_in_new_process", lambda *_: (found, platform))
    allowed = export.tolerance(dtype, "cpu", platform)
    if not passes:
        with pytest.raises(UserError, match=rf"another class .*\b0 of 355\b.*allowed: {allowed:.2g}"):
            export.export(config, tmp_path / "run", tmp_path / "export")
        return
    export.export(config, tmp_path / "run", tmp_path / "export")
    checked = json.loads((tmp_path / "export" / "config.json").read_text())["checked"]
    assert (checked["platform"], checked["platform_of_evaluation"]) == (platform, "cpu")
    assert checked["allowed_difference_of_probabilities"] == allowed
    assert checked["largest_difference_of_probabilities"] == pytest.approx(difference, rel=0.02)


def test_existing_folders_are_not_overwritten(straight, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"^--output=.*exists"):
        export.export(saved_config(straight[0]), straight[0], tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.skipif(not list(PREPARED.glob("cifar10/*")), reason="TFDS_DATA_DIR has no prepared CIFAR-10")
def test_all_test_images_of_cifar10(tmp_path):
    """Run both programs of a briefly trained reference network on all 10,000 test images."""
    config = make_tiny_config()
    config.data = DataConfig(name="cifar10", pipeline="resident", data_dir=str(PREPARED))
    config.train = dataclasses.replace(config.train, epochs=0.2)
    config.optim = OptimConfig(name="adamw", learning_rate=1e-3)
    train(config, tmp_path / "run")
    export.export(saved_config(tmp_path / "run"), tmp_path / "run", tmp_path / "export")
    images, expected = probabilities(tmp_path / "run")
    assert len(expected) == 10_000
    for script in (run_program.__file__, INDEPENDENT):
        found = run_script(script, tmp_path / "export", images, tmp_path)
        assert_same_classes(found, expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
