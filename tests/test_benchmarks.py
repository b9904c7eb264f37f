"""Tables of the benchmarks, and the networks of the other frameworks."""

import functools
import json
import re

import numpy as np
import pytest

from benchmarks import compare, crash, workload
from cifar_flax.models import AirbenchConfig, CNNConfig


def measurement(runner, number, train, evaluate):
    metrics = {"seconds_to_first_step": 3.0, "peak_memory_mib": 1000.0}
    rates = dict(zip(compare.RATES, (train, evaluate), strict=True))
    return {"job": "cnn, batch 1", "round": number, "runner": runner} | rates | metrics


def test_ratios_are_computed_within_a_round():
    """A round in which the machine is slow changes the rates, not the ratios."""
    measurements = [
        *(measurement(compare.OURS, number, rate, 10.0) for number, rate in enumerate([200.0, 20.0, 300.0])),
        *(measurement("other", number, rate, 20.0) for number, rate in enumerate([100.0, 10.0, 100.0])),
    ]
    row = compare.speed_table(measurements)[-1]
    assert (
        row == "| other | 100 (10 to 100) | 2.00 (2.00 to 3.00) | 20 (20 to 20) | 0.50 (0.50 to 0.50) | 3.0 | 1,000 |"
    )


def test_a_failing_runner_is_reported_and_omitted_from_the_tables(monkeypatch, capsys):
    monkeypatch.setattr(compare, "RUNNERS", {"absent": ("no_such_module", {})})
    measurements = compare.compare("cnn, batch 1", "nowhere", "speed", ["absent"], rounds=3, seconds=1.0)
    assert len(measurements) == 1
    assert measurements[0]["error"]
    assert "absent" in capsys.readouterr().err
    assert "absent" not in compare.tables(measurements)


@pytest.mark.parametrize("rounds", ["0", "-1", "1.5", "some"])
def test_rounds_must_be_a_positive_integer(rounds, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare.py", f"--rounds={rounds}"])
    with pytest.raises(SystemExit):
        compare.main()
    assert re.search(f"--rounds: .*{rounds}", capsys.readouterr().err)


def test_runners_read_the_written_workload(tmp_path):
    from benchmarks.runner import Workload

    workload.write_speed(tmp_path, "airbench", 1024)
    read = Workload.read(tmp_path)
    assert (read.config.model.name, read.config.train.batch_size, read.config.optim.momentum) == (
        "airbench",
        1024,
        0.85,
    )
    assert read.train_images.shape == (50_000, 32, 32, 3)
    assert read.std == [255.0] * 3
    assert len(read.learning_rates) == -(-5 * 50_000 // 1024)
    assert set(np.unique(read.learning_rates)) == {np.float32(0.01)}
    json.dumps(read.config, default=vars)  # as in `baselines/ours.py`


def test_keras_networks_have_our_number_of_parameters():
    pytest.importorskip("keras")
    from benchmarks.baselines import keras_

    def trained(model):
        return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)

    assert trained(keras_.cnn(CNNConfig())) == 3_693_002
    assert trained(keras_.airbench(AirbenchConfig())) == 1_971_352
    assert (
        trained(keras_.airbench(AirbenchConfig(widths=(128, 384, 384))))
        == 24 + 9 * (24 * 128 + 128**2 + 128 * 384 + 3 * 384**2) + 2 * (128 + 2 * 384) + 3840
    )


def test_pytorch_networks_have_our_number_of_parameters():
    torch = pytest.importorskip("torch")
    from benchmarks.baselines import pytorch

    for build, config, size in (
        (pytorch.cnn, CNNConfig(), 3_693_002),
        (pytorch.airbench, AirbenchConfig(), 1_971_352),
    ):
        model = build(config)
        # The whitening kernel of airbench is not trained, only its bias.
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
        out = functools.partial(model.eval(), torch.zeros(2, 3, 32, 32))()
        assert out.shape == (2, 10)


def test_a_run_with_several_losses_counts_once():
    outcomes = [
        crash.Outcome(signals=[("a save", "SIGKILL"), ("a save", "SIGTERM")]),
        crash.Outcome(signals=[("any time", "SIGKILL")], fell_back=2),
        crash.Outcome(signals=[("a save", "SIGKILL")], lost=["different state", "different eval.json"]),
    ]
    table = crash.table(outcomes)
    for row in (
        "| a save | 2 | 1 |",
        "| all | 3 | 1 |",
        "| interrupted, restarted, compared | 3 |",
        "| bitwise equal to the uninterrupted run | 2 |",
        "| found a damaged checkpoint and fell back | 1 |",
        "| lost anything | 1 |",
    ):
        assert row in table


@pytest.mark.slow
def test_a_randomly_killed_run_equals_an_uninterrupted_run(tmp_path):
    uninterrupted = crash.reference(tmp_path)
    outcome = crash.crash(1, 0, tmp_path / "killed", uninterrupted)
    assert outcome.signals
    assert outcome.lost == []
    uninterrupted.content["state"][3] = b""
    assert crash.crash(2, 0, tmp_path / "other", uninterrupted).lost == ["different state"]
