"""Test when a run evaluates, saves and logs, and where its calls end."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from conftest import make_tiny_config
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.programs import DATASET
from cifar_flax.runtime.devices import Layout
from cifar_flax.training.setup import setup
from cifar_flax.training.timetable import Timetable

TASK, _ = setup(make_tiny_config(), DATASET)


def make(steps_per_call, *, log_every=10, epochs=3.0, size=1442, drop_last=False, evaluate=1, save=1, frozen=()):
    config = make_tiny_config()
    config.data.drop_last = drop_last
    config.train = dataclasses.replace(
        config.train, steps_per_call=steps_per_call, log_every=log_every, epochs=epochs, batch_size=64
    )
    config.eval.every_epochs, config.checkpoint.every_epochs = evaluate, save
    images = size - size % 64 if drop_last else size
    frozen_from = {str(step): step for step in frozen}
    task = dataclasses.replace(TASK, total_steps=math.ceil(epochs * images / 64), frozen_from=frozen_from)
    return Timetable(config, size, task, "resident")


settings = {
    "log_every": st.integers(1, 30),
    "epochs": st.floats(0.1, 9),
    "size": st.integers(64, 2000),
    "drop_last": st.booleans(),
    "evaluate": st.integers(1, 4),
    "save": st.integers(1, 4),
}


@given(steps_per_call=st.integers(1, 40), frozen=st.lists(st.integers(1, 90)), start=st.integers(0, 50), **settings)
def test_calls_end_where_something_happens(steps_per_call, frozen, start, **values):
    timetable = make(steps_per_call, frozen=frozen, **values)
    total = timetable.total_steps
    frozen = [step for step in frozen if step < total]
    ends = [0, *timetable.calls(0, total)]
    assert ends[-1] == total
    for due in (*range(0, total, values["log_every"]), *timetable.stops(0), *frozen):
        assert due in ends
    assert all(0 < stop - begin <= steps_per_call for begin, stop in itertools.pairwise(ends))
    # A run that resumes makes the same calls; with another log_every, it may resume between two ends.
    for position, end in enumerate(ends):
        assert list(timetable.calls(end, total)) == ends[position + 1 :]
    assert timetable.steps_per_call == max(timetable.lengths(start)) == max(np.diff(ends))


@given(**settings)
def test_a_step_is_due_if_it_completes_epochs(**values):
    timetable = make(1, **values)
    due = set()
    for step in range(1, timetable.total_steps + 1):
        for every in (values["evaluate"], values["save"]):
            before, after = (math.floor(timetable.epoch(number)) // every for number in (step - 1, step))
            expected = after > before or step == timetable.total_steps
            assert timetable.is_due(step, every) == expected
            due |= {step} if expected else set()
    assert set(timetable.stops(0)) == due
    assert timetable.stops(7) == [step for step in sorted(due) if step >= 7]


@pytest.mark.parametrize(
    ("values", "start", "lengths"),
    [
        ({"drop_last": True, "log_every": 22}, 0, {22}),
        ({"drop_last": True, "log_every": 11}, 0, {11}),
        ({"drop_last": True, "log_every": 22}, 22, {22}),
        ({"drop_last": True, "log_every": 22}, 30, {22, 14}),  # saved in the middle of a call
        ({"drop_last": True, "log_every": 22, "frozen": [30]}, 0, {22, 8, 14}),
        ({"log_every": 22}, 0, {22, 1, 21, 2, 20}),
    ],
)
def test_the_number_of_steps_is_constant_if_all_calls_are_equal(values, start, lengths):
    assert make(22, **values).lengths(start) == lengths


@pytest.mark.parametrize(
    ("asked", "resolved", "platform", "expected"),
    [
        ("streaming", "streaming", "gpu", 1),
        ("auto", "streaming", "gpu", 1),
        ("auto", "resident", "gpu", 22),
        ("auto", "resident", "cpu", 1),
        ("resident", "resident", "cpu", 22),
    ],
)
def test_calls_of_many_steps_need_data_in_device_memory(monkeypatch, asked, resolved, platform, expected):
    monkeypatch.setattr(Layout, "platform", platform)
    config = make_tiny_config()
    config.train.steps_per_call, config.train.log_every, config.data.pipeline = 22, 100, asked
    task = dataclasses.replace(TASK, total_steps=22)
    assert Timetable(config, 1442, task, resolved).steps_per_call == min(expected, 12)  # of the first epoch
