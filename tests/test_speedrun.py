"""The speedrun benchmark: its metrics, its rule, its file, and a PyTorch script that runs alternately with ours."""

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from benchmarks import report, speedrun
from benchmarks.baselines import original
from cifar_flax import arguments
from cifar_flax.data import sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig
from cifar_flax.models.summary import forward_flops

DIGITS = str(REPOSITORY / "configs" / "quickstart.py")
FIELDS = ("train.epochs=1", "model.width=4", "model.hidden=16", "optim.warmup_epochs=0")
TINY = [f"--config.{field}" for field in FIELDS]
# Loops and prints as the original scripts do; each run is more accurate by 0.1 than the one before.
SCRIPT = """
import sys
import torch

with open(sys.argv[0]) as file:
    code = file.read()

def row(*cells):
    print("".join(f"|  {cell}  " for cell in cells) + "|")

def main(run):
    kept = torch.load("cifar10/test.pt")
    assert sorted(kept) == ["classes", "images", "labels"] and len(kept["images"]) == 355, kept
    assert __import__("builtins").range is range  # in functions it is Python's own
    for epoch in range(2):
        row(run if epoch == 0 else "", epoch, "0.9", "0.5", "", "1.0")
    accuracy = 1.0 if run == "warmup" else 0.1 * (run + 1)
    with open("runs", "a") as file:
        file.write("x")
    row("", "eval", "0.9", "0.5", f"{accuracy:.4f}", f"{2.0 ** run if run != 'warmup' else 9.0:.4f}")
    return accuracy

if __name__ == "__main__":
    print("-" * 20)
    row("run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds")
    main("warmup")
    accuracies = torch.tensor([main(run) for run in range(200)])
    print("Mean: %.4f    Std: %.4f" % (accuracies.mean(), accuracies.std()))
"""


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--config", DIGITS, *TINY, *arguments])
    return speedrun.main()


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # the process is not to be started again
    monkeypatch.setattr(speedrun, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speedrun, "compile_seconds", lambda runner: {"cold": 2.0, "warm": 1.0})


COMPILE_SECONDS = speedrun.compile_seconds


def test_every_seed_is_a_run_of_its_own(tmp_path, monkeypatch, capsys):
    counted, compile_all = [], speedrun.Speedrun.compile

    def counting(runner):
        events = []
        jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
        compile_all(runner)
        jax.monitoring.clear_event_listeners()
        counted.append((events.count("cache_hits"), events.count("cache_misses")))

    monkeypatch.setattr(speedrun, "compile_seconds", COMPILE_SECONDS)
    monkeypatch.setattr(speedrun.Speedrun, "compile", counting)
    assert start(monkeypatch, "--trials=3", "--config.seed=5", "--config.eval.tta=mirror") == 0
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "speedrun_quickstart_cpu.json"
    result = json.loads(path.read_text())
    trials = result["ours"]["trials"]
    assert [trial["seed"] for trial in trials] == [5, 6, 7]
    assert len({trial["accuracy"] for trial in trials}) > 1
    assert result["ours"]["accuracy"]["mean"] == pytest.approx(np.mean([trial["accuracy"] for trial in trials]))
    assert all(trial["seconds"] > 0 for trial in trials)
    assert result["config"]["seed"] == 5
    images, seconds = 23 * 64, result["ours"]["seconds"]["mean"]  # 1,442 images in batches of 64
    assert result["images_per_second"] == pytest.approx(images / seconds)
    forward = forward_flops(CNNConfig(width=4, hidden=16), (32, 32, 3), 10)
    assert result["flops"] == forward * (3 * images + 2 * 355)  # two views of each test image
    assert set(result["compile_seconds"]) == {"cold", "warm"}
    _, (none, compiled), (found, again) = counted  # at the start, cold and warm
    assert none == again == 0 < compiled == found
    assert 0 < result["seconds_to_first_accuracy"] < result["process_seconds"]
    assert {"cpu", "cores", "date", "device"} == set(result["machine"])
    assert {"python", "platform", "jax", "jaxlib", "flax", "optax", "numpy", "XLA_FLAGS"} <= set(result["versions"])
    out = capsys.readouterr().out
    for seed in (5, 6, 7):
        assert f"seed {seed}: " in out
    for part in (report.TIMED, report.NOT_TIMED, "95 % interval", "TFLOP/s", "warm cache", "from its start"):
        assert part in out


