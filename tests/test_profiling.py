"""Test profiler traces: they contain exactly the requested steps, and the results of the run do not change."""

import dataclasses
import itertools
import re
from collections import Counter

import jax
import pytest
from conftest import FILES, assert_same_run, make_state, make_tiny_config
from processes import CONFIG, run
from stops import stop_at, stopped

from cifar_flax.data.batches import empty_indices
from cifar_flax.errors import UserError
from cifar_flax.modes import train
from cifar_flax.training import loop, trainer
from cifar_flax.training.profiling import ProfileConfig, Profiled
from cifar_flax.training.steps import Call


def read(path):
    """Return the step numbers in a trace, and the number of operations of each execution of the training call."""
    steps, operations = [], Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if event.name == "train":
                steps.append(stats["step_num"])
            if stats.get("hlo_module") == "jit_train_steps":
                operations[stats["run_id"]] += 1
    return sorted(steps), list(operations.values())


def traces(folder):
    """Return the trace files, oldest first."""
    return sorted((folder / "profile").rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def assert_complete(path, expected):
    """Assert that the trace contains all operations of the expected steps, and none of other steps."""
    steps, operations = read(path)
    assert steps == list(expected)
    assert len(operations) == len(steps)
    assert len(set(operations)) == 1


def test_a_trace_contains_its_steps_and_does_not_change_the_run(tiny_config, straight, tmp_path, capsys):
    tiny_config.profile.steps = (10, 20)
    train.train(tiny_config, tmp_path / "run")
    (path,) = traces(tmp_path / "run")
    assert_complete(path, range(10, 21))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path / "run" / "profile") in line]
    assert "steps 10 to 20" in line
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"profile"}
    assert_same_run(make_tiny_config(), straight[0], tmp_path / "run")


@pytest.mark.slow
def test_a_stopped_run_and_its_resumption_both_write_traces(tiny_config, straight, tmp_path, monkeypatch, capsys):
    tiny_config.profile.steps = (10, 20)
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 14)
        stopped(tiny_config, tmp_path / "run")
    (first,) = traces(tmp_path / "run")
    assert_complete(first, range(10, 15))
    with monkeypatch.context() as patch:
        stop_at(patch, loop.TrainingLoop, "_read", lambda run, step, values: step == 22)
        stopped(tiny_config, tmp_path / "run")
    (_, second) = traces(tmp_path / "run")
    assert_complete(second, range(15, 21))
    assert "steps 15 to 20" in capsys.readouterr().out
    train.train(tiny_config, tmp_path / "run")
    assert len(traces(tmp_path / "run")) == 2
    assert "profile.steps=(10, 20): " in capsys.readouterr().out
    assert_same_run(make_tiny_config(), straight[0], tmp_path / "run")


def test_a_failed_run_writes_its_trace(tiny_config, tmp_path):
    tiny_config.profile.steps = (1, 34)
    tiny_config.optim.learning_rate = 1e30
    with pytest.raises(UserError, match=r"step \d+\b.*\b(nan|inf)\b"):
        train.train(tiny_config, tmp_path / "run")
    (path,) = traces(tmp_path / "run")
    steps, _ = read(path)
    assert 2 <= len(steps) < 34
    with jax.profiler.trace(tmp_path / "another"):  # raises if the profiler is still running
        pass


@pytest.fixture
def events(monkeypatch):
    """Return the list of calls that a `Profiled` makes, in order."""
    events = []

    class Annotation:
        def __init__(self, name, step_num):
            events.append(f"{name} {step_num}")

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(jax, "block_until_ready", lambda state: events.append(f"wait for {state.step}"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    return events


def profiled(tmp_path, steps, *, start=0):
    return Profiled(
        lambda state, call: (state._replace(step=call.stop), {}), ProfileConfig(steps=steps), tmp_path, start=start
    )


def run_calls(train_call, *ends):
    """Run calls that finish these steps; the first number is the step before them."""
    state = make_state(ends[0])
    for start, stop in itertools.pairwise(ends):
        state, _ = train_call(state, Call(start, stop, empty_indices(10, 1)))


def test_tracing_waits_for_the_device_before_and_after(tmp_path, events):
    """On accelerators, calls return before the device has finished."""
    run_calls(profiled(tmp_path, (2, 3)), *range(5))
    assert events == ["train 1", "wait for 1", "start", "train 2", "train 3", "wait for 3", "stop", "train 4"]


ENDS = (0, 5, 10, 12, 17, 20)  # of calls of different lengths


@pytest.mark.parametrize(
    ("steps", "start", "traced"),
    [
        ((7, 12), 0, [6, 11]),
        ((6, 10), 0, [6]),
        ((11, 12), 0, [11]),
        ((12, 13), 0, [11, 13]),
        ((5, 5), 0, [1]),
        ((1, 20), 0, [1, 6, 11, 13, 18]),
        ((7, 12), 10, [11]),
        ((7, 12), 17, []),
        ((0, 0), 0, []),
    ],
)
def test_calls_of_many_steps_are_traced_completely(tmp_path, events, steps, start, traced):
    run_calls(profiled(tmp_path, steps, start=start), *[end for end in ENDS if end >= start])
    calls, tracing = [], False
    for event in events:
        tracing = event == "start" or (tracing and event != "stop")
        if tracing and event.startswith("train"):
            calls.append(int(event.split()[1]))
    assert calls == traced
    assert events.count("start") == events.count("stop") == bool(traced)


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, events, monkeypatch, capsys):
    def fail():
        raise jax.errors.JaxRuntimeError("No space\nleft")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    call = profiled(tmp_path, (1, 1))
    run_calls(call, 0, 1, 2)
    call.close()
    _, line = capsys.readouterr().out.splitlines()
    assert "JaxRuntimeError: No space left" in line


def test_invalid_ranges_of_steps_are_refused(tiny_config):
    for steps in ((0, 1), (3, 2), (-2, -1), (1, 0)):
        with pytest.raises(UserError, match=rf"^profile\.steps={re.escape(str(steps))}: "):
            dataclasses.replace(tiny_config, profile=ProfileConfig(steps=steps)).validate()
    for steps in ((0, 0), (1, 1), (2, 34)):
        dataclasses.replace(tiny_config, profile=ProfileConfig(steps=steps)).validate()
    tiny_config.profile.steps = (2, 35)
    with pytest.raises(UserError, match=r"^profile\.steps=\(2, 35\): .*34"):
        trainer.Trainer(tiny_config)


@pytest.mark.slow
def test_every_process_writes_its_own_trace(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    run(tmp_path, [1, 1], "--config", "config.py", "--workdir=two", "--config.profile.steps=(3, 5)")
    assert {path.relative_to(tmp_path / "two" / "profile").parts[0] for path in traces(tmp_path / "two")} == {
        "process_0",
        "process_1",
    }
    for path in traces(tmp_path / "two"):
        assert_complete(path, (3, 4, 5))
