"""Run studies of the tiny config: what they share, what they write, how they resume and share trials."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pages
import processes
import pytest
from conftest import REPOSITORY, assert_same_run, make_tiny_config, read_metrics

from cifar_flax import arguments
from cifar_flax.config import from_dict, program_settings
from cifar_flax.data import sources
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.files import lock_holder, locked
from cifar_flax.modes.compare import compare
from cifar_flax.modes.evaluate import evaluate
from cifar_flax.modes.study import study
from cifar_flax.modes.train import train
from cifar_flax.report import statistics
from cifar_flax.restore import saved_config
from cifar_flax.runtime.devices import Layout
from cifar_flax.training.trainer import Trainer

CONFIG = "from conftest import make_tiny_config as get_config\n"
RATES = "--config.optim.learning_rate=0.01,0.02"


def command(folder, *options):
    """Return the arguments of a study of the tiny config in `folder`."""
    file = folder.parent / "tiny.py"
    file.write_text(CONFIG)
    return ["--mode=study", f"--config={file}", f"--workdir={folder}", *options]


def run(folder, *options):
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
    assert found["split"] == "validation"
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
    assert (pair["method"], pair["split"]) == ("paired", "validation")


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
    ((pair, *_, method, more),) = pages.table(page, "Differences of accuracy")[1:]
    assert pair == "A \u2212 B"
    assert method == "paired"
    assert int(more.replace(",", "")) == found["differences"][0]["more_seeds"]
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
    drawn = pages.curves(pages.figure(page, "Loss, validation"))
    np.testing.assert_allclose(drawn[0][0][1], values.mean(axis=0), rtol=1e-2)


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
    with pytest.raises(ConfigError, match=r"--workdir=.*holds a run; choose another folder"):
        run(folder / "runs" / name)


# Field -> another value of it. Programs take the first ones as arguments; the others change them.
SCHEDULE = {
    "optim.learning_rate": 0.5, "optim.schedule": "linear", "optim.final_share": 0.5, "optim.final_epochs": 1.0,
    "optim.warmup_epochs": 1.0, "optim.warmup_start": 0.5, "optim.dense.learning_rate": 0.1,
    "optim.biases.learning_rate": 0.1, "seed": 7,
}  # fmt: skip
COMPILED = {"optim.weight_decay": 0.5, "optim.b1": 0.5, "train.label_smoothing": 0.1, "train.epochs": 4.0}


def changed(values):
    """Return the tiny config with other values of fields."""
    config = make_tiny_config()
    for path, value in values.items():
        *groups, name = path.split(".")
        setattr(functools.reduce(getattr, groups, config), name, value)
    config.validate()
    return config


def program(config, monkeypatch):
    """Return the text of the training program of `config`, before XLA's optimizations."""
    lowered = []

    def lower(self, step, state, inputs, *shared, batch_axis=0, donate=False):
        function = self.parallelize(step, shared=len(shared), batch_axis=batch_axis)
        lowered.append(function.lower(state, inputs, *shared))
        raise NotImplementedError

    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "compile", lower)
        with pytest.raises(NotImplementedError):
            trainer.compile(trainer.initial_state)
    return lowered[0].as_text()


def test_schedules_and_seeds_share_a_program(monkeypatch):
    base, other = make_tiny_config(), changed(SCHEDULE)
    assert program_settings(other) == program_settings(base)
    assert program(other, monkeypatch) == program(base, monkeypatch)
    for path, value in COMPILED.items():
        assert program_settings(changed({path: value})) != program_settings(base)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED)
def test_other_settings_change_the_program(path, monkeypatch):
    """If one of these tests fails, `config._ARGUMENTS` may list one more field."""
    assert program(changed({path: COMPILED[path]}), monkeypatch) != program(make_tiny_config(), monkeypatch)


def test_the_test_split_is_compared_on_request(tmp_path):
    found = run(tmp_path / "study", "--seeds=2", "--on-test", "--config.train.epochs=1")
    assert found["split"] == "test"
    trials = found["settings"][0]["trials"]
    for trial in trials:
        folder = tmp_path / "study" / "runs" / trial["name"]
        assert trial["accuracy"] == json.loads((folder / "eval.json").read_text())["accuracy"]
        assert saved_config(folder).data.validation_fraction == 0
    page = pages.read(tmp_path / "study" / "study.html")
    assert "test split: do not choose one by it" in page.one("p", class_="lead").text


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


