"""Test the speedrun benchmark: metrics, timing rules, result files, and runs alternating with a PyTorch script."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from benchmarks import runs, speedrun
from benchmarks.baselines import original
from cifar_flax import arguments
from cifar_flax.data import sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError
from cifar_flax.models import AirbenchConfig
from cifar_flax.runtime.devices import Layout
from cifar_flax.training import metrics

DIGITS = str(REPOSITORY / "configs" / "quickstart.py")
FIELDS = ("train.epochs=1", "model.width=4", "model.hidden=16", "optim.warmup_epochs=0")
TINY = [f"--config.{field}" for field in FIELDS]
# Loops and prints like the original scripts; the accuracy increases by 0.1 per run.
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
    assert __import__("builtins").range is range  # functions see the built-in range
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
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # do not restart the process to change this variable
    monkeypatch.setattr(speedrun, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speedrun, "compile_seconds", lambda run: run.compile() or {"cold": 2.0, "warm": 1.0})


COMPILE_SECONDS = speedrun.compile_seconds


@pytest.mark.slow
def test_each_seed_is_a_separate_run(tmp_path, monkeypatch, capsys):
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
    conv, dense = 30**2 * 9 * 3 * 4, 15**2 * 4 * 16 + 16 * 10
    # The images have no gradient. There are two TTA views of each test image.
    assert result["flops"] == 2 * (images * (2 * conv + 3 * dense) + 2 * 355 * (conv + dense))
    assert set(result["compile_seconds"]) == {"cold", "warm"}
    (no_hits, misses), (hits, no_misses) = counted  # with a cold and a warm cache
    assert no_hits == no_misses == 0 < misses == hits
    assert 0 < result["seconds_to_first_accuracy"] < result["process_seconds"]
    assert {"cpu", "cores", "date", "device"} == set(result["machine"])
    assert {"python", "platform", "jax", "jaxlib", "flax", "optax", "numpy", "XLA_FLAGS"} <= set(result["versions"])
    out = capsys.readouterr().out
    for seed in (5, 6, 7):
        assert f"seed {seed}: " in out
    for part in (runs.TIMED, runs.NOT_TIMED, "95 %", "TFLOP/s", "warm cache", "first accuracy"):
        assert part in out


def test_a_run_equals_training_with_main(tmp_path, monkeypatch):
    """The accuracy equals that of a run that saves and restores a checkpoint before the evaluation."""
    from cifar_flax.modes.train import train

    assert start(monkeypatch, "--trials=1") == 0
    (path,) = (tmp_path / "results").iterdir()
    train(arguments.parse(["--config", DIGITS, *TINY]).config, tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "eval.json").read_text())["accuracy"]
    assert json.loads(path.read_text())["ours"]["trials"][0]["accuracy"] == expected


def test_the_clock_covers_a_whole_run_without_compilation(monkeypatch):
    """Timing starts before shuffling and initialization, and ends after the evaluation.

    Meanwhile, nothing compiles, no images are copied to the device, and no metric but the accuracy is computed.
    """
    config = arguments.parse(["--config", DIGITS, *TINY]).config
    config.model = AirbenchConfig(widths=(4, 4, 4))  # its whitening layer needs images for the initialization
    compiled_run = speedrun.Speedrun(config)
    compiled_run.compile()
    monkeypatch.delattr(Layout, "replicate")
    monkeypatch.delattr(metrics, "summarize")
    events, clock = [], speedrun.time.perf_counter

    def watch(owner, name, event):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: events.append(event) or call(*arguments))

    for name in ("init", "inputs"):
        watch(compiled_run._trainer, name, name)
    watch(compiled_run, "_train_call", "train")
    watch(compiled_run._evaluator, "accuracy", "evaluate")
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: events.append("clock") or clock())
    compiled = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *arguments, **settings: compiled.append(arguments))
    compiled_run.run(0)
    order = [event for event, again in zip(events, [None, *events], strict=False) if event != again]
    assert [event for event in order if event != "clock"] == ["inputs", "init", "train", "evaluate"]
    assert order[0] == order[-1] == "clock"
    assert not compiled


def test_intervals_use_the_t_distribution():
    """For the four values 1, 2, 3, 4: t is 3.182 for three degrees of freedom."""
    spread = runs.mean_of([1.0, 2.0, 3.0, 4.0])
    assert spread["mean"] == 2.5
    assert spread["std"] == pytest.approx(1.2910, abs=1e-4)
    assert spread["interval"] == pytest.approx(3.1824 * 1.2910 / 2, abs=1e-3)
    assert runs.mean_of([3.0]) == {"mean": 3.0, "std": None, "interval": None}


@pytest.mark.usefixtures("torch_is_installed")
def test_peers_alternate_with_this_project_after_it_has_run_alone(tmp_path, monkeypatch, capsys):
    script = SCRIPT.replace('torch.load("cifar10/test.pt")', "dict(classes=0, images=range(355), labels=0)")
    script = script.replace("import torch\n", "").replace("torch.tensor", "").partition('    print("Mean')[0]
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "failing.py").write_text(script.replace("def main(run):", "def main(run):\n    assert run != 2"))
    assert start(monkeypatch, "--trials=3", "--peer", "failing.py", "script.py", "--out=out.json") == 1
    result = json.loads((tmp_path / "out.json").read_text())
    ours = result["ours"]["trials"]
    assert [trial["seed"] for trial in ours] == [0, 1, 2]
    assert all(0 < trial["train_seconds"] < trial["seconds"] for trial in ours)
    peers = result["peers"]
    assert list(peers) == ["failing.py", "script.py"]
    assert "exit code 1" in peers["failing.py"]["error"]
    assert len(peers["failing.py"]["trials"]) == 1  # its results before it failed are kept
    assert peers["failing.py"]["accuracy_difference"]["low"] is None
    peer = peers["script.py"]
    # The first runs are the script's warm-up and one that is not counted.
    expected = [{"accuracy": 0.1 * (run + 1), "seconds": 2.0**run, "train_seconds": 1.0} for run in (1, 2, 3)]
    assert peer["trials"] == [pytest.approx(trial) for trial in expected]
    for name, clock in (("time_ratio", "seconds"), ("train_time_ratio", "train_seconds")):
        ratios = [mine[clock] / trial[clock] for mine, trial in zip(peer["ours"], peer["trials"], strict=True)]
        assert peer[name] == {"median": np.median(ratios), "min": min(ratios), "max": max(ratios)}
    assert [trial["seed"] for trial in peer["ours"]] == [5, 6, 7]  # two more while the first peer ran
    mean, difference = np.mean([trial["accuracy"] for trial in peer["ours"]]), peer["accuracy_difference"]
    assert difference["mean"] == pytest.approx(mean - 0.3)
    assert difference["low"] < difference["mean"] < difference["high"]
    out, errors = capsys.readouterr()
    turns = [line.split(":")[0] for line in out.splitlines() if re.match(r"seed|script.py: .*%", line)]
    assert turns == [f"seed {seed}" for seed in range(5)] + [
        turn for seed in (5, 6, 7) for turn in (f"seed {seed}", "script.py")
    ]
    assert "ours / the peer's" in out
    assert errors.splitlines()[-1].startswith("error: ")


def test_a_peer_runs_only_when_asked(tmp_path, monkeypatch):
    """Run the peer's process with a fake torch, which writes no data."""
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
    with original.start(script, splits) as peer:
        (folder,) = Path(tempfile.gettempdir()).glob("*/cifar10")
        for run in range(3):
            time.sleep(0.2)
            counts.append(len((folder.parent / "runs").read_text()) - 1)  # without the warm-up
            expected = {"accuracy": pytest.approx(0.1 * (run + 1)), "seconds": 2.0**run, "train_seconds": 1.0}
            assert peer.run() == expected
    assert counts == [0, 1, 2]