def test_a_run_equals_that_of_main(tmp_path, monkeypatch):
    """The same accuracy as by training to a checkpoint, restoring it and evaluating it."""
    from cifar_flax.modes.train import train

    assert start(monkeypatch, "--trials=1") == 0
    (path,) = (tmp_path / "results").iterdir()
    train(arguments.parse(["--config", DIGITS, *TINY]).config, tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "eval.json").read_text())["accuracy"]
    assert json.loads(path.read_text())["ours"]["trials"][0]["accuracy"] == expected


def test_the_clock_covers_what_the_rule_times(monkeypatch):
    """From before the initial weights and shuffling to after the evaluation; nothing compiles in between."""
    compiled_run = speedrun.Speedrun(speedrun.arguments.parse(["--config", DIGITS, *TINY]).config)
    events, clock = [], speedrun.time.perf_counter

    def watch(owner, name, what):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: events.append(what) or call(*arguments))

    for name in ("init", "inputs"):
        watch(compiled_run._trainer, name, name)
    for name, what in (("_train_call", "train"), ("_evaluator", "evaluate")):
        watch(compiled_run, name, what)
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: events.append("clock") or clock())
    compiled = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *arguments, **settings: compiled.append(arguments))
    compiled_run.run(0)
    order = [what for what, again in zip(events, [None, *events], strict=False) if what != again]
    assert [what for what in order if what != "clock"] == ["inputs", "init", "train", "evaluate"]
    assert order[0] == order[-1] == "clock"
    assert not compiled


def test_intervals_are_students():
    """Of four values 1, 2, 3, 4: t is 3.182 for three degrees of freedom."""
    metrics = report.mean_of([1.0, 2.0, 3.0, 4.0])
    assert metrics["mean"] == 2.5
    assert metrics["std"] == pytest.approx(1.2910, abs=1e-4)
    assert metrics["interval"] == pytest.approx(3.1824 * 1.2910 / 2, abs=1e-3)
    assert report.mean_of([3.0]) == {"mean": 3.0, "std": None, "interval": None}


