"""Test frozen groups of parameters: their gradient is not computed, and nothing else changes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import final_state, needs_tensorflow
from stops import assert_stops_change_no_bit

from cifar_flax.config import AirbenchConfig, CNNConfig, GroupConfig, OptimConfig
from cifar_flax.data import batches, resident, sources
from cifar_flax.data.batches import Indices
from cifar_flax.data.info import DatasetInfo
from cifar_flax.modes.train import train
from cifar_flax.training import loop, optimizers, steps
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer


@pytest.fixture
def config(tiny_config):
    """Return a config that freezes the whitening bias after one epoch, and the dense kernels after two."""
    tiny_config.model = AirbenchConfig(widths=(4, 8, 8))
    tiny_config.optim = OptimConfig(
        name="sgd", learning_rate=0.1, momentum=0.5,
        whitening=GroupConfig(learning_rate=0.1, frozen_from=1, own_decay=True), dense=GroupConfig(frozen_from=2),
    )  # fmt: skip
    return tiny_config


@pytest.fixture
def cnn_config(config):
    """Return a config with the same phases for the reference CNN, which compiles faster."""
    config.model = CNNConfig(width=4, hidden=16)
    config.optim.biases, config.optim.whitening = config.optim.whitening, GroupConfig()
    return config


@pytest.fixture
def prepared(config):
    arrays = sources.load(config.data, "train")
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    task, init = setup(config, DatasetInfo.of(arrays, examples, "standard"))
    index = examples[:64]
    batch = batches.gather(arrays.images, arrays.labels, Indices(index, 0 * index, index >= 0))
    # As if it were trained: initially, momentum is zero.
    state, _ = jax.jit(functools.partial(steps.train_step, task))(init(0, arrays.images[:500]), batch)
    return task, state, batch


def test_phases_begin_where_groups_are_frozen(prepared):
    task, _, _ = prepared
    assert task.frozen_from == {"whitening": 11, "dense": 23}
    assert [(first, sorted(phase.frozen)) for first, phase in steps.phases(task)] == [
        (0, []), (11, ["whitening"]), (23, ["dense", "whitening"]),
    ]  # fmt: skip
    # A run that resumes does not compile the programs of steps that are finished.
    assert [(first, sorted(phase.frozen)) for first, phase in steps.phases(task, 11)] == [
        (11, ["whitening"]), (23, ["dense", "whitening"]),
    ]  # fmt: skip
    assert [(first, sorted(phase.frozen)) for first, phase in steps.phases(task, 30)] == [(30, ["dense", "whitening"])]


def test_groups_without_parameters_or_frozen_after_the_run_do_not_compile_another_program(config, prepared):
    config.model = AirbenchConfig(widths=(4, 8, 8))
    config.optim.whitening.frozen_from, config.optim.dense.frozen_from = 3, 0.0
    trainer = Trainer(config)
    assert [first for first, _ in steps.phases(trainer.task)] == [0]


def traced(task, state, batch):
    return jax.jit(functools.partial(steps.train_step, task)).trace(state, batch)


def test_the_frozen_whitening_bias_saves_a_convolution(config, prepared):
    """The gradient of the bias needs that with respect to the input of the first convolution after it."""
    _, state, batch = prepared
    for platform in ("cuda", "cpu"):
        task, _ = setup(config, Trainer(config).info, platform=platform)
        (_, whole), (_, frozen), _ = steps.phases(task)
        before, after = (traced(phase, state, batch) for phase in (whole, frozen))
        if platform == "cpu":  # convolutions are matrix products, and XLA removes those that are not used
            before, after = (one.lower().compile().cost_analysis()["flops"] for one in (before, after))
            assert after < 0.9 * before
        else:
            before, after = (str(one.jaxpr).count("conv_general_dilated[") for one in (before, after))
            assert after == before - 1


def test_other_parameters_get_the_same_update(prepared):
    task, state, batch = prepared
    # The learning rate of the whitening bias is 0 from step 11 on: let optax count on.
    state = jax.tree.map(lambda x: x + 12 if x.dtype == np.int32 else x, state)
    (_, whole), (_, frozen), _ = steps.phases(task)
    (expected, values), (found, found_values) = (
        jax.jit(functools.partial(steps.train_step, phase))(state, batch) for phase in (whole, frozen)
    )
    assert float(values["loss"]) == pytest.approx(float(found_values["loss"]), rel=1e-5)
    for key in ("params", "batch_stats"):
        one, other = getattr(expected, key), getattr(found, key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)
    groups = jax.tree.leaves(task.param_groups)
    before, after = (jax.tree.leaves(one.params) for one in (state, found))
    unchanged = {group for group, a, b in zip(groups, before, after, strict=True) if np.array_equal(a, b)}
    assert unchanged == {"whitening"}


def test_the_clipped_norm_is_that_of_the_parameters_that_are_not_frozen(tiny_config):
    """Most of the norm is that of the dense kernels. Until they are frozen, the others are scaled down."""
    tiny_config.optim = OptimConfig(name="sgd", learning_rate=0.1, clip_norm=1e-3, dense=GroupConfig(frozen_from=1))
    trainer = Trainer(tiny_config)
    index = np.arange(64, dtype=np.int32)
    indices = Indices(index, 0 * index, index >= 0)
    batch = resident.gather(trainer.arrays.images, trainer.arrays.labels, indices, trainer.info.image_shape)
    state = jax.tree.map(lambda x: x + 12 if x.dtype == np.int32 else x, trainer.initial_state)  # their rate is 0
    changes = []
    for _, phase in steps.phases(trainer.task):
        new, _ = jax.jit(functools.partial(steps.train_step, phase))(state, batch)
        pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True)
        changes.append(float(np.sqrt(sum(np.sum(np.square(a - b)) for a, b in pairs))))
    assert changes[0] < 0.9 * changes[1]
    assert changes[1] == pytest.approx(0.1 * 1e-3, rel=1e-2)  # learning rate times norm


@pytest.mark.parametrize(
    "pipeline",
    ["resident", pytest.param("streaming", marks=[needs_tensorflow, pytest.mark.slow])],
    ids=["resident", "streaming"],
)
def test_a_run_uses_each_program_in_its_steps(cnn_config, tmp_path, monkeypatch, pipeline):
    config = cnn_config
    config.data.pipeline = pipeline
    config.train = dataclasses.replace(config.train, steps_per_call=5, log_every=20)
    used, phases = [], steps.phases
    program = loop.Trainer.compile

    def compiled(*arguments):
        train_calls = program(*arguments)
        choose = train_calls.program

        def chosen(start):
            used.append((start, [first for first, one in train_calls._programs if one is choose(start)]))
            return choose(start)

        train_calls.program = chosen
        return train_calls

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "compile", compiled)
        train(config, tmp_path / "run")
    assert all(first == [0 if start < 11 else 11 if start < 23 else 23] for start, first in used)
    starts = {start for start, _ in used}
    assert {0, 11, 23} <= starts
    # A run that computes all gradients ends with the same parameters.
    with monkeypatch.context() as patch:
        patch.setattr(steps, "phases", lambda task, start: phases(task)[:1])
        train(config, tmp_path / "whole")
    one, other = (final_state(config, tmp_path / name).params for name in ("run", "whole"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3), one, other)


@pytest.mark.slow
def test_a_run_that_stops_before_and_after_freezing_ends_with_the_same_bits(cnn_config, tmp_path, monkeypatch):
    config = cnn_config
    config.train = dataclasses.replace(config.train, steps_per_call=4)
    assert_stops_change_no_bit(config, tmp_path, monkeypatch, (8, 16))


def test_accumulated_updates_are_frozen_as_a_whole():
    """The rate of an update is that of its first step, and its gradients are needed until its last step."""
    config = OptimConfig(accumulate_steps=4, dense=GroupConfig(frozen_from=1), biases=GroupConfig(frozen_from=0.8))
    assert optimizers.frozen_steps(config, 10) == {"dense": 12, "biases": 8}
    config.accumulate_steps = 1
    assert optimizers.frozen_steps(config, 10) == {"dense": 10, "biases": 8}
    assert optimizers.frozen_steps(config, 0.01) == {"dense": 1, "biases": 1}
