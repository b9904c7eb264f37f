"""Test benchmarks.accelerator: stages, time limits, resumption after a kill, the results file and the report."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY

from benchmarks import accelerator, campaign, device_profile, rehearsal, report, stages
from benchmarks.speedrun import Deadline
from benchmarks.stages import STAGES
from cifar_flax import files
from cifar_flax.errors import UserError

RESULTS = REPOSITORY / "benchmarks" / "results" / "campaign_nvidia_h200.json"


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *arguments])
    return accelerator.main()


def read_stages(path):
    return json.loads(path.read_text())["stages"] if path.exists() else {}


@pytest.mark.slow
def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    arguments = ["--rehearse", "--out", str(out), "--stages", "machine"]
    assert start(monkeypatch, *arguments) == 0
    (stage,) = read_stages(out).values()
    assert stage["status"] == "done"
    assert stage["result"]["speed"]["bfloat16"]["flops"] > 0
    assert stage["result"]["devices"] == ["cpu"]
    assert start(monkeypatch, *arguments) == 0
    assert "machine: finished before" in capsys.readouterr().out
    assert read_stages(out) == {"machine": stage}
    assert "machine: finished before" in out.with_suffix(".log").read_text()


@pytest.mark.slow
def test_a_stage_that_exceeds_its_limit_is_killed_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setitem(STAGES, "process", dataclasses.replace(STAGES["process"], limit=0.05))
    assert start(monkeypatch, "--rehearse", "--out", str(out), "--stages", "process", "machine") == 1
    found = read_stages(out)
    assert (found["process"]["status"], found["machine"]["status"]) == ("timed out", "done")
    assert f"what to do: {STAGES['process'].advice}" in capsys.readouterr().out


def test_no_stage_starts_without_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_END_SECONDS", 100.0)
    out = tmp_path / "results.json"
    assert start(monkeypatch, "--rehearse", "--budget=100", "--out", str(out), "--stages", "machine") == 1
    printed = capsys.readouterr()
    assert "not started" in printed.out
    assert printed.err.startswith("error: --budget=100: ")
    assert not read_stages(out)


@pytest.mark.parametrize(
    ("arguments", "field", "keyword"),
    [
        ([], "JAX finds no GPU or TPU", "--rehearse"),
        (["--data", "nowhere"], "--data='nowhere'", "no such"),
        (["--data", ".", "--out", "x.json"], "--data='.'", "cifar10"),
        (["--data", ".", "."], "--data='. .'", "one folder"),
        (["--rehearse", "--out", "/"], "--out='/'", "folder"),
        (["--rehearse", "--out", "other.json"], "--out='other.json'", "results file"),
    ],
)
def test_invalid_arguments_print_one_line(tmp_path, monkeypatch, capsys, arguments, field, keyword):
    (tmp_path / "other.json").write_text("[]")
    monkeypatch.setattr(accelerator, "device_name", lambda: "cpu")
    assert start(monkeypatch, *arguments) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert field in line
    assert keyword in line


def test_deadline_allows_no_round_that_would_end_late(monkeypatch):
    now = iter([0.0, 3.0, 8.0, 10.1])  # rounds of 3, 5 and 2.1 seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    deadline = Deadline(15.0)
    assert [deadline.allows_another() for _ in range(4)] == [True, True, True, False]


def make_results(**seconds_and_accuracy):
    def ours(seconds, accuracy):
        ours = {"seconds": {"mean": seconds, "interval": 0.1}, "accuracy": {"mean": accuracy}}
        return {"status": "done", "result": {"ours": ours}}

    return {name: ours(*values) for name, values in seconds_and_accuracy.items()}


@pytest.mark.parametrize(
    ("variants", "best"),
    [
        ({"variant_float16": (2.1, 0.95)}, None),
        ({"variant_float16": (1.9, 0.95)}, None),  # the intervals overlap
        ({"variant_float16": (1.5, 0.9392), "variant_one_cuda_graph": (1.7, 0.94)}, "float16"),
        ({"variant_float16": (1.5, 0.9380), "variant_one_cuda_graph": (1.7, 0.94)}, "one_cuda_graph"),
    ],
)
def test_the_winner_is_the_fastest_variant_that_is_as_accurate(variants, best):
    assert stages.best_variant(make_results(airbench94_wide=(2.0, 0.94), **variants)) == best


@pytest.mark.parametrize(
    "names", [(), ("airbench94_wide",), ("variant_float16",), ("airbench94_wide", "variant_float16")], ids="+".join
)
def test_the_winner_needs_finished_measurements(names):
    results = make_results(**dict.fromkeys(names, (1.0, 0.94)))
    for name in names[1:]:
        results[name]["status"] = "timed out"
    with pytest.raises(UserError, match="come first"):
        stages.best_variant(results)


def test_operations_of_a_trace_are_traced_back_to_jax(tmp_path):
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    compiled = function.lower(x).compile()
    jax.block_until_ready(compiled(x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(x))
    (path,) = tmp_path.rglob("*.xplane.pb")
    seconds, count = device_profile.operations(jax.profiler.ProfileData.from_file(str(path)))
    assert count >= len(seconds) > 0
    assert all(value >= 0 for value in seconds.values())
    (module,) = compiled.runtime_executable().hlo_modules()
    sources = device_profile.operation_sources(module.to_string())
    assert any("sin" in sources.get(device_profile.plain(name), "") for name in seconds)


def test_time_inside_another_operation_counts_once():
    events = [(0, 10, "loop"), (1, 4, "a"), (4, 9, "b"), (5, 6, "a"), (12, 15, "c")]
    found = device_profile.own_seconds(events)
    assert {name: round(1e9 * value) for name, value in found.items()} == {"loop": 2, "a": 4, "b": 4, "c": 3}


def test_report_shows_the_measured_figures():
    results = campaign.read(RESULTS)
    text = report.text(results)
    ours = results["stages"]["airbench94_muon"]["result"]["ours"]
    assert f"Accuracy: {100 * ours['accuracy']['mean']:.2f} % (mean of n={len(ours['trials'])}" in text
    assert f"| {ours['seconds']['mean']:.2f} s |" in text
    assert "Operations: 0.298 PFLOP" in text
    for name, stage in results["stages"].items():
        assert f"| {name} | {stage['status']}" in text
    headings = ("# Rows for README.md", "# Page")
    assert all(heading in report.text({"stages": {}}) for heading in headings)


def test_a_stage_ends_with_the_campaign_and_its_children_with_it():
    """The end of the campaign closes the stage's standard input."""
    program = (
        "import subprocess, time; from benchmarks import stages; stages.follow_parent()\n"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, start_new_session=True) as stage:
        try:
            assert int(stage.stdout.readline()) > 0
            stage.stdin.close()
            assert stage.wait(60) == -signal.SIGKILL
            assert stage.stdout.read() == b""  # returns once the child, which holds the pipe too, has ended
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(stage.pid, signal.SIGKILL)


