"""Test `--mode=predict` and `Classifier.predict`: files and arrays get the same probabilities as in evaluation."""

import csv
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_counts, make_tiny_config
from PIL import Image, ImageOps

import cifar_flax
from cifar_flax.arguments import parse
from cifar_flax.data import sources
from cifar_flax.data.info import DatasetInfo
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.modes.predict import _inverted, predict
from cifar_flax.restore import restore, saved_config
from cifar_flax.training import evaluator

TEST = sources.load(DataConfig(name="digits"), "test")
COUNT = len(TEST.labels)


@pytest.fixture(scope="module")
def run(straight):
    return straight[0]


@pytest.fixture(scope="module")
def evaluation(run):
    config = make_tiny_config()
    trained = restore(config, run)
    return evaluator.final_evaluator(config, trained.task, TEST)(trained.state)


@pytest.fixture(scope="module")
def model(run):
    return cifar_flax.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write the test split as PNG files, in one folder per class."""
    folder = tmp_path_factory.mktemp("photos")
    for place, (image, label) in enumerate(zip(TEST.images, TEST.labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{place:03}.png")
    return folder


def predicted(run, paths, output, **changes):
    config = saved_config(run)
    config.eval = dataclasses.replace(config.eval, **changes)
    predict(config, run, paths, output)
    return json.loads(output.read_text())


def rows_by_place(result):
    """Return the probabilities, of shape [examples, classes], in the order of the split."""
    rows = {int(row["file"][-7:-4]): list(row["probabilities"].values()) for row in result["predictions"]}
    return np.array([rows[place] for place in range(COUNT)], np.float32)


def test_files_get_the_probabilities_of_evaluation(run, evaluation, photos, tmp_path):
    result = predicted(run, [photos], tmp_path / "p.json")
    np.testing.assert_allclose(rows_by_place(result), evaluation.probabilities, rtol=0, atol=1e-5)
    assert result["accuracy"] == np.trace(result["confusion_matrix"]) / COUNT
    assert_same_counts(result["confusion_matrix"], evaluation.summary["confusion_matrix"])
    assert (result["num_labelled"], result["dataset"], result["step"]) == (COUNT, "digits", 34)


@pytest.mark.parametrize("settings", [{"tta": "mirror"}, {"tta": "mirror_translate"}])
def test_test_time_augmentation_equals_evaluation(run, evaluation, photos, tmp_path, settings):
    config = make_tiny_config()
    config.eval = dataclasses.replace(config.eval, **settings)
    trained = restore(config, run)
    expected = evaluator.final_evaluator(config, trained.task, TEST)(trained.state).probabilities
    settings = settings | {"tta_fraction": 0.25}  # of a split; prediction applies TTA to all images
    probabilities = rows_by_place(predicted(run, [photos], tmp_path / "p.json", **settings))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    assert np.abs(probabilities - evaluation.probabilities).max() > 0.01


@pytest.mark.parametrize("count", [0, 1, 2, 3, 99, 100, 101, COUNT])
def test_arrays_of_any_number_of_images(model, evaluation, count):
    probabilities = model.predict(TEST.images[:count])
    assert probabilities.shape == (count, 10)
    np.testing.assert_allclose(probabilities, evaluation.probabilities[:count], rtol=0, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_classifier_accepts_arrays_and_files(model, evaluation, photos):
    np.testing.assert_array_equal(model.predict(jnp.asarray(TEST.images[:3])), model.predict(TEST.images[:3]))
    files = sorted(photos.glob("*/00[0-4].png"), key=lambda path: path.name)
    np.testing.assert_allclose(model.predict(files), evaluation.probabilities[:5], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(model.predict(map(str, files)), model.predict(files))
    assert "Classifier of 32x32x3 images: 10 classes, 0, 1" in repr(model)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "float32"),
        (np.zeros((2, 28, 28, 3), np.uint8), "(2, 28, 28, 3)"),
        (np.zeros((32, 32, 3), np.uint8), " (32, 32, 3)"),
        ("cat.png", "list of"),
        (None, "list of"),
        ([np.zeros((32, 32, 3), np.uint8)], "list of"),
        (["gone.png"], "gone.png: no such file"),
    ],
)
def test_invalid_images_are_refused(model, images, message):
    with pytest.raises(UserError) as caught:
        type(model).predict.__wrapped__(model, images)  # bypasses the type check of the tests
    assert message in str(caught.value)


def test_swapped_dark_and_light_is_hinted_at(run, photos, tmp_path, capsys):
    predicted(run, [photos], tmp_path / "p.json")
    assert "hint" not in capsys.readouterr().out
    (tmp_path / "inverted").mkdir()
    for path in sorted(photos.rglob("*.png"))[::10]:
        ImageOps.invert(Image.open(path)).save(tmp_path / "inverted" / path.name)
    predict(saved_config(run), run, [tmp_path / "inverted"], None)
    assert capsys.readouterr().out.splitlines()[-1].startswith("hint: dark and light may be swapped")


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),  # CIFAR-10
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # normalization "unit"
    ],
)
def test_photos_of_any_brightness_give_no_hint(mean, std):
    info = DatasetInfo(name="a", image_shape=(32, 32, 3), class_names=("a",), num_examples=1, mean=mean, std=std)
    assert not [value for value in range(256) if _inverted([float(value)], info)]
    assert not _inverted([], info)


@pytest.fixture
def mixed(tmp_path, photos):
    """Return a folder with two images and two files that are not images."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, source in (("b.png", "0/000.png"), ("d.png", "1/001.png")):
        (folder / name).write_bytes(next(photos.glob(f"*/{source[2:]}")).read_bytes())
    (folder / "a.txt").write_text("not an image")
    (folder / "c\x1b[2J.png").write_bytes(b"")
    (tmp_path / "nothing" / "in" / "it").mkdir(parents=True)
    return folder


