"""Test `train.freeze=backbone`: only the head of another run's network is trained."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import assert_same_run, final_state, make_tiny_config
from stops import stop_at, stopped

from cifar_flax import restore
from cifar_flax.config import AveragingConfig, CNNConfig, GroupConfig, OptimConfig
from cifar_flax.data import resident
from cifar_flax.data.batches import Indices
from cifar_flax.errors import ConfigError
from cifar_flax.models.network import freeze_backbone
from cifar_flax.modes.train import train
from cifar_flax.training import loop, steps
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer


def config_from(run, **changes):
    config = dataclasses.replace(make_tiny_config(), **changes)
    config.train = dataclasses.replace(config.train, init_from=str(run), freeze="backbone")
    return config


def prepare(config):
    """Return the task of the run's only program, the initial state and a batch."""
    trainer = Trainer(config)
    state = restore.init_from(config, trainer.info, trainer.initialize_optimizer, trainer.initial_state)
    ((first, task),) = steps.phases(trainer.task)
    assert first == 0
    index = np.arange(64, dtype=np.int32)
    indices = Indices(index, 0 * index, index >= 0)
    return task, state, resident.gather(trainer.arrays.images, trainer.arrays.labels, indices, trainer.info.image_shape)


def assert_only_the_head_differs(found, expected):
    """Compare (params, batch_stats)."""
    for one, other in zip(found, expected, strict=True):
        rest = [{name: part for name, part in tree.items() if name != "head"} for tree in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, *rest)
    assert np.any(found[0]["head"]["kernel"] != expected[0]["head"]["kernel"])
    assert np.any(found[0]["head"]["bias"] != expected[0]["head"]["bias"])


@pytest.mark.parametrize(
    ("optim", "averaging"),
    [
        ({"name": "adamw", "weight_decay": 0.1}, "ema"),
        ({"name": "sgd", "weight_decay": 0.1, "momentum": 0.9, "accumulate_steps": 2}, "none"),
        (
            {
                "name": "muon",
                "momentum": 0.6,
                "dense": GroupConfig(learning_rate=0.1, weight_decay=0.1),
                "biases": GroupConfig(learning_rate=0.1),
            },
            "lookahead",
        ),
    ],
    ids=["adamw", "sgd", "muon"],
)
def test_steps_change_the_head_alone(straight, optim, averaging):
    config = config_from(
        straight[0], optim=OptimConfig(learning_rate=0.1, **optim), averaging=AveragingConfig(name=averaging, every=2)
    )
    task, first, batch = prepare(config)
    step = jax.jit(functools.partial(steps.train_step, task))
    state = first
    for _ in range(4):
        state, values = step(state, batch)
        assert values["finite"]
    assert_only_the_head_differs((state.params, state.batch_stats), (first.params, first.batch_stats))
    if averaging != "none":
        assert_only_the_head_differs(state.average, (first.params, first.batch_stats))


def test_the_backbone_has_no_backward_pass(straight):
    """Only three matrix products remain: of both dense layers, and for the gradient of the head."""
    config = config_from(straight[0])
    task, state, batch = prepare(config)
    task, _ = setup(config, Trainer(config).info, platform="cuda")
    ((_, task),) = steps.phases(task)
    program = str(jax.jit(functools.partial(steps.train_step, task)).trace(state, batch).jaxpr)
    assert program.count("conv_general_dilated[") == 1
    assert program.count("dot_general[") == 3


def test_the_network_is_in_evaluation_mode(straight):
    """Without augmentation, the loss in training is that of the evaluation."""
    config = config_from(straight[0])
    config.augment = dataclasses.replace(config.augment, flip="none", crop_padding=0)
    task, state, batch = prepare(config)
    _, values = jax.jit(functools.partial(steps.train_step, task))(state, batch)
    sums, *_ = jax.jit(functools.partial(steps.eval_step, task))((state.params, state.batch_stats), batch)
    assert float(values["loss"]) == pytest.approx(float(sums["loss"]) / 64, rel=1e-4)


def test_the_clipped_norm_is_that_of_the_head(straight):
    config = config_from(straight[0], optim=OptimConfig(name="sgd", learning_rate=0.1, clip_norm=1e-3))
    task, state, batch = prepare(config)
    new, _ = jax.jit(functools.partial(steps.train_step, task))(state, batch)
    change = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), new.params["head"], state.params["head"])
    assert np.sqrt(sum(jax.tree.leaves(change))) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # learning rate times norm


@pytest.mark.slow
def test_a_run_resumes_exactly_and_keeps_the_backbone(straight, tmp_path, monkeypatch):
    config = config_from(straight[0])
    config.train = dataclasses.replace(config.train, steps_per_call=4)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, now, values: now >= 16)
        stopped(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(config, tmp_path / "whole", tmp_path / "run")
    found, expected = final_state(config, tmp_path / "run"), final_state(make_tiny_config(), straight[0])
    assert_only_the_head_differs((found.params, found.batch_stats), (expected.params, expected.batch_stats))


def test_a_backbone_that_does_not_match_is_refused(straight):
    """Its weights would stay random."""
    config = config_from(straight[0], model=CNNConfig(width=4, hidden=24))
    with pytest.raises(ConfigError, match=r"^train\.freeze='backbone': .*hidden\.kernel: \(900, 16\) in that run"):
        prepare(config)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ConfigError, match=r"^train\.freeze='backbone': needs a layer named head.* vgg"):
        freeze_backbone({"classifier": {"kernel": "dense"}}, "vgg")