def run_rehearsal(out, names):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--rehearse", "--budget", "1200", "--out", str(out)]
    with out.with_suffix(".txt").open("a") as printed:
        return subprocess.Popen([*command, "--stages", *names], cwd=REPOSITORY, stdout=printed, stderr=printed)


def wait_until_running(process, out, names):
    """Wait until one of the stages runs, and return its name; None if the campaign ended instead."""
    while process.poll() is None:
        running = [name for name, stage in read_stages(out).items() if stage["status"] == "running"]
        if set(running) & set(names):
            return running[0]
        time.sleep(0.05)
    return None


def processes_of(out):
    """Return the ids of the processes whose command line names `out`."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline") as file:
                found += [int(number)] * (str(out) in file.read())
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for the processes in /proc")
def test_a_campaign_killed_in_every_stage_measures_everything(tmp_path, request):
    """The first fake peer fails in its second counted run; the results of the others are whole."""
    out, names = tmp_path / "results.json", list(STAGES)
    if request.config.getoption("--reduced"):
        names = ["machine", "airbench94_wide", "profile"]
    left = set(names)
    while left:
        before = read_stages(out)
        process = run_rehearsal(out, names)
        killed = wait_until_running(process, out, left)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left -= {killed} if killed else left
        deadline = time.monotonic() + 60
        while processes_of(out):  # wait until the killed stage, which writes to the file, has ended too
            assert time.monotonic() < deadline
            time.sleep(0.1)
        done = {name: stage for name, stage in before.items() if stage["status"] == "done"}
        assert done.items() <= read_stages(out).items()
    process = run_rehearsal(out, names)
    assert process.wait() == 0, out.with_suffix(".txt").read_text()[-3000:]
    found = read_stages(out)
    assert {name: stage["status"] for name, stage in found.items()} == dict.fromkeys(names, "done")
    peers = found["airbench94_wide"]["result"]["peers"]
    assert "out of memory" in out.with_suffix(".log").read_text()
    assert (len(peers["failing_peer.py"]["trials"]), "error" in peers["failing_peer.py"]) == (1, True)
    assert (len(peers["fake_peer.py"]["trials"]), "error" in peers["fake_peer.py"]) == (rehearsal.TRIALS, False)
    assert len(found["airbench94_wide"]["result"]["ours"]["trials"]) == rehearsal.TRIALS
    assert found["profile"]["result"]["operations"]
    if "correctness" in found:
        assert set(found["correctness"]["result"]["tests"].values()) <= {"passed", "skipped"}
    assert str(report.text(campaign.read(out)))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"stages": 1}', '{"stages": {"machine": {}}}', '{"stages": {"machine": 3}}']
)
def test_results_file_of_another_program_is_kept(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match="results file"):
        campaign.read(path)
    assert path.read_text() == text


def test_results_of_another_device_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    campaign.claim(path, device="cpu", rehearsal=True)
    campaign.update(path, "machine", status="done", result={"a": 1})
    campaign.claim(path, device="cpu", rehearsal=True)
    before = path.read_text()
    with pytest.raises(UserError, match="cpu"):
        campaign.claim(path, device="cpu", rehearsal=False)
    assert path.read_text() == before


def test_an_earlier_result_stays_until_there_is_a_new_one(tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    campaign.update(out, "machine", status="timed out", result={"measured": 1})
    monkeypatch.setitem(STAGES, "machine", dataclasses.replace(STAGES["machine"], limit=0.05))
    assert start(monkeypatch, "--rehearse", "--out", str(out), "--stages", "machine") == 1
    assert read_stages(out)["machine"]["result"] == {"measured": 1}
    assert read_stages(out)["machine"]["status"] == "timed out"


def test_only_one_campaign_writes_to_a_file(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    with files.locked(out.with_suffix(".lock"), wait=False):
        assert start(monkeypatch, "--rehearse", "--out", str(out), "--stages", "machine") == 1
    assert "another campaign" in capsys.readouterr().err
    assert not out.exists()
