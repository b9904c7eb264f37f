"""The comparison's own arithmetic, and that its contestants train the same networks."""

import functools
import json

import numpy as np
import pytest

from benchmarks import compare, crash, setting
from cifar_flax.models import AirbenchConfig, CNNConfig


def record(contestant, number, train, evaluate):
    figures = {"seconds_to_first_step": 3.0, "peak_memory_mib": 1000.0}
    rates = dict(zip(compare.RATES, (train, evaluate), strict=True))
    return {"job": "cnn, batch 1", "round": number, "contestant": contestant} | rates | figures


def test_ratios_are_taken_round_by_round():
    """A round in which the machine is slow for both changes the rates, not the ratios."""
    records = [
        *(record(compare.OURS, number, rate, 10.0) for number, rate in enumerate([200.0, 20.0, 300.0])),
        *(record("other", number, rate, 20.0) for number, rate in enumerate([100.0, 10.0, 100.0])),
    ]
    row = compare.speed_table(records)[-1]
    assert (
        row == "| other | 100 (10 to 100) | 2.00 (2.00 to 3.00) | 20 (20 to 20) | 0.50 (0.50 to 0.50) | 3.0 | 1,000 |"
    )


def test_who_cannot_run_is_left_out_with_a_word(monkeypatch, capsys):
    monkeypatch.setattr(compare, "CONTESTANTS", {"absent": ("no_such_peer", {})})
    records = compare.compare("cnn, batch 1", "nowhere", "speed", ["absent"], rounds=3, seconds=1.0)
    assert len(records) == 1
    assert records[0]["error"]
    assert "absent" in capsys.readouterr().err
    assert "absent" not in compare.tables(records)


@pytest.mark.parametrize("rounds", ["0", "-1", "1.5", "some"])
def test_nothing_is_measured_in_less_than_a_round(rounds, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare.py", f"--rounds={rounds}"])
    with pytest.raises(SystemExit):
        compare.main()
    assert f"argument --rounds: is {rounds}; allowed: whole numbers from 1" in capsys.readouterr().err


def test_contestants_read_what_was_written(tmp_path):
    from benchmarks.contestant import Setting

    setting.write_speed(tmp_path, "airbench", 1024)
    read = Setting.read(tmp_path)
    assert (read.config.model.name, read.config.train.batch_size, read.config.optim.momentum) == (
        "airbench",
        1024,
        0.85,
    )
    assert read.train_images.shape == (50_000, 32, 32, 3)
    assert read.std == [255.0] * 3
    assert len(read.learning_rates) == -(-5 * 50_000 // 1024)
    assert set(np.unique(read.learning_rates)) == {np.float32(0.01)}
    json.dumps(read.config, default=vars)  # as this project's contestant takes it


def test_keras_networks_are_of_our_size():
    from benchmarks.peers import keras_

    def trained(model):
        return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)

    assert trained(keras_.cnn(CNNConfig())) == 3_693_002
    assert trained(keras_.airbench(AirbenchConfig())) == 1_971_352
    assert (
        trained(keras_.airbench(AirbenchConfig(widths=(128, 384, 384))))
        == 24 + 9 * (24 * 128 + 128**2 + 128 * 384 + 3 * 384**2) + 2 * (128 + 2 * 384) + 3840
    )


def test_pytorch_networks_are_of_our_size():
    torch = pytest.importorskip("torch")
    from benchmarks.peers import pytorch

    for build, config, size in (
        (pytorch.cnn, CNNConfig(), 3_693_002),
        (pytorch.airbench, AirbenchConfig(), 1_971_352),
    ):
        model = build(config)
        # The bias of the first convolution trains, its kernel does not; a bias before BatchNorm is no difference.
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
        out = functools.partial(model.eval(), torch.zeros(2, 3, 32, 32))()
        assert out.shape == (2, 10)


def test_a_loss_is_counted_as_one():
    outcomes = [
        crash.Outcome(signals=[("a save", "SIGKILL"), ("a save", "SIGTERM")]),
        crash.Outcome(signals=[("any time", "SIGKILL")], fell_back=2),
        crash.Outcome(signals=[("a save", "SIGKILL")], lost=["another state", "another eval.json"]),
    ]
    table = crash.table(outcomes)
    for row in (
        "| a save | 2 | 1 |",
        "| all | 3 | 1 |",
        "| interrupted, started again, compared | 3 |",
        "| ended bitwise equal to the run left alone | 2 |",
        "| found a checkpoint damaged and fell back | 1 |",
        "| lost anything | 1 |",
    ):
        assert row in table


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_one_left_alone(tmp_path):
    alone = crash.reference(tmp_path)
    outcome = crash.crash(1, 0, tmp_path / "killed", alone)
    assert outcome.signals
    assert outcome.lost == []
    alone.content["state"][3] = b""
    assert crash.crash(2, 0, tmp_path / "other", alone).lost == ["another state"]