def test_invalid_files_are_reported_and_the_rest_classified(run, mixed, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        predict(saved_config(run), run, [mixed, tmp_path / "gone.png", tmp_path / "nothing"], None)
    assert caught.value.exit_code == 1
    assert "4 of 6" in str(caught.value)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "class", "probability", "runners-up"]
    assert len(lines) == 6
    for place, reason in ((0, "not an image"), (2, "empty"), (4, "no such file"), (5, "folder")):
        assert reason in lines[place]
    with pytest.raises(UserError):  # writes the same probabilities, not rounded
        predict(saved_config(run), run, [mixed], tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())["predictions"]
    for line, fields in ((lines[1], rows[1]), (lines[3], rows[3])):
        row = np.array(list(fields["probabilities"].values()), np.float32)
        first, second, third = np.argsort(-row)[:3]
        expected = f"{first} {row[first]:.2%} {second} {row[second]:.2%}, {third} {row[third]:.2%}"
        assert line.split()[1:] == expected.split()
    assert "\x1b" not in "".join(lines)


def test_all_output_formats_have_the_same_content(run, mixed, tmp_path, capsys):
    rows = {}
    for kind in ("csv", "json", "jsonl"):
        output = tmp_path / f"p.{kind}"
        with pytest.raises(UserError):
            predict(saved_config(run), run, [mixed], output)
        printed = capsys.readouterr().out
        assert "2 files classified" in printed
        assert "a.txt: not an image" in printed
        content = output.read_text()
        if kind == "csv":
            rows[kind] = list(csv.DictReader(content.splitlines()))
            assert {len(row) for row in csv.reader(content.splitlines())} == {5 + 10}
        elif kind == "json":
            rows[kind] = json.loads(content)["predictions"]
        else:
            rows[kind] = [json.loads(line) for line in content.splitlines()]
    assert rows["json"] == rows["jsonl"]
    for row, flat in zip(rows["json"], rows["csv"], strict=True):
        assert flat["file"] == row["file"]
        assert flat["error"] == row.get("error", "")
        if not flat["error"]:
            assert {name: float(flat[f"p({name})"]) for name in "0123456789"} == row["probabilities"]
            assert (flat["class"], float(flat["probability"])) == (row["class"], row["probability"])
            assert row["probability"] == max(row["probabilities"].values())


def test_file_names_that_are_not_utf8(run, photos, tmp_path, capsys):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes((next(photos.glob("*/000.png"))).read_bytes())
    for output in (None, tmp_path / "p.csv", tmp_path / "p.jsonl"):
        predict(saved_config(run), run, [tmp_path / "in"], output)
    assert b"caf\xe9.png" in (tmp_path / "p.csv").read_bytes()
    assert "caf?.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p.xml", "p", "gone/p.csv", "folder.csv"])
def test_invalid_output_is_refused_before_the_run_is_read(tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="--output="):
        predict(make_tiny_config(), tmp_path / "nowhere", [tmp_path], tmp_path / name)


@pytest.mark.parametrize("value", ["=mirror", " mirror"])
def test_paths_and_settings_may_be_in_any_order(run, value):
    arguments = f"cat.jpg --mode=predict dog.png --config.eval.tta{value} --workdir={run} holiday/"
    command = parse(arguments.split())
    assert command.paths == (Path("cat.jpg"), Path("dog.png"), Path("holiday"))
    assert command.config.eval.tta == "mirror"
    assert command.output is None
