"""Per-operation profile of a step, tested on programs whose operations are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step
from benchmarks.hardware import Speed


@pytest.fixture(scope="module")
def products():
    """Return the operations found in a program of two matrix products, one with eight times the work of the other."""
    x, y = jnp.ones((256, 512)), jnp.ones((512, 1024))

    def run(x, y):
        return x @ y, jax.lax.optimization_barrier(x[:, :64]) @ y[:64]

    compiled = jax.jit(run).lower(x, y).compile()
    return step.operations(compiled, lambda: compiled(x, y), 3)


def test_operation_costs_equal_those_of_xla(products):
    costs = {round(operation.flops): operation.bytes for operation in products if operation.flops >= 2**24}
    assert costs.keys() == {2 * 256 * 512 * 1024, 2 * 256 * 64 * 1024}
    assert costs[2 * 256 * 512 * 1024] == 4 * (256 * 512 + 512 * 1024 + 256 * 1024)


def test_operations_are_sorted_by_time(products):
    assert [operation.seconds for operation in products] == sorted((o.seconds for o in products), reverse=True)
    assert all(0 < operation.seconds < 10 for operation in products)
    assert "dot_general" in products[0].source


def test_concurrent_operations_split_the_elapsed_time():
    """a and b start at the same time on two threads; events without an `hlo_op` do not count."""
    first = line((0, 10e9, {"hlo_op": "a"}), (12e9, 3e9, {"hlo_op": "a"}))
    second = line((0, 4e9, {"hlo_op": "b"}), (4e9, 1e9, {"other": "b"}))
    assert step._attribute(trace(first, second), {}) == {"a": 2 + 6 + 3, "b": 2}


def test_an_asynchronous_operation_lasts_until_it_ends_or_its_result_is_used():
    products = line((0, 1e9, {"hlo_op": "a", "_p": 5}), (1e9, 1e9, {"hlo_op": "b", "_p": 6}))
    later = line((4e9, 2e9, {"hlo_op": "c", "_p": 7}), (5e9, 0, {"_c": 7}), (7e9, 0, {"_c": 5}), (8e9, 0, {"_c": 6}))
    assert step._attribute(trace(products, later), {"c": ["a"]}) == {"a": 1 + 1.5, "b": 1.5 + 1 + 2, "c": 1}


def line(*events):
    """Return a trace line of events, each a tuple of start (ns), duration (ns) and statistics."""
    fields = ("start_ns", "duration_ns", "stats")
    return SimpleNamespace(events=[SimpleNamespace(**dict(zip(fields, event, strict=True))) for event in events])


def trace(*lines):
    return SimpleNamespace(planes=[SimpleNamespace(lines=[line]) for line in lines])


def test_table_has_fractions_of_step_time_and_of_peak_speed():
    found = [
        step.Operation("a", "dense", seconds=0.006, flops=3e9, bytes=6e6),
        step.Operation("b", "", 0.003, 0.0, 9e6),
        step.Operation("c", "", 0.001, 0.0, 1e6),
    ]
    lines = step.table(found, Speed(flops=1e12, bytes=10e9), step_seconds=0.010, rows=1).splitlines()
    assert lines[2] == "| a | dense | 6.00 | 60.0% | 3.00 | 50% | 6.0 | 10% |"
    assert lines[3] == "| 2 others |  | 4.00 | 40.0% | 0.00 | 0% | 10.0 | 25% |"
    assert lines[4].startswith("| all |  | 10.00 | 100.0% | 3.00 |")


def test_median_time_is_over_at_least_five_runs():
    calls = []
    seconds = step.median_seconds(lambda: calls.append(np.ones(())), seconds=0.0)
    assert len(calls) == 7  # including two warm-up runs
    assert seconds < 1
