import json
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from cifar_flax.data.tensorflow import tf
from cifar_flax.writers import MetricsWriter, Progress, write_json


def record(step, split="train", **figures):
    return {"step": step, "epoch": step / 10, "split": split, "loss": 1.0 / step, "accuracy": 0.5} | figures


def write(workdir, steps, start=0):
    writer = MetricsWriter(workdir, start)
    for step in steps:
        writer.write(record(step))
    writer.close()


def steps_in(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_what_will_come_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], start=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\n", "3\n", '{"loss": 1}\n'])
def test_torn_lines_are_dropped(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, [3], start=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_lines_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(record(1))
    assert steps_in(tmp_path) == [1]
    writer.close()


def test_tensorboard_has_every_figure(tmp_path):
    write(tmp_path, [1, 2])
    seen = {}
    for path in (tmp_path / "tensorboard").iterdir():
        for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(raw)
            seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert seen[("train/loss", 2)] == 0.5
    assert {tag for tag, _ in seen} == {"train/epoch", "train/loss", "train/accuracy"}


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(start=4, total=40, epochs=4)
    progress.train(record(10, images_per_second=1234.5, input_wait_fraction=0.0))
    progress.step(1)
    progress.close()
    bar = capsys.readouterr().err
    for part in ("epoch 1.0/4", "5/40", "loss 0.100", "accuracy 50.0%", "1,234 images/s", "<"):  # "<": time left
        assert part in bar


def test_without_a_terminal_there_are_plain_lines(capsys):
    progress = Progress(start=0, total=40, epochs=4)
    progress.step(10)
    progress.train(record(10, images_per_second=1234.5, input_wait_fraction=0.0123))
    progress.evaluation(record(10, "test"))
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 1
    for part in ("epoch 1.0/4", "train loss 0.1000", "test loss", "1,234 images/s", "1.23% of the time", "s left"):
        assert part in captured.out