FAKE_TORCH = "load = save = tensor = lambda *arguments, **settings: None\nint64 = None\n"


@pytest.mark.parametrize(
    ("torch", "script", "reason"),
    [
        ("raise SystemExit(7)", "", "exit code 7"),
        (FAKE_TORCH, "print('done')", "exit code 0; last line: done"),
        pytest.param(FAKE_TORCH, "[run for run in range(3)]", "tta_val_acc", marks=pytest.mark.slow),
        pytest.param(
            FAKE_TORCH,
            "print('| tta_val_acc | time_seconds |')\nfor run in range(3): print('| | |')",
            r"'| | |\n\n'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failing_peer_is_reported_in_one_line(
    tmp_path, monkeypatch, capsys, torch_is_installed, torch, script, reason
):
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(original, "REPOSITORY", f"{REPOSITORY}:{tmp_path}")
    assert start(monkeypatch, "--trials=1", f"--peer={tmp_path / 'script.py'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: script.py ")
    assert reason in line


def test_an_interrupted_benchmark_keeps_its_runs(tmp_path, monkeypatch, capsys):
    run = speedrun.Speedrun.run

    def interrupted(self, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return run(self, seed)

    monkeypatch.setattr(speedrun.Speedrun, "run", interrupted)
    assert start(monkeypatch, "--trials=3", "--out=out.json") == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())["ours"]["trials"]) == 1


@pytest.fixture
def torch_is_installed(monkeypatch):
    monkeypatch.setattr(speedrun, "has_module", lambda name: True)


@pytest.mark.parametrize(
    ("argument", "field", "keyword"),
    [
        ("--peer=nowhere.py", "--peer='nowhere.py'", "no such file"),
        ("--peer=.", "--peer='.'", "airbench94, airbench94_muon, airbench94_wide, airbench95, airbench96"),
        ("--config.seed=x", "seed='x'", "must be"),
        ("--config.seed=4294967290", "--trials=10", "4294967295"),
        ("--out=/", "--out='/'", "folder"),
    ],
)
def test_invalid_arguments_print_one_line(monkeypatch, capsys, torch_is_installed, argument, field, keyword):
    assert start(monkeypatch, argument) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {field}: ")
    assert keyword in line


def test_script_of_a_config_is_found_in_a_checkout(tmp_path, monkeypatch, torch_is_installed):
    monkeypatch.setattr("os.environ", {})
    for name, script in speedrun.ORIGINALS.items():
        (tmp_path / script).parent.mkdir(exist_ok=True)
        (tmp_path / script).touch()
        assert speedrun.scripts_of([tmp_path], name) == [tmp_path / script]


def test_scripts_have_different_names(tmp_path, torch_is_installed):
    """The results name each script."""
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "script.py", tmp_path / "other" / "script.py"]
    for path in paths:
        path.touch()
    with pytest.raises(ConfigError, match=r"--peer='script.py'"):
        speedrun.scripts_of(paths, "default")


def test_a_peer_needs_torch(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "has_module", lambda name: False)
    assert start(monkeypatch, "--peer=script.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --peer='script.py': ")
    assert "PyTorch" in line
