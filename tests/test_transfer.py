"""Test `train.init_from`: a run starts with the weights of another run."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import final_state, make_tiny_config, read_metrics

from cifar_flax import restore
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.models import AirbenchConfig, CNNConfig
from cifar_flax.modes.train import train
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer


def initialized(config):
    trainer = Trainer(config)
    return trainer.initial_state, restore.init_from(
        config, trainer.info, trainer.initialize_optimizer, trainer.initial_state
    )


def config_from(run, **changes):
    config = dataclasses.replace(make_tiny_config(), **changes)
    config.train = dataclasses.replace(config.train, init_from=str(run))
    return config


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_only_weights_are_copied(straight, capsys):
    run, _ = straight
    trained, (fresh, first) = final_state(make_tiny_config(), run), initialized(config_from(run))
    assert_equal((first.params, first.batch_stats), (trained.params, trained.batch_stats))
    assert_equal((first.step, first.seed, first.opt_state), (fresh.step, fresh.seed, fresh.opt_state))
    line = capsys.readouterr().out.splitlines()[-1]
    for part in ("10 of 10 weights", str(run), "step 34"):
        assert part in line


def test_another_number_of_classes_keeps_a_fresh_head(straight, monkeypatch, capsys):
    run, _ = straight
    trained, config = final_state(make_tiny_config(), run), config_from(run)
    trainer = Trainer(config)
    info = dataclasses.replace(trainer.info, class_names=trainer.info.class_names[:7])
    _, init = setup(config, info)
    fresh = init(config.seed, None)
    first = restore.init_from(config, info, trainer.initialize_optimizer, fresh)
    assert_equal(first.params["head"], fresh.params["head"])
    assert first.params["head"]["kernel"].shape == (16, 7)
    for name in ("conv", "hidden"):
        assert_equal(first.params[name], trained.params[name])
    bias, kernel = sorted(capsys.readouterr().out.splitlines()[-2:])
    assert re.search(r"head\.bias: \(10,\) .*, \(7,\)", bias)
    assert re.search(r"head\.kernel: \(16, 10\) .*, \(16, 7\)", kernel)


def test_other_class_names_are_reported(straight, capsys):
    config = config_from(straight[0])
    trainer = Trainer(config)
    info = dataclasses.replace(trainer.info, class_names=tuple("abcdefghij"))
    restore.init_from(config, info, trainer.initialize_optimizer, trainer.initial_state)
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in capsys.readouterr().out


def test_averaged_weights_are_copied(tmp_path):
    config = make_tiny_config()
    config.averaging = AveragingConfig(name="ema", decay=0.9)
    train(config, tmp_path / "ema")
    state, (_, first) = final_state(config, tmp_path / "ema"), initialized(config_from(tmp_path / "ema"))
    average = state.evaluated(config.averaging)
    assert_equal((first.params, first.batch_stats), average)
    assert np.abs(first.params["head"]["kernel"] - state.params["head"]["kernel"]).max() > 0


def test_averages_start_with_the_copied_weights(straight):
    config = config_from(straight[0], averaging=AveragingConfig(name="ema"))
    _, first = initialized(config)
    assert_equal(first.average, (first.params, first.batch_stats))


def test_another_network_is_refused_with_the_difference(straight):
    with pytest.raises(UserError) as caught:
        initialized(config_from(straight[0], model=AirbenchConfig(widths=(8, 8, 8))))
    message = str(caught.value)
    assert message.startswith(f"train.init_from={str(straight[0])!r}: ")
    assert "(3, 3, 8, 8)" in message
    assert message.count("absent in that run") == 3
    assert "more)" in message
    _, first = initialized(config_from(straight[0], model=CNNConfig(width=4, hidden=24)))  # some of its weights match
    assert first.params["hidden"]["kernel"].shape[1] == 24


@pytest.mark.parametrize(("folder", "reason"), [("nowhere", "no such folder"), (".", "holds no checkpoint")])
def test_a_folder_without_a_run_is_refused_before_anything_is_written(tmp_path, folder, reason):
    with pytest.raises(ConfigError, match=rf"^train.init_from='.*': {reason}"):
        train(config_from(tmp_path / folder), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_other_run_is_needed_only_at_the_first_start(straight, tmp_path):
    """The run resumes after the other run has been deleted."""
    other = shutil.copytree(straight[0], tmp_path / "other")
    config = config_from(other)
    config.train = dataclasses.replace(config.train, epochs=1)
    config.optim = dataclasses.replace(config.optim, schedule="constant", learning_rate=1e-5)
    train(config, tmp_path / "new")
    shutil.rmtree(other)
    config.train = dataclasses.replace(config.train, epochs=2)
    train(config, tmp_path / "new")
    first = next(line for line in read_metrics(tmp_path / "new") if line["split"] == "test")

    before = read_metrics(straight[0])[-1]["accuracy"]
    assert first["accuracy"] == pytest.approx(before, abs=0.03)  # random weights have about 0.1
    assert before > 0.3
