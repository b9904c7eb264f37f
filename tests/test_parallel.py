"""Run tests/many_devices*.py on eight virtual devices; lower the steps of every config for GPUs and TPUs."""

import functools
import re
import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY
from processes import environment, virtual_devices

from benchmarks.programs import DATASET
from cifar_flax.arguments import parse
from cifar_flax.data.batches import empty_indices
from cifar_flax.errors import ConfigError
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training import evaluator, steps
from cifar_flax.training.setup import setup

_SLOW = ("airbench94_muon", "airbench95", "airbench96", "resnet18")  # their lowering takes long
CONFIGS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in _SLOW), id=path.stem)
    for path in sorted((REPOSITORY / "configs").glob("*.py"))
]


@pytest.mark.parametrize("size", [{}, pytest.param({"FULL_SIZE": "1"}, marks=pytest.mark.slow)], ids=["small", "full"])
def test_on_eight_devices(size, pytestconfig):
    """Use a new process, because JAX creates its devices once per process."""
    files = [f"tests/many_devices{part}.py" for part in ("", "_mixing", "_resolutions")]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if size and pytestconfig.getoption("--reduced"):
        run += ["-k", "losses"]
    done = subprocess.run(
        [*run, *files], cwd=REPOSITORY, env=environment(**virtual_devices(8), **size), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("backend", ["jit", "shard_map"])
@pytest.mark.parametrize("path", CONFIGS)
def test_steps_of_every_config_lower_for_accelerators(path, backend):
    """On accelerators, networks use XLA's convolutions and, if `model.dtype` is "auto", compute in bfloat16.

    The data is in device memory, and the number of steps of a call is an argument.
    """
    config = parse(["--config", str(path), f"--config.parallel.backend={backend}"]).config
    task, init = setup(config, DATASET, platform="cuda")
    state = jax.eval_shape(lambda: init(0, None))
    layout, train, test = task.layout, config.train, config.eval
    inputs, of_test = empty_indices(train.steps_per_call, train.batch_size), empty_indices(test.batch_size)
    shared = jax.ShapeDtypeStruct((50_000, 32 * 32 * 3), "uint8"), jax.ShapeDtypeStruct((50_000,), "int32")
    counted = *shared, jax.ShapeDtypeStruct((), "int32")
    step = functools.partial(steps.train_steps, task)
    training = layout.parallelize(step, shared=len(counted), batch_axis=1, donate=True)
    step = evaluator.on_inputs(task, functools.partial(steps.eval_step, task, tta=test.tta))
    evaluation = layout.parallelize(step, shared=len(shared))
    weights = state.params, state.batch_stats
    for function, arguments in ((training, (state, inputs, *counted)), (evaluation, (weights, of_test, *shared))):
        traced = function.trace(*arguments)
        for platform in ("tpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
            assert convolutions
            assert "select_and_scatter" not in text  # XLA has no deterministic version of it for GPUs
            scattered = re.findall(r'"stablehlo\.scatter".*?\}\) : \(tensor<(?:\d+x)*(\w+)>', text, re.DOTALL)
            assert not {"f32", "bf16"} & set(scattered)  # whose order of summation varies on a GPU
            if config.model.dtype == "auto":
                assert all("bf16" in line for line in convolutions)


@pytest.mark.parametrize(
    ("settings", "field", "keyword"),
    [
        ({"backend": "ddp"}, "parallel.backend='ddp'", "shard_map"),
        ({"distributed": "yes"}, "parallel.distributed='yes'", "auto"),
        ({"heartbeat_timeout_seconds": 1}, "parallel.heartbeat_timeout_seconds=1", "10"),
        ({"process_id": 0}, "parallel.process_id=0", "coordinator"),
        ({"coordinator": "a:1"}, "parallel.num_processes=None", "coordinator"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "parallel.coordinator='a'", "port"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "parallel.coordinator='a:0'", "port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "parallel.process_id=2", "[0, 2)"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 0, "distributed": "off"},
            "parallel.coordinator='a:1'",
            "parallel.distributed",
        ),
    ],
)
def test_inconsistent_settings_are_refused(settings, field, keyword):
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**settings).validate()
    start, _, allowed = str(caught.value).partition(": ")
    assert start == field
    assert keyword in allowed
