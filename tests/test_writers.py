"""Test metrics.jsonl, TensorBoard events and the progress output."""

import json
import os
import re
import sys

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from cifar_flax.telemetry.metrics_log import MetricsWriter
from cifar_flax.telemetry.progress import Progress
from cifar_flax.telemetry.tensorboard import Events, write_evaluation_events


def record(step, split="train", **figures):
    named = {"step": step, "epoch": step / 10, "split": split, "loss": 1.0 / step, "accuracy": 0.5}
    return named | ({"skipped_steps": 0} if split == "train" else {}) | figures


def write(workdir, steps, start=0, mark=None, mark_after=None):
    """Write metrics of `steps` to the log; return the mark taken after step `mark_after`."""
    writer, taken = MetricsWriter(workdir, start, mark), None
    for step in steps:
        writer.write(record(step))
        taken = writer.mark() if step == mark_after else taken
    writer.close()
    return taken


def steps_in(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resuming_removes_lines_after_the_checkpoint(tmp_path, capsys):
    mark = write(tmp_path, [1, 2, 3, 4], mark_after=2)
    write(tmp_path, [3, 4, 5], start=2, mark=mark)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""
    write(tmp_path, [1, 2])  # from the start
    assert steps_in(tmp_path) == [1, 2]
    assert "deleting 5 lines" in capsys.readouterr().out


TORN = ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\n", "3\n", '{"loss": 1}\n', '{"step": true}\n', "[" * 10**5 + "\n"]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_incomplete_lines_are_removed(tmp_path, capsys, torn):
    mark = write(tmp_path, [1, 2], mark_after=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, [3], start=2, mark=mark)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().out == ""
    changed = torn + (tmp_path / "metrics.jsonl").read_text()  # the lines before the mark have changed
    (tmp_path / "metrics.jsonl").write_text(changed if torn.endswith("\n") else f"{torn}\n{changed[len(torn) :]}")
    write(tmp_path, [3], start=2, mark=mark)
    assert steps_in(tmp_path)[-3:] == [1, 2, 3]
    assert re.search(r"metrics\.jsonl\b.*\bstep 2\b", capsys.readouterr().out)


def test_a_lost_log_is_reported_and_restarted(tmp_path, capsys):
    mark = write(tmp_path, [1, 2], mark_after=2)
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path, [3], start=2, mark=mark)
    assert steps_in(tmp_path) == [3]
    assert re.search(r"metrics\.jsonl\b.*\bstep 2\b.*\bmissing\b", capsys.readouterr().out)


def test_a_full_disk_raises_at_once(tmp_path):
    """tensorboardX's own writer would hide the error, and block forever after ten more events."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(record(1))
    events = writer._events._writer._py_recordio_writer._writer.fileno()
    kept = os.dup(events)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), events)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl or tensorboard"):
        writer.write(record(2))
    os.dup2(kept, events)
    os.close(kept)
    writer.close()
    assert steps_in(tmp_path) == [1, 2]


def test_an_error_of_tensorboardx_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def crash(*arguments):
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(Events, "scalars", crash)
    write(tmp_path, [1, 2])
    assert steps_in(tmp_path) == [1, 2]
    assert capsys.readouterr().out.count("no TensorBoard events are written: TypeError: Descriptors") == 1


def test_lines_are_flushed_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(record(1))
    assert steps_in(tmp_path) == [1]
    writer.close()


@pytest.fixture
def events(tf):
    """Return a function that returns the values in the event files of a folder, by tag and step."""

    def events(folder):
        values = {}
        for path in sorted(folder.glob("events*")):
            for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                event = Event.FromString(raw)
                values |= {(value.tag, event.step): value for value in event.summary.value}
        return values

    return events


def test_tensorboard_has_all_metrics(events, tmp_path):
    write(tmp_path, [1, 2])
    seen = events(tmp_path / "tensorboard")
    assert seen[("train/loss", 2)].simple_value == 0.5
    scalars = {tag for tag, _ in seen if not tag.startswith("_hparams_")}
    assert scalars == {"train/epoch", "train/loss", "train/accuracy", "train/skipped_steps"}


def test_tensorboard_has_the_settings(events, tmp_path):
    settings = {"seed": 3, "optim.name": "adamw", "deterministic": False, "optim.momentum": None, "betas": (0.9, 0.99)}
    MetricsWriter(tmp_path, 0, settings=settings).close()
    values = {tag: value.metadata.plugin_data for (tag, _), value in events(tmp_path / "tensorboard").items()}
    assert {data.plugin_name for data in values.values()} == {"hparams"}
    start = HParamsPluginData.FromString(values["_hparams_/session_start_info"].content).session_start_info.hparams
    assert (start["seed"].number_value, start["optim.name"].string_value) == (3, "adamw")
    assert (start["deterministic"].bool_value, start["optim.momentum"].string_value) == (False, "None")
    assert start["betas"].string_value == "(0.9, 0.99)"
    experiment = HParamsPluginData.FromString(values["_hparams_/experiment"].content).experiment
    assert {info.name for info in experiment.hparam_infos} == settings.keys()


def test_tensorboard_has_the_latest_evaluation_and_its_plot(events, tmp_path):
    figures = {"top5_accuracy": 1.0, "loss": 0.25, "expected_calibration_error": 0.125, "split": "test"}
    for step, size in ((5, (3, 4)), (7, (8, 6))):
        Image.new("RGBA", size, "red").save(tmp_path / "matrix.png")
        write_evaluation_events(
            tmp_path / "tensorboard" / "evaluation", figures | {"step": step, "accuracy": 0.5}, tmp_path / "matrix.png"
        )
    values = events(tmp_path / "tensorboard" / "evaluation")
    image = values.pop(("confusion_matrix", 7)).image
    assert (image.width, image.height) == (8, 6)
    assert image.encoded_image_string == (tmp_path / "matrix.png").read_bytes()
    assert {tag: value.simple_value for (tag, step), value in values.items()} == {
        "test/accuracy": 0.5, "test/top5_accuracy": 1.0, "test/loss": 0.25, "test/expected_calibration_error": 0.125,
    }  # fmt: skip
    assert {step for _, step in values} == {7}


def test_terminals_show_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(start=4, total=40, epochs=4)
    progress.show_training(record(10, images_per_second=1234.5, input_wait_fraction=0.0))
    progress.advance(1)
    progress.close()
    bar = capsys.readouterr().err
    for part in ("epoch 1.0/4", "5/40", "loss 0.1000", "accuracy 50.00%", "1,234 images/s", "<"):  # "<": time left
        assert part in bar


def test_other_outputs_get_plain_lines(capsys):
    progress = Progress(start=0, total=40, epochs=4)
    progress.advance(10)
    progress.show_training(record(10, images_per_second=1234.5, input_wait_fraction=0.0123))
    progress.show_evaluation(record(10, "test"))
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 1
    for part in ("epoch 1.0/4", "train loss 0.1000", "test loss", "1,234 images/s", "1.23% of the time", "s left"):
        assert part in captured.out
