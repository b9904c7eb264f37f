"""Run studies of the tiny config: what they share, write and compare."""

import contextlib
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pages
import pytest
from conftest import assert_same_run, make_tiny_config, read_metrics

from cifar_flax import arguments
from cifar_flax.data import datasets, sources
from cifar_flax.errors import ConfigError
from cifar_flax.modes.compare import compare
from cifar_flax.modes.evaluate import evaluate
from cifar_flax.modes.study import _SharedPrograms, study
from cifar_flax.modes.train import train
from cifar_flax.report import comparison, statistics
from cifar_flax.restore import saved_config
from cifar_flax.runtime.devices import Layout
from cifar_flax.training import loop
from cifar_flax.training.operations import Part

CONFIG = "from conftest import make_tiny_config as get_config\n"
RATES = "--config.optim.learning_rate=0.01,0.02"


def command(folder, *options):
    """Return the arguments of a study of the tiny config in `folder`."""
    file = folder.parent / "tiny.py"
    file.write_text(CONFIG)
    return ["--mode=study", f"--config={file}", f"--workdir={folder}", *options]


def run(folder, *options):
    """Run a study in this process and return the content of study.json."""
    parsed = arguments.parse(command(folder, *options))
    study(parsed.space, parsed.search, parsed.workdir, on_test=parsed.on_test, is_large=parsed.is_large)
    return json.loads((folder / "study.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_once):
    """Return the folder of a study of two learning rates and two seeds, what it compiled and loaded, and its output."""
    folder, counts = tmp_path_factory.mktemp("studies") / "rates", {"programs": 0, "loads": 0}
    printed = io.StringIO()
    compile_, load = Layout.compile, sources.load_both

    def counted(self, *args, **settings):
        counts["programs"] += 1
        return compile_(self, *args, **settings)

    def counted_load(config):
        counts["loads"] += 1
        return load(config)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(Layout, "compile", counted)
        patch.setattr(sources, "load_both", counted_load)
        run(folder, RATES, "--seeds=2")
    return folder, counts, printed.getvalue().splitlines()


def test_data_is_loaded_and_each_program_compiled_once(finished):
    # The training step, and the evaluations on the validation split and on the test split.
    assert finished[1] == {"programs": 3, "loads": 1}


def test_output(finished):
    """The first trial prints the lines of a run, the others one line each; then the tables follow."""
    lines = finished[2]
    assert lines[0].startswith("data.validation_fraction is 0: 0.1 is set, since settings are compared on")
    assert lines[1] == f"{finished[0]}: 2 settings x 2 seeds, compared on the validation split"
    assert [line.split("/")[0] for line in lines if line.startswith("epoch")] == ["epoch 1.1", "epoch 2.1", "epoch 3.1"]
    pattern = r"\[(\d) of 4\] tiny_learning_rate=0.0(\d)_seed(\d): \d+\.\d\d% on the validation split"
    trials = [re.match(pattern, line).groups() for line in lines if line.startswith("[")]
    assert trials == [("1", "1", "0"), ("2", "1", "1"), ("3", "2", "0"), ("4", "2", "1")]
    assert {line.split()[0] for line in lines if re.match(r"[AB]  tiny_learning_rate", line)} == {"A", "B"}


def test_a_trial_equals_a_run_of_its_own(finished, tmp_path):
    trial = finished[0] / "runs" / "tiny_learning_rate=0.02_seed1"
    config = make_tiny_config()
    config.data.validation_fraction = 0.1
    config.optim.learning_rate, config.seed = 0.02, 1
    train(config, tmp_path / "alone")
    assert_same_run(config, tmp_path / "alone", trial)
    before = (trial / "eval.json").read_bytes()
    evaluate(saved_config(trial), trial)
    assert (trial / "eval.json").read_bytes() == before
    last = [line for line in read_metrics(trial) if line["split"] == "validation"][-1]
    validation = json.loads((trial / "trial.json").read_text())["validation"]
    assert (validation["split"], validation["accuracy"]) == ("validation", last["accuracy"])


def test_study_json_has_all_numbers_with_their_splits(finished):
    found = json.loads((finished[0] / "study.json").read_text())
    assert found["on_test"] is False
    for setting, rate in zip(found["settings"], (0.01, 0.02), strict=True):
        assert setting["values"] == {"optim.learning_rate": rate}
        accuracies = [trial["accuracy"] for trial in setting["trials"]]
        assert setting["accuracy"] == {"split": "validation", **dataclasses.asdict(statistics.mean_of(accuracies))}
        assert {trial["split"] for trial in setting["trials"]} == {"validation"}
        assert setting["operations"] > 1e8
        assert setting["training_seconds"] > 0
    (pair,) = found["differences"]
    means = {setting["name"]: setting["accuracy"]["mean"] for setting in found["settings"]}
    assert pair["mean"] == pytest.approx(means[pair["first"]] - means[pair["second"]])
    assert pair["split"] == "validation"


def test_the_page(finished, tmp_path, capsys):
    folder = finished[0]
    page = pages.read(folder / "study.html")
    assert page.one("h1").text == "Comparison of 2 settings, 4 runs"
    assert "compared on the validation split" in page.one("p", class_="lead").text
    found = json.loads((folder / "study.json").read_text())
    best = max(found["settings"], key=lambda setting: setting["accuracy"]["mean"])
    header, first, _ = pages.table(page, "Metrics of the runs")
    row = dict(zip(header, first, strict=True))
    assert row["setting"].endswith(best["name"])
    assert row["seeds"] == "2"
    assert row["accuracy"].startswith(f"{100 * best['accuracy']['mean']:.2f}")
    assert row["std"] == f"{100 * best['accuracy']['std']:.2f}"
    assert "PFLOP" in row["operations"]
    (shown,) = pages.table(page, "Differences of accuracy")[1:]
    pair = {name: value for name, value in found["differences"][0].items() if name != "split"}
    keys = {setting["name"]: setting["key"] for setting in found["settings"]}
    pair |= {side: keys[pair[side]] for side in ("first", "second")}
    assert tuple(shown) == comparison.difference_cells(statistics.Difference(**pair))
    links = [link.attributes["href"] for link in page.one("section", id="runs").all("a")]
    assert len(links) == 4
    assert all((folder / link.replace("%3D", "=")).exists() for link in links)
    figure = pages.figure(page, "Accuracy, validation")
    assert len(list(figure.all("path", class_="band"))) == 2
    compare([folder], tmp_path / "again.html")
    assert "learning_rate=0.01" in capsys.readouterr().out
    assert pages.table(pages.read(tmp_path / "again.html"), "Metrics of the runs")[1] == first


def test_curves_are_means_with_bands_of_one_std(finished):
    folder = finished[0]
    page = pages.read(folder / "study.html")
    name = pages.table(page, "Metrics of the runs")[1][0].split("\u2002")[1]
    runs = [read_metrics(folder / "runs" / f"{name}_seed{seed}") for seed in (0, 1)]
    values = np.array([[line["loss"] for line in lines if line["split"] == "validation"] for lines in runs])
    figure = pages.figure(page, "Loss, validation")
    np.testing.assert_allclose(pages.curves(figure)[0][0][1], values.mean(axis=0), rtol=1e-2)
    # The band's corners, in units of the chart: first the lower ends, then the upper ones backwards.
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", next(figure.all("path", class_="band")).attributes["d"])
    low, high = np.array(corners, float)[:, 1].reshape(2, -1)
    line = re.findall(r"[ML]([\d.]+) ([\d.]+)", next(figure.all("path", class_="line")).attributes["d"])
    middle = np.array(line, float)[:, 1]
    np.testing.assert_allclose((low + high[::-1]) / 2, middle, atol=0.02)
    scale = (middle[0] - middle[-1]) / (values.mean(axis=0)[0] - values.mean(axis=0)[-1])
    np.testing.assert_allclose(low - middle, -scale * values.std(axis=0, ddof=1), atol=0.05)


def test_a_finished_study_runs_nothing_again(finished, monkeypatch, capsys):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/trial.json")}
    monkeypatch.setattr("cifar_flax.training.loop.run", lambda *args: pytest.fail("a trial ran again"))
    run(folder, RATES, "--seeds=2")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/trial.json")} == before
    assert "learning_rate=0.02" in capsys.readouterr().out


def test_a_changed_setting_needs_another_folder(finished, tmp_path):
    folder, name = finished[0], "tiny_learning_rate=0.01_seed0"
    with pytest.raises(ConfigError, match=rf"{name}.*model\.hidden: 16 in the checkpoint, 8 in the config"):
        run(folder, RATES, "--seeds=2", "--config.model.hidden=8")
    # A run may resume with these, but its seeds would then differ.
    for change in ("train.log_every=5", "eval.tta=mirror"):
        with pytest.raises(ConfigError, match=rf"{name}.*was started with another config \({change.split('=')[0]}: "):
            run(folder, RATES, "--seeds=3", f"--config.{change}")
    with pytest.raises(ConfigError, match=r"--workdir=.*holds a run; choose another folder"):
        run(folder / "runs" / name)
    with pytest.raises(ConfigError, match=r"--workdir=.*holds a study; choose another folder for the run"):
        train(make_tiny_config(), folder)


def test_the_split_of_a_study_stays_what_it_is(tmp_path):
    """Compare a study on the test split once, into other files; its own stay on the validation split."""
    folder, options = (
        tmp_path / "study",
        ("--seeds=1", "--config.train.epochs=1", "--config.data.validation_fraction=0.1"),
    )
    on_test = run(folder, *options, "--on-test")
    assert on_test["settings"][0]["accuracy"]["split"] == "test"
    found = run(folder, *options)  # the same runs
    assert found["settings"][0]["accuracy"]["split"] == "validation"
    before = (folder / "study.json").read_bytes()
    compare([folder], None, on_test=True)
    assert (folder / "study.json").read_bytes() == before
    other = json.loads((folder / "study_on_test.json").read_text())
    assert (other["on_test"], other["settings"][0]["accuracy"]["split"]) == (True, "test")
    assert "test split" in pages.read(folder / "study_on_test.html").one("p", class_="lead").text
    compare([folder], None)
    assert json.loads((folder / "study.json").read_text())["settings"] == found["settings"]
    assert "validation split" in pages.read(folder / "study.html").one("p", class_="lead").text


def test_an_evaluation_split_named_validation(tmp_path, monkeypatch):
    """The held-out part of the train split is called validation, too."""
    digits = datasets.DATASETS["digits"]
    other = dataclasses.replace(
        digits,
        read=lambda split, folder: digits.read({"validation": "test"}.get(split, split), folder),
        splits=("train", "validation"),
    )
    monkeypatch.setitem(datasets.DATASETS, "digits", other)
    run(tmp_path / "study", "--seeds=1", "--config.train.epochs=1", "--config.data.eval_split=validation")
    trial = tmp_path / "study" / "runs" / "tiny_seed0"
    assert json.loads((trial / "eval.json").read_text())["num_examples"] == 355
    assert json.loads((trial / "trial.json").read_text())["validation"]["num_examples"] == 144
    assert (trial / "report.html").exists()


def test_operations_are_those_of_the_steps_that_were_trained():
    rows = [("initialization", 5, "images", 7), ("first phase", 10, "steps", 100), ("second phase", 20, "steps", 400)]
    shared = SimpleNamespace(_parts=[Part(*row) for row in (*rows, ("final evaluation", 9, "images", 50))])
    assert _SharedPrograms.operations(shared, 30, is_evaluated=True) == 7 + 100 + 400 + 50
    assert _SharedPrograms.operations(shared, 15, is_evaluated=True) == 7 + 100 + 100 + 50
    assert _SharedPrograms.operations(shared, 4, is_evaluated=False) == 7 + 40


def test_a_study_without_runs_is_reported_in_one_line(finished, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_bytes((finished[0] / "study.json").read_bytes())
    with pytest.raises(ConfigError, match=r"^PATH='.*': no trial of this study has started yet$"):
        compare([tmp_path / "study"], None)


def test_the_test_split_is_compared_on_request(tmp_path, capsys):
    found = run(tmp_path / "study", "--seeds=2", "--on-test", "--config.train.epochs=1")
    assert found["on_test"] is True
    assert "% on the test split" in capsys.readouterr().out
    assert found["settings"][0]["accuracy"]["split"] == "test"
    trials = found["settings"][0]["trials"]
    for trial in trials:
        folder = tmp_path / "study" / "runs" / trial["name"]
        assert trial["accuracy"] == json.loads((folder / "eval.json").read_text())["accuracy"]
        assert saved_config(folder).data.validation_fraction == 0
    page = pages.read(tmp_path / "study" / "study.html")
    assert (
        "the split for the final evaluation (--on-test): do not choose one by it" in page.one("p", class_="lead").text
    )


def test_diverged_trials_are_reported_and_not_run_again(tmp_path, capsys, monkeypatch):
    options = ["--config.optim.name=sgd", "--config.optim.weight_decay=0", "--config.train.epochs=1", "--seeds=2"]
    found = run(tmp_path / "study", *options, "--config.optim.learning_rate=0.01,1e30")
    assert [[trial["status"] for trial in setting["trials"]] for setting in found["settings"]] == [
        ["finished"] * 2, ["diverged"] * 2
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "Runs that diverged: 2 of B." in printed
    assert "Lower optim.learning_rate" in printed
    monkeypatch.setattr("cifar_flax.training.loop.run", lambda *args: pytest.fail("a trial ran again"))
    run(tmp_path / "study", *options, "--config.optim.learning_rate=0.01,1e30")


def test_a_setting_that_does_not_fit_into_memory_does_not_end_the_study(tmp_path, monkeypatch, capsys):
    run_loop = loop.run

    def limited(trainer, *args):
        if trainer.config.model.hidden > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return run_loop(trainer, *args)

    monkeypatch.setattr(loop, "run", limited)
    found = run(tmp_path / "study", "--config.model.hidden=32,16", "--seeds=1", "--config.train.epochs=1")
    statuses = {setting["name"]: setting["trials"][0]["status"] for setting in found["settings"]}
    assert statuses == {"tiny_hidden=32": "failed", "tiny_hidden=16": "finished"}
    assert "tiny_hidden=32_seed0: failed out of memory (JaxRuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().out


@pytest.mark.slow
def test_augmented_evaluation_is_compared_too(tmp_path):
    """A field of the final evaluation changes the compared numbers, although evaluations of epochs ignore it."""
    found = run(tmp_path / "study", "--seeds=1", "--config.train.epochs=1", "--config.eval.tta=none,mirror")
    losses = [setting["loss"]["mean"] for setting in found["settings"]]
    assert losses[0] != losses[1]
    trial = json.loads((tmp_path / "study" / "runs" / "tiny_tta=mirror_seed0" / "trial.json").read_text())
    assert trial["validation"]["tta"] == "mirror"


def test_runs_of_one_config_are_averaged_over_seeds(finished, tmp_path, capsys):
    """Compare plain runs: those that differ only in the seed form one setting."""
    runs = [finished[0] / "runs" / f"tiny_learning_rate={rate}_seed{seed}" for rate in (0.01, 0.02) for seed in (0, 1)]
    compare(runs, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert page.one("h1").text == "Comparison of 2 settings, 4 runs"
    results = [json.loads((folder / "eval.json").read_text())["accuracy"] for folder in runs]
    rows = pages.table(page, "Metrics of the runs")
    row = dict(zip(rows[0], rows[1], strict=True))
    assert row["setting"] == "A\u2002tiny_learning_rate=0.01"
    assert row["accuracy"].startswith(f"{100 * np.mean(results[:2]):.2f}")
    assert "test split" in page.one("p", class_="lead").text
    assert "A - B" in capsys.readouterr().out
