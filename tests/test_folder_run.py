"""Train, evaluate, predict and export with folders of images."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import PREPARED, REPOSITORY, make_tiny_config, python_path
from doctors import examine, one
from folders import by_class, many, write, write_arrays
from PIL import Image
from processes import environment
from sklearn.datasets import load_sample_images

import cifar_flax
from benchmarks import decoding
from cifar_flax.data import datasets, sources
from cifar_flax.data.config import DataConfig
from cifar_flax.errors import UserError
from cifar_flax.export import program
from cifar_flax.modes import evaluate, export, predict
from cifar_flax.modes.train import train
from cifar_flax.restore import restore, saved_config
from cifar_flax.runtime.allocator import SETTINGS
from cifar_flax.training import evaluator
from cifar_flax.training.trainer import Trainer


def config_for(folder, side=16, **settings):
    config = make_tiny_config()
    config.data = DataConfig(folder=str(folder), image_size=side, pipeline="resident")
    config.train = dataclasses.replace(config.train, **{"batch_size": 8, "epochs": 2} | settings)
    return config


def photos(folder):
    """Write a photo in each format and color mode that is supported; large JPEGs are reduced while they are decoded."""
    folder.mkdir(parents=True)
    color = Image.fromarray(load_sample_images().images[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    transparent = color.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(color.size))
    deep = Image.fromarray(np.asarray(color.convert("L")).astype(np.uint16) * 257)
    for name, image, settings in (
        ("1.jpg", color, {"exif": turned}),
        ("2.jpg", color.convert("CMYK"), {}),
        ("3.jpg", color.convert("L"), {}),
        ("4.png", transparent, {}),
        ("5.png", deep, {}),
        ("6.gif", color.quantize(16), {}),
        ("7.webp", color, {"quality": 50}),
        ("8.bmp", color.resize((20, 9)), {}),
        ("9.png", color.convert("1"), {}),
    ):
        image.save(folder / name, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_once):
    """Return a folder of photos, the same in both splits, and the workdir of a run on it."""
    root = tmp_path_factory.mktemp("trained")
    photos(root / "in" / "train" / "photo")
    write(root / "in", *many("train/noise", count=9))
    shutil.copytree(root / "in" / "train", root / "in" / "test")
    train(config_for(root / "in"), root / "run")
    return root / "in", root / "run"


def test_all_modes_see_the_same_pixels(trained, tmp_path):
    """Training, evaluation, prediction and export read the same bytes from each file."""
    folder, workdir = trained
    config = saved_config(workdir)
    assert config.data.folder == str(folder)
    here, there = (sources.load(config.data, split) for split in ("train", "test"))
    np.testing.assert_array_equal(here.images, there.images)
    assert len(here.files) == 18
    model, paths = cifar_flax.load(workdir), [folder / name for name in there.files]
    assert model.class_names == ("noise", "photo")
    expected = model.predict(np.asarray(there.images))
    np.testing.assert_array_equal(model.predict(paths), expected)
    found = list(predict.classify(model, list(predict.find([folder / "test"], model.class_names))))
    assert [one.path for one in found] == paths
    assert [one.label for one in found] == [there.class_names[label] for label in there.labels]
    np.testing.assert_array_equal([one.probabilities for one in found], expected)
    run = restore(config, workdir)
    evaluated = evaluator.final_evaluator(config, run.task, there)(run.state).probabilities
    np.testing.assert_allclose(evaluated, expected, atol=1e-5)
    export.export(config, workdir, tmp_path / "exported")
    assert (tmp_path / "exported" / "labels.txt").read_text() == "noise\nphoto\n"
    exported, _ = program.run_in_new_process(tmp_path / "exported", there.images, "cpu")
    np.testing.assert_allclose(exported, expected, atol=1e-5)


def test_the_names_of_classes_and_files_are_in_the_results(trained):
    _, workdir = trained
    result = json.loads((workdir / "eval.json").read_text())
    assert list(result["per_class"]) == ["noise", "photo"]
    assert result["dataset"] == "in"
    assert "test/photo/2.jpg" in (workdir / "report.html").read_text()


def test_changed_data_end_a_finished_run_and_are_noted_in_an_evaluation(trained, tmp_path, capsys):
    folder, workdir = (shutil.copytree(path, tmp_path / f"{path.name}_copy") for path in trained)
    config = config_for(folder)
    train(config, workdir)  # a copy of the same files is the same data
    assert "is finished" in capsys.readouterr().out
    evaluate.evaluate(config, workdir)
    assert "has changed" not in capsys.readouterr().out
    (folder / "train" / "noise" / "3.png").rename(folder / "train" / "photo" / "3.png")
    with pytest.raises(UserError, match=r"data has changed .*train split.*--workdir"):
        train(config, workdir)
    evaluate.evaluate(config, workdir)
    assert "split has changed" not in capsys.readouterr().out
    (folder / "train" / "photo" / "3.png").rename(folder / "train" / "noise" / "3.png")
    write(folder, "test/noise/3.png", seed=5)
    with pytest.raises(UserError, match=r"data has changed .*test split"):
        train(config, workdir)
    evaluate.evaluate(config, workdir)
    assert "the test split has changed" in capsys.readouterr().out


def test_an_interrupted_run_does_not_resume_on_changed_data(trained, tmp_path):
    folder, workdir = (shutil.copytree(path, tmp_path / path.name) for path in trained)
    shutil.rmtree(workdir / "checkpoints" / max((path.name for path in (workdir / "checkpoints").iterdir()), key=int))
    write(folder, "train/noise/new.png", seed=3)
    with pytest.raises(UserError, match=r"data has changed .*18 training images before, 19 now"):
        train(config_for(folder), workdir)


def test_the_doctor_examines_a_folder_without_training(tmp_path):
    folder, config = write(tmp_path / "in", *many("cat", count=40), *many("dog", count=8)), config_for(tmp_path / "in")
    found, reasons = examine(config, tmp_path / "run")
    assert reasons is None
    assert "cat 29 + 11, dog 6 + 2" in one(found, "ok data 2 classes (train + test)")
    one(found, "ok data decoded to 16x16")
    one(found, "ok data images of 20x20 to 20x20 pixels, median 20x20 (48 files)")
    assert "4.8 times" in one(found, "note data the largest class")
    one(found, "ok start a training step needs")
    one(found, "ok start a run takes about")
    assert not (tmp_path / "run").exists()
    (folder / "cat" / "bad.png").write_text("no image")
    assert "cat/bad.png: not an image" in one(examine(config, tmp_path / "run")[0], "note data 1 ")
    for number in range(10):
        (folder / "dog" / f"{number}.png").write_text("no image")
    found, reasons = examine(config, tmp_path / "run")
    assert "data.max_bad_fraction=0.01" in reasons
    config.data.folder = str(tmp_path / "nowhere")
    assert "no such folder" in examine(config, tmp_path / "run")[1]


def trained_state(config):
    """Return the state after training, without checkpoints and evaluations."""
    trainer = Trainer(config)
    state, calls = trainer.initial_state, trainer.compile(trainer.initial_state)
    for call in trainer.inputs(config.seed, 0):
        state, _ = calls(state, call)
    return jax.device_get(state)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        pytest.param(
            "cifar10",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not (PREPARED / "cifar10").exists(), reason="TFDS has not prepared CIFAR-10"),
            ],
        ),
    ],
)
def test_a_data_set_written_as_files_is_the_same_data_and_the_same_run(name, tmp_path, monkeypatch, pytestconfig):
    """A folder is read class by class, so the arrays are sorted by class first."""
    whole = DataConfig(name=name, data_dir=str(PREPARED) if name == "cifar10" else "")
    limit = 300 if name == "digits" else 1000 if pytestconfig.getoption("--reduced") else None
    sorted_by_class = {}
    for split in ("train", "test"):
        arrays = sources.load(whole, split)
        order = by_class(arrays)[:: 1 if limit is None else -(-len(arrays.labels) // limit)]
        sorted_by_class[split] = dataclasses.replace(arrays, images=arrays.images[order], labels=arrays.labels[order])
    folder = write_arrays(tmp_path / "in", **sorted_by_class)
    config = config_for(folder, side=32, batch_size=100, epochs=1)
    for split, arrays in sorted_by_class.items():
        found = sources.load(config.data, split)
        np.testing.assert_array_equal(found.images, arrays.images)
        np.testing.assert_array_equal(found.labels, arrays.labels)
        assert found.class_names == arrays.class_names
    read = datasets.Dataset(read=lambda split, data_dir: sorted_by_class[split])
    monkeypatch.setitem(datasets.DATASETS, "sorted", read)
    same = config_for("", side=0, batch_size=100, epochs=1)
    same.data.name = "sorted"
    jax.tree.map(np.testing.assert_array_equal, trained_state(config), trained_state(same))


@pytest.mark.slow
def test_decoding_large_photos_takes_little_memory(tmp_path, pytestconfig):
    """Photos of 12 megapixels and at least 3 MB, several at a time."""
    count = 20 if pytestconfig.getoption("--reduced") else 200
    decoding.write_large(tmp_path / "in", count)
    command = [sys.executable, "-m", "benchmarks.decoding", "--decode", str(tmp_path / "in"), "64"]
    variables = environment(PYTHONPATH=python_path(REPOSITORY), **SETTINGS)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found, gigabytes = re.fullmatch(r"(\d+) files .* s, (.*) GB above the start", done.stdout.splitlines()[-1]).groups()
    assert int(found) == count
    assert float(gigabytes) < 1.2
