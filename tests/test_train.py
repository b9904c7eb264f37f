"""Test whole runs: files, evaluation, changed configs, averages, divergence and test-time augmentation."""

import dataclasses
import json
import re
import shutil

import fake_tfds  # noqa: F401  registers the datasets
import jax
import numpy as np
import pytest
from conftest import FILES, NOT_TIMES, assert_same_counts, final_state, read_metrics

from cifar_flax import arguments
from cifar_flax.data import sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.models import AirbenchConfig, CNNConfig, ResNetConfig
from cifar_flax.modes import evaluate
from cifar_flax.modes.train import train
from cifar_flax.restore import saved_config
from cifar_flax.training import evaluator
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.optimizers import GROUPS, GroupConfig, OptimConfig
from cifar_flax.training.trainer import Trainer

FIELDS = {*NOT_TIMES, "images_per_second", "input_wait_fraction"}
TRAIN_FIELDS = {*FIELDS, "skipped_steps", "checkpoint_blocked_seconds"}
EVALUATION_FIELDS = {*FIELDS, "top5_accuracy", "expected_calibration_error"}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def finished(straight, workdir):
    """Return a copy of the workdir of a finished run."""
    shutil.copytree(straight[0], workdir)
    return workdir


def test_a_run_writes_its_files(straight):
    workdir, out = straight
    names = {path.name for path in workdir.iterdir()}
    assert names == FILES

    records = read_metrics(workdir)
    for record in records:
        assert set(record) >= (TRAIN_FIELDS if record["split"] == "train" else EVALUATION_FIELDS)
    steps = [record["step"] for record in records if record["split"] == "train"]
    assert steps == sorted({*range(4, 34, 4), 12, 23, 34})  # every 4 steps and at the ends of epochs
    assert [record["step"] for record in records if record["split"] == "test"] == [12, 23, 34]
    assert all(record["epoch"] == pytest.approx(record["step"] * 128 / 1442) for record in records)
    assert records[0]["learning_rate"] > 0
    assert 0 <= records[0]["input_wait_fraction"] < 1

    result = json.loads((workdir / "eval.json").read_text())
    assert (result["dataset"], result["split"], result["step"], result["num_examples"]) == ("digits", "test", 34, 355)
    assert np.shape(result["confusion_matrix"]) == (10, 10)
    assert np.sum(result["confusion_matrix"]) == 355
    assert np.trace(result["confusion_matrix"]) / 355 == result["accuracy"] == records[-1]["accuracy"]
    assert f"{result['accuracy']:.2%}" in out
    assert repr(result["loss"]) in out
    assert (workdir / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_evaluation_is_bitwise_reproducible(straight, finished, capsys):
    (finished / "eval.json").unlink()
    evaluate.evaluate(saved_config(finished), finished)
    assert (finished / "eval.json").read_bytes() == (straight[0] / "eval.json").read_bytes()
    *figures, written = capsys.readouterr().out.splitlines()
    assert straight[1].splitlines()[-1 - len(figures) : -1] == figures
    assert written.startswith("written: ")


@pytest.mark.parametrize("batch_size", [1, 64, 355, 1000])
def test_evaluation_counts_each_example_once_for_any_batch_size(finished, batch_size):
    expected = json.loads((finished / "eval.json").read_text())
    command = arguments.parse(["--mode=eval", f"--workdir={finished}", f"--config.eval.batch_size={batch_size}"])
    result = evaluate.evaluate(command.config, command.workdir)
    assert result["num_examples"] == 355
    assert_same_counts(result["confusion_matrix"], expected["confusion_matrix"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("field", ["seed=1", "optim.learning_rate=1.0", "data.name='cifar10'", "train.batch_size=1"])
def test_evaluation_refuses_other_fields(finished, field):
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)}: .*\bdata\.data_dir, "):
        arguments.parse(["--mode=eval", f"--workdir={finished}", f"--config.{field}".replace("'", "")])


def test_a_finished_run_is_evaluated_again(tiny_config, finished, capsys):
    before = snapshot(finished / "checkpoints"), (finished / "metrics.jsonl").read_bytes()
    train(tiny_config, finished)
    out = capsys.readouterr().out
    assert "is finished" in out
    assert "accuracy" in out
    assert before == (snapshot(finished / "checkpoints"), (finished / "metrics.jsonl").read_bytes())


def test_another_config_is_refused_and_changes_no_file(tiny_config, finished):
    before = snapshot(finished)
    tiny_config.optim.learning_rate = 0.5
    with pytest.raises(
        ConfigError,
        match=r"optim\.learning_rate: 0\.01 .*, 0\.5 .*--workdir",
    ):
        train(tiny_config, finished)
    assert snapshot(finished) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seed": "x"}', "[" * 10**5])
def test_damaged_saved_config_is_reported(tiny_config, workdir, content):
    """The run has no checkpoint yet, which would contain the config too."""
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"\bconfig\.json .*(damaged|version).*--workdir"):
        train(tiny_config, workdir)
    assert (workdir / "config.json").read_text() == content


def test_a_run_without_steps_may_start_with_another_config(tiny_config, workdir):
    """The user notices a mistake at once, and starts again with a corrected config."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    tiny_config.train.epochs = 1
    train(tiny_config, workdir)
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 1


@pytest.mark.parametrize("emptied", [False, True])
def test_a_log_without_checkpoints_does_not_restart_the_run(tiny_config, finished, emptied):
    """The disk with the checkpoints may not be mounted, so that their folder is missing or empty."""
    shutil.rmtree(finished / "checkpoints")
    if emptied:
        (finished / "checkpoints").mkdir()
    before = snapshot(finished)
    for _ in range(2):
        with pytest.raises(UserError, match=r"\bmetrics\.jsonl\b.*\bcheckpoints\b"):
            train(tiny_config, finished)
    assert snapshot(finished) == before


def test_best_checkpoint_is_chosen_by_validation_accuracy(tiny_config, workdir, monkeypatch):
    """An early checkpoint gets the highest accuracy; `keep=1` alone would delete it."""
    tiny_config.data.validation_fraction = 0.2
    tiny_config.checkpoint.keep_best = 1
    tiny_config.checkpoint.keep = 1
    tiny_config.eval.checkpoint = "best"
    tiny_config.train.epochs = 4
    accuracies, evaluated = iter([0.2, 0.9, 0.3, 0.4, 0.5]), evaluator.Evaluator.__call__

    def scored(evaluator, state, *stopping):
        evaluation = evaluated(evaluator, state, *stopping)
        return dataclasses.replace(evaluation, summary=evaluation.summary | {"accuracy": next(accuracies)})

    monkeypatch.setattr(evaluator.Evaluator, "__call__", scored)
    train(tiny_config, workdir)
    curve = {r["step"]: r["accuracy"] for r in read_metrics(workdir) if r["split"] == "validation"}
    assert list(curve.values()) == [0.2, 0.9, 0.3, 0.4]
    _, best, _, last = curve
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {best, last}
    assert json.loads((workdir / "eval.json").read_text())["step"] == best
    assert not any(record["split"] == "test" for record in read_metrics(workdir))


@pytest.mark.parametrize("name", ["fake_color", "fake_gray"])
def test_other_image_shapes_train_with_tf_data(tiny_config, workdir, name):
    tiny_config.data = DataConfig(name=name, pipeline="streaming")
    tiny_config.train = dataclasses.replace(tiny_config.train, batch_size=8, epochs=8)
    train(tiny_config, workdir)
    result = json.loads((workdir / "eval.json").read_text())
    assert (result["num_examples"], np.shape(result["confusion_matrix"])) == (20, (2, 2))
    assert result["accuracy"] == 1.0  # the classes differ in brightness


@pytest.mark.parametrize(
    ("optim", "model"),
    [
        ({"name": "adam", "eps": 1e-7}, CNNConfig(width=4, hidden=16)),
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "schedule": "linear"}, CNNConfig(width=4, hidden=16)),
        ({"name": "adamw", "clip_norm": 1.0, "accumulate_steps": 2}, CNNConfig(width=4, hidden=16, dtype="bfloat16")),
        pytest.param({"name": "adam"}, ResNetConfig(width=2), marks=pytest.mark.slow),
        pytest.param(
            {"name": "muon", "momentum": 0.6}
            | {group: GroupConfig(learning_rate=0.1, momentum=0.8) for group in GROUPS},
            AirbenchConfig(widths=(4, 8, 8)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["adam", "sgd", "accumulation in bfloat16", "resnet", "muon"],
)
def test_checkpoints_restore_every_kind_of_state(tiny_config, workdir, optim, model):
    tiny_config.optim = OptimConfig(learning_rate=0.01, **optim)
    tiny_config.model = model
    tiny_config.train.epochs = 1
    train(tiny_config, workdir)
    losses = [record["loss"] for record in read_metrics(workdir) if record["split"] == "train"]
    assert losses[-1] < losses[0]
    state = final_state(tiny_config, workdir)
    assert int(state.step) == 12
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {np.dtype("float32")}
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(state.opt_state)) > 0


def test_held_out_examples_are_never_trained_on(tiny_config):
    tiny_config.data.validation_fraction = 0.25
    trainer = Trainer(tiny_config)
    trained = {int(i) for call in trainer.inputs(0, 0) for i in np.asarray(call.inputs.index).ravel()}
    held_out = set(trainer.evaluator._examples.tolist())
    assert not trained & held_out
    assert trained | held_out == set(range(1442))
    pixels = sources.load(tiny_config.data, "train").images[sorted(trained)].astype(np.float64)
    assert trainer.info.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)))
    assert trainer.info.std == pytest.approx(pixels.std(axis=(0, 1, 2)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_resuming_on_other_data_is_refused(tiny_config, finished, monkeypatch, split):
    """One pixel differs. The name of the same data may differ."""
    load = sources._load

    def other(config, *names):
        found = []
        for name, arrays in zip(names, load(config, *names), strict=True):
            images = np.array(arrays.images)
            images[0, 0, 0] ^= changed and name == split
            found.append(dataclasses.replace(arrays, images=images, dataset="digits/2"))
        return found

    monkeypatch.setattr(sources, "_load", other)
    changed = False
    train(tiny_config, finished)
    changed = True
    with pytest.raises(UserError, match=rf"data has changed .*\b{split} split\b.*--workdir"):
        train(tiny_config, finished)


def test_a_diverging_run_reports_the_step(tiny_config, workdir):
    tiny_config.optim.learning_rate = 1e30
    with pytest.raises(UserError, match=r"step \d+\b.*\b(nan|inf)\b"):
        train(tiny_config, workdir)


def test_divergence_in_the_last_step_is_reported(tiny_config, workdir):
    """The loss of a step is computed before its update, so only the evaluation uses the update of the last step."""
    tiny_config.optim = OptimConfig(name="adam", learning_rate=1e38)
    tiny_config.train.epochs = 1 / 12
    with pytest.raises(UserError, match=r"evaluation.*\bstep 1\b.*\bnan\b"):
        train(tiny_config, workdir)
    assert not (workdir / "eval.json").exists()
    assert not any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


def test_a_failing_plot_or_report_does_not_prevent_the_other_files(tiny_config, finished, monkeypatch, capsys):
    def crash(*arguments):
        raise AttributeError("module 'numpy' has no attribute 'float'")

    monkeypatch.setattr(evaluate, "write_report", crash)
    monkeypatch.setattr(evaluate.confusion, "plot", crash)
    before = (finished / "eval.json").stat().st_mtime_ns
    evaluate.evaluate(tiny_config, finished)
    *_, report, _, plot, _, written = capsys.readouterr().out.splitlines()
    for line, name in ((report, "report.html"), (plot, "confusion_matrix.png")):
        assert re.fullmatch(rf".*{name} is not written: AttributeError: .*", line)
    assert written == f"written: {finished}/eval.json, {finished}/tensorboard/evaluation"
    assert (finished / "eval.json").stat().st_mtime_ns > before


def test_a_result_that_cannot_be_saved_is_printed(tiny_config, finished, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_json", full)
    with pytest.raises(UserError, match=r"eval\.json .*No space"):
        evaluate.evaluate(tiny_config, finished)
    assert "expected calibration error" in capsys.readouterr().out


def test_final_evaluation_uses_and_reports_tta(finished, capsys):
    plain, losses = json.loads((finished / "eval.json").read_text()), set()
    for settings, title in (
        (["tta=mirror"], "test-time augmentation mirror\n"),
        (["tta=mirror_translate"], "test-time augmentation mirror_translate\n"),
        (
            ["tta=mirror", "tta_fraction=0.5"],
            "test-time augmentation mirror of the 50% of the images with the lowest confidence\n",
        ),
    ):
        flags = [f"--config.eval.{setting}" for setting in settings]
        command = arguments.parse(["--mode=eval", f"--workdir={finished}", *flags])
        result = evaluate.evaluate(command.config, command.workdir)
        assert json.loads((finished / "eval.json").read_text()) == result
        assert (result["tta"], result["tta_fraction"]) == (command.config.eval.tta, command.config.eval.tta_fraction)
        assert title in capsys.readouterr().out
        losses.add(result["loss"])
    assert "tta" not in plain
    assert len(losses | {plain["loss"]}) == 4


def test_evaluation_uses_averaged_weights(tiny_config, workdir):
    tiny_config.averaging = AveragingConfig(name="ema", decay=0.9)
    train(tiny_config, workdir)
    state = final_state(tiny_config, workdir)
    trainer = Trainer(tiny_config)
    of_average = trainer.evaluator(state).summary
    params, batch_stats = state.average
    of_copy = trainer.evaluator(state._replace(params=params, batch_stats=batch_stats)).summary
    assert of_average == of_copy
    assert json.loads((workdir / "eval.json").read_text())["loss"] == pytest.approx(of_average["loss"], rel=1e-6)
    plain = dataclasses.replace(trainer.task, averaging=AveragingConfig())
    test = sources.load(tiny_config.data, "test")
    of_weights = evaluator.Evaluator(plain, test, evaluator.all_examples(test), 100)(state).summary
    assert of_weights["loss"] != pytest.approx(of_average["loss"], rel=1e-4)