def test_a_baseline_runs_alternately_with_ours(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert start(monkeypatch, "--trials=3", f"--baseline={script}", "--out=out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["baseline"]["script"] == "script.py"
    its = [(trial["accuracy"], trial["seconds"]) for trial in result["baseline"]["trials"]]
    assert its == [(0.2, 2.0), (0.3, 4.0), (0.4, 8.0)]  # the first run is a warm-up
    ratios = [trial["seconds"] / seconds for trial, (_, seconds) in zip(result["ours"]["trials"], its, strict=True)]
    assert result["time_ratio"] == {"median": np.median(ratios), "min": min(ratios), "max": max(ratios)}
    mean = np.mean([trial["accuracy"] for trial in result["ours"]["trials"]])
    difference = result["accuracy_difference"]
    assert difference["mean"] == pytest.approx(mean - 0.3)
    assert difference["low"] < difference["mean"] < difference["high"]
    assert "torch" in result["versions"]
    out = capsys.readouterr().out
    turns = [line.split(":")[0] for line in out.splitlines() if line.startswith(("seed", "script.py:"))]
    assert turns == ["seed 0", "script.py", "seed 1", "script.py", "seed 2", "script.py"]
    assert "our time over its" in out


def test_a_baseline_waits_for_its_turn(tmp_path, monkeypatch):
    """The process that runs the script, with a fake torch that writes no data."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("import torch", "from fake_torch import torch"))
    (tmp_path / "fake_torch.py").write_text(
        "from types import SimpleNamespace\nimport numpy as np\n"
        "torch = SimpleNamespace(load=lambda path: {'classes': 0, 'images': range(355), 'labels': 0},"
        " save=lambda kept, path: None, tensor=lambda values, dtype=None: np.array(values), int64=None)\n"
    )
    (tmp_path / "torch.py").write_text("from fake_torch import torch\nglobals().update(vars(torch))\n")
    monkeypatch.setattr(original, "REPOSITORY", f"{REPOSITORY}:{tmp_path}")
    splits = {split: sources.load(DataConfig(name="digits"), split) for split in ("train", "test")}
    counts = []
    with original.start(script, splits) as baseline:
        (folder,) = Path(tempfile.gettempdir()).glob("*/cifar10")
        for run in range(3):
            time.sleep(0.2)
            counts.append(len((folder.parent / "runs").read_text()) - 1)  # without its own warm-up
            assert baseline.run() == {"accuracy": pytest.approx(0.1 * (run + 1)), "seconds": 2.0**run}
    assert counts == [0, 1, 2]


FAKE_TORCH = "load = save = tensor = lambda *arguments, **settings: None\nint64 = None\n"


@pytest.mark.parametrize(
    ("torch", "script", "message"),
    [
        ("raise SystemExit(7)", "", "ended with exit code 7; it printed last: nothing"),
        (FAKE_TORCH, "print('done')", "ended with exit code 0; it printed last: done"),
        (FAKE_TORCH, "[run for run in range(3)]", "prints no table with columns tta_val_acc and time_seconds"),
        (
            FAKE_TORCH,
            "print('| tta_val_acc | time_seconds |')\nfor run in range(3): print('| | |')",
            r"ends a run without an accuracy: '| | |\n\n'",
        ),
    ],
)
def test_a_failing_baseline_is_reported_in_one_line(
    tmp_path, monkeypatch, capsys, as_if_torch_were_there, torch, script, message
):
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(original, "REPOSITORY", f"{REPOSITORY}:{tmp_path}")
    monkeypatch.setattr(speedrun, "Speedrun", lambda config: SimpleNamespace(num_images=1, flops=lambda: 1.0))
    assert start(monkeypatch, "--trials=1", f"--baseline={tmp_path / 'script.py'}") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'script.py'} {message}\n"


def test_an_interrupted_benchmark_keeps_its_runs(tmp_path, monkeypatch, capsys):
    run = speedrun.Speedrun.run

    def interrupted(self, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return run(self, seed)

    monkeypatch.setattr(speedrun.Speedrun, "run", interrupted)
    assert start(monkeypatch, "--trials=3", "--out=out.json") == 130
    assert "interrupted; all finished runs are written\n" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())["ours"]["trials"]) == 1


@pytest.fixture
def as_if_torch_were_there(monkeypatch):
    monkeypatch.setattr(speedrun, "has_module", lambda name: True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--baseline=nowhere.py", "--baseline='nowhere.py': no such file"),
        (
            "--baseline=.",
            "--baseline='.': is a folder: name a script in it (known for airbench94, airbench95, airbench96)",
        ),
        ("--config.seed=x", "seed='x': must be a whole number"),
        ("--config.seed=4294967290", "--trials=10: leads above the seed 4294967295"),
        ("--out=/", "--out='/': is a folder"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, as_if_torch_were_there, argument, message):
    assert start(monkeypatch, argument) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_checkout_contains_the_original_of_a_config(tmp_path, monkeypatch, as_if_torch_were_there):
    monkeypatch.setattr("os.environ", {})
    for name, script in speedrun.ORIGINALS.items():
        (tmp_path / script).parent.mkdir(exist_ok=True)
        (tmp_path / script).touch()
        assert speedrun.original_of(tmp_path, name) == tmp_path / script


def test_a_baseline_needs_torch(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "has_module", lambda name: False)
    assert start(monkeypatch, "--baseline=script.py") == 2
    assert capsys.readouterr().err == "error: --baseline='script.py': needs PyTorch, which is not installed\n"