@pytest.mark.slow
def test_augmented_evaluation_is_compared_too(tmp_path):
    """A field of the final evaluation changes the compared numbers, although evaluations of epochs ignore it."""
    found = run(tmp_path / "study", "--seeds=1", "--config.train.epochs=1", "--config.eval.tta=none,mirror")
    losses = [setting["loss"]["mean"] for setting in found["settings"]]
    assert losses[0] != losses[1]
    trial = json.loads((tmp_path / "study" / "runs" / "tiny_tta=mirror_seed0" / "trial.json").read_text())
    assert trial["validation"]["tta"] == "mirror"


def start(folder, *options, cores=None):
    """Start a study in a process of its own, on `cores`."""
    prefix = [] if cores is None else ["taskset", "-c", cores]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "cifar_flax", *command(folder, *options)],
        cwd=REPOSITORY,
        env=processes.environment(PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + processes.TIMEOUT
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


OPTIONS = ["--seeds=2", "--config.train.epochs=6"]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_study_goes_on(tmp_path, number):
    """Kill a study in its second trial; the same command ends with the results of an uninterrupted one."""
    folder = tmp_path / "study"
    second = folder / "runs" / "tiny_seed1"
    process = start(folder, *OPTIONS)
    wait_for(lambda: list((second / "checkpoints").glob("[0-9]*[0-9]")), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=processes.TIMEOUT)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert "1 of 2 trials have ended; run the same command to resume" in output
    first = folder / "runs" / "tiny_seed0" / "trial.json"
    before = first.stat().st_mtime_ns
    compare([folder], None)  # in the middle
    assert json.loads((folder / "study.json").read_text())["settings"][0]["accuracy"]["count"] == 1
    process = start(folder, *OPTIONS)
    output, _ = process.communicate(timeout=processes.TIMEOUT)
    assert process.returncode == 0, output
    assert first.stat().st_mtime_ns == before
    assert "tiny_seed0: " not in output
    whole = tmp_path / "whole"
    run(whole, *OPTIONS)
    config = from_dict(json.loads((second / "config.json").read_text()))
    for seed in range(2):
        name = f"tiny_seed{seed}"
        assert_same_run(config, whole / "runs" / name, folder / "runs" / name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_share_the_trials(tmp_path):
    cores = sorted(os.sched_getaffinity(0))[:2]
    options = ["--seeds=6", "--config.train.epochs=2"]
    both = [start(tmp_path / "study", *options, cores=str(core)) for core in cores]
    outputs = [process.communicate(timeout=processes.TIMEOUT)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    ran = [[seed for seed in range(6) if f"tiny_seed{seed}: " in output] for output in outputs]
    assert sorted(ran[0] + ran[1]) == list(range(6))
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert found["settings"][0]["accuracy"]["count"] == 6


def test_cores_of_a_study_are_used_by_one_process(finished):
    folder = finished[0]
    paths = sorted((folder / ".processes").iterdir())
    assert len(paths) == len(os.sched_getaffinity(0))
    with locked(paths[-1], wait=False), pytest.raises(UserError, match=r"already runs on core.* taskset -c CORES"):
        run(folder, RATES, "--seeds=2")


def test_a_trial_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys):
    """Wait for a trial whose lock is held; when its process dies, take the trial over."""
    folder = tmp_path / "study" / "runs" / "tiny_seed0"
    folder.mkdir(parents=True)
    slept = []
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"])

    def sleep(seconds):
        slept.append(seconds)
        other.kill()
        other.wait()

    wait_for(lambda: lock_holder(folder / ".lock") is not None, other)
    monkeypatch.setattr("cifar_flax.modes.study.time.sleep", sleep)
    found = run(tmp_path / "study", "--seeds=1", "--config.train.epochs=1")
    assert len(slept) >= 1
    assert found["settings"][0]["accuracy"]["count"] == 1


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


@pytest.mark.parametrize(
    ("name", "content"), [("study.json", "[1]"), ("study.json", "{"), ("trial.json", "{"), ("trial.json", '{"a": 1}')]
)
def test_damaged_files_are_reported(tmp_path, name, content):
    folder = tmp_path / "study"
    trial = folder / "runs" / "tiny_seed0"
    trial.mkdir(parents=True)
    (trial / "config.json").write_text('{"seed": 0}')
    (folder / "study.json").write_text(
        json.dumps(
            {"split": "validation", "settings": [{"name": "tiny", "values": {}, "trials": [{"name": "tiny_seed0"}]}]}
        )
    )
    (folder / name if name == "study.json" else trial / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"^PATH='.*': its {re.escape(name)} is damaged; remove"):
        compare([folder], None)
