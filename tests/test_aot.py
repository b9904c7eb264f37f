"""Programs compiled for chips that this machine does not have."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from conftest import REPOSITORY, make_tiny_config

from benchmarks import aot, programs, topologies
from cifar_flax import arguments
from cifar_flax.errors import UserError
from cifar_flax.runtime.devices import Layout
from cifar_flax.training.evaluator import final_evaluator
from cifar_flax.training.setup import setup
from cifar_flax.training.trainer import Trainer

SMALL = """
from configs import airbench94_muon

def get_config():
    config = airbench94_muon.get_config()
    config.model.widths = (32, 64, 64)
    config.train.batch_size, config.train.steps_per_call, config.train.log_every = 500, 4, 4
    config.eval.batch_size, config.eval.tta = 500, "mirror"
    return config
"""
WHITENING = "f32 x f32 -> f32"  # dtypes of its convolution on a TPU
DEFAULT = str(REPOSITORY / "configs" / "default.py")
# (target, config) -> kernels per step and MiB of temporary memory of the training program: at most a quarter more than
# measured with jax 0.12, and not far less, for then the bound has lost its meaning.
BOUNDS = {
    ("h100:1", "default"): (69, 58),
    ("h100:1", "small"): (176, 106),
    ("v5e:1x1", "default"): (112, 4),
    ("v5e:1x1", "small"): (188, 6),
    ("v6e:1x1", "default"): (120, 4),
    ("v6e:1x1", "small"): (212, 53),
}


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["aot.py", *arguments])
    return aot.main()


def test_an_unknown_target_is_one_line(monkeypatch, capsys):
    assert start(monkeypatch, "--target", "h100:1", "v5e:3x3") == 2
    assert re.fullmatch(r"error: --target='v5e:3x3': must be one of h100:1, .*v5e:1x1.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("target", "version", "command"),
    [
        ("h100:4", None, r"pip install --no-deps jax-cuda13-plugin==([\d.]+) jax-cuda13-pjrt==\1"),
        ("h100:4", "0.1", r"pip install --no-deps jax-cuda13-plugin==([\d.]+) jax-cuda13-pjrt==\1"),
        ("v6e:1x1", None, r'pip install "jax\[tpu\]==[\d.]+"'),
    ],
)
def test_a_missing_compiler_is_one_line_with_the_command_that_installs_it(
    target, version, command, monkeypatch, capsys
):
    """CUDA's must also be of jax's version."""
    monkeypatch.setattr(topologies, "_installed", lambda package: version)
    assert start(monkeypatch, "--target", target) == 1
    assert re.fullmatch(rf"error: --target='{target}': .*: {command}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("log_every", "tta_fraction", "final"),
    [(11, 1.0, ["final"]), (4, 0.5, ["final", "final_2"])],
    ids=["equal calls", "different calls"],
)
def test_programs_are_those_of_a_run(monkeypatch, log_every, tta_fraction, final):
    """For this machine, the compiler gets programs of the same arguments, results, donations and products."""
    config = make_tiny_config()
    config.data.drop_last = True
    config.train.steps_per_call, config.train.log_every = 11, log_every  # an epoch has 11 steps
    config.optim.biases.frozen_from = 1.0
    config.eval.tta, config.eval.tta_fraction = "mirror", tta_fraction
    trainer, requested = Trainer(config), []
    any_program = jax.jit(lambda: 0).lower().compile()

    def record(lowered, compiler_options):
        text = lowered.as_text()
        products = re.findall(r"stablehlo\.(?:convolution|dot_general).*?: (.*)", text)
        requested.append((re.findall(r"@main.*", text), sorted(products), compiler_options))
        return any_program

    monkeypatch.setattr(jax.stages.Lowered, "compile", record)
    trainer.compile(trainer.initial_state)
    trainer.evaluator.compile(trainer.initial_state)
    final_evaluator(config, trainer.task, trainer.eval_arrays).compile(trainer.initial_state)
    expected = [one for one in requested if one[1]]  # not the one that sums metrics of logits
    requested.clear()

    monkeypatch.setattr(programs, "DATASET", trainer.info)
    monkeypatch.setattr(programs, "TEST_EXAMPLES", len(trainer.eval_arrays.labels))
    found = list(programs.programs(config, jax.devices()[:1], {}))
    names = [(program.name, program.steps) for program in found]
    assert names == [("train", log_every), ("frozen", log_every), *((name, 1) for name in ("eval", *final))]
    assert requested == expected
    assert all(signature for signature, _, _ in expected)
    assert len(expected) == len(names)
    assert "aliasing_output" in expected[0][0][0]


def test_each_size_and_set_of_frozen_groups_has_a_program(monkeypatch):
    """A program is named after its phase; airbench94_wide has four phases."""
    monkeypatch.setattr(Layout, "parallelize", lambda self, step, **settings: jax.jit(lambda *inputs: 0))
    config = arguments.parse(["--config", str(REPOSITORY / "configs" / "airbench94_wide.py")]).config
    names = [program.name for program in programs.programs(config, jax.devices()[:1], {})]
    assert names == ["train_24", "frozen_24", "frozen_28", "frozen_32", "eval", "final", "final_2"]


def test_results_of_a_program_replace_earlier_ones(tmp_path):
    names = [field.name for field in dataclasses.fields(aot.Row)]
    row = aot.Row(**dict.fromkeys(names, 0) | {"config": "a", "program": "train"})
    for number, config in enumerate("aba"):
        aot.save(tmp_path / "results" / "aot.json", dataclasses.replace(row, config=config, kernels=number))
    rows = json.loads((tmp_path / "results" / "aot.json").read_text())
    assert [(row["config"], row["kernels"]) for row in rows] == [("a", 2), ("b", 1)]


@pytest.fixture
def compile_for(tmp_path):
    """Return a function that compiles a config for a target, in a process of its own, and returns the rows."""

    def compile_for(target, path):
        command = [sys.executable, "-m", "benchmarks.aot", "--target", target, "--config", path, "--output", tmp_path]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / f"aot_{target.replace(':', '-')}.json").read_text())
        for row in rows:
            assert f"| {row['config']} | {row['program']} |" in done.stdout
        assert "models/layers.py" in done.stdout  # among the largest operations
        return {row["program"]: row for row in rows}

    return compile_for


@pytest.fixture
def small(tmp_path):
    """Return the path of a config: the recipe of airbench94_muon with fewer filters and a smaller batch."""
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return str(path)


def require_compiler(target, pytestconfig, *, slow=False):
    if pytestconfig.getoption("--reduced") and slow:
        pytest.skip("XLA:TPU takes minutes")
    try:
        topologies.require_compiler(topologies.TARGETS[target])
    except UserError as error:
        pytest.skip(str(error))


def assert_within_bounds(target, path, row):
    kernels, memory = BOUNDS[target, row["config"]]
    assert kernels / 2 < row["kernels"] < 1.25 * kernels
    assert row["temp_bytes"] < 1.25 * memory * 2**20
    config = arguments.parse(["--config", path]).config
    _, init = setup(config, programs.DATASET, jax.devices()[:1])
    state = jax.eval_shape(lambda: init(0, None))
    assert row["donated_bytes"] >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1", "v5e:1x1", "v6e:1x1"])
def test_default_config_on_one_device(target, compile_for, pytestconfig):
    require_compiler(target, pytestconfig, slow=target == "v6e:1x1")
    rows = compile_for(target, DEFAULT)
    assert rows.keys() == {"train", "eval"}
    for row in rows.values():
        assert "f64" not in row["element_types"]
        assert row["all_reduces"] == 0
        if target != "h100:1":
            assert_images_stay_whole(row, DEFAULT)
    assert rows["train"]["convolutions"] == 2  # there is no gradient with respect to the images
    assert_within_bounds(target, DEFAULT, rows["train"])


def assert_images_stay_whole(row, path):
    """The program does not copy a split, and gathers at most one slice per example: its image or its label."""
    config = arguments.parse(["--config", path]).config
    size, examples = config.eval.batch_size, programs.TEST_EXAMPLES
    if row["program"] in ("train", "frozen"):
        size, examples = config.train.batch_size, programs.DATASET.num_examples
    assert row["gathered_slices"] == size
    assert row["copied_image_bytes"] < examples * math.prod(programs.DATASET.image_shape)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1", "v5e:1x1", "v6e:1x1"])
def test_airbench_on_one_device(target, compile_for, small, pytestconfig):
    require_compiler(target, pytestconfig, slow=target != "h100:1")
    rows = compile_for(target, small)
    assert rows.keys() == {"train", "frozen", "eval", "final"}
    is_gpu = target.startswith("h100")
    for row in rows.values():
        assert "f64" not in row["element_types"]
        # On a TPU, the whitening layer is a convolution in float32; on a GPU, it is no convolution.
        assert set(row["dtypes"]) == {"bf16 x bf16 -> bf16"} | (set() if is_gpu else {WHITENING})
        assert is_gpu or row["dtypes"][WHITENING] == 1
        if not is_gpu:
            assert_images_stay_whole(row, small)
    # The whitening layer trains a bias only; each of the six other convolutions has two gradients.
    assert rows["train"]["convolutions"] == 3 * 6 + (not is_gpu)
    assert rows["frozen"]["convolutions"] == rows["train"]["convolutions"] - 1  # the frozen bias has no gradient
    assert rows["final"]["gflop"] == pytest.approx(2 * rows["eval"]["gflop"], rel=1e-3)  # two TTA views
    assert_within_bounds(target, small, rows["train"])


# (config, changes that make its network small, number of all-reduces in a training step)
ON_FOUR_DEVICES = [
    ("default", "", 3),
    ("airbench94_muon", "widths = (32, 64, 64)", 13),
    ("airbench96", "widths = (32, 64, 64)", 19),
    ("resnet18", "width = 16", 35),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change", "count"), ON_FOUR_DEVICES)
@pytest.mark.parametrize("target", ["h100:4", "v5e:2x2"])
def test_all_reduces_on_four_devices(target, name, change, count, compile_for, tmp_path, pytestconfig):
    """Each BatchNorm layer has one, forward and backward; gradients and metrics have one together.

    In a residual block of ResNet-18 with a shortcut that is a convolution, two layers have one together.
    """
    require_compiler(target, pytestconfig, slow=target != "h100:4" or name not in ("default", "airbench94_muon"))
    path = tmp_path / "config.py"
    path.write_text(
        f"from configs import {name}\n\ndef get_config():\n    config = {name}.get_config()\n"
        f"    {'config.model.' + change if change else 'pass'}\n    return config\n"
    )
    rows = compile_for(target, str(path))
    assert {row["all_reduces"] for program, row in rows.items() if program in ("train", "frozen")} == {count}
    assert rows["eval"]["all_reduces"] == 2


@pytest.mark.slow
def test_a_call_can_be_one_cuda_graph(tmp_path, pytestconfig):
    """Everything that XLA launches, the loop over the steps included, is in one graph (without the option, in 19)."""
    require_compiler("h100:1", pytestconfig)
    path = tmp_path / "config.py"
    path.write_text(SMALL.replace("    return", "    config.parallel.one_cuda_graph = True\n    return"))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--target=h100:1", "--config", path, "--output", tmp_path],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"},
        check=True,
        capture_output=True,
    )
    found = list(tmp_path.glob("*jit_train_steps.thunk_sequence_after_thunk_passes.txt"))
    assert len(found) == 2  # before and after the whitening bias is frozen
    for launches in found:
        lines = launches.read_text().splitlines()
        assert "kCommandBuffer" in lines[0]
        assert all(line.startswith(" ") for line in lines[1:] if ": k" in line)
        assert any("kWhile" in line for line in lines[1:])
