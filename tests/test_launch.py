"""Run the Slurm and Kubernetes files of docs/devices.md on this machine, with their commands and variables."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from processes import CONFIG, assert_same_run, end, environment, free_port, reference

PAGE = (REPOSITORY / "docs" / "devices.md").read_text()


def block(title, language):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with main.py and a small, short config under the file name that the launch files use."""
    (tmp_path / "main.py").symlink_to(REPOSITORY / "main.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "resnet18.py").write_text(CONFIG)
    return tmp_path


def on_path(checkout):
    return f"{checkout / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def free_job():
    """Return a Slurm job ID whose coordinator port is free: JAX uses port 61440 + ID modulo 4096."""
    first = 2**16 - 2**12
    return free_port(range(first, 2**16)) - first


SRUN = """#!/bin/bash
# Replaces srun(1): starts all tasks with the variables that Slurm sets, and exits with the code of a failed task.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) SLURM_STEP_NUM_TASKS=$SLURM_NTASKS \\
    SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST "$@" &
done
for ((task = 0; task < SLURM_NTASKS; task++)); do wait -n || exit $?; done
"""


@pytest.mark.slow
def test_slurm(checkout):
    """Train in four processes; the results equal those of one process with four devices."""
    script = block("Slurm", "bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    nodes, per_node = int(directives["nodes"]), int(directives["ntasks-per-node"])
    assert int(directives["gpus-per-node"]) == per_node  # one process per GPU
    (checkout / "bin").mkdir()
    (checkout / "bin" / "srun").write_text(SRUN)
    (checkout / "bin" / "srun").chmod(0o755)
    (checkout / "job").write_text(script)
    variables = {
        "SLURM_JOB_ID": str(free_job()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": directives["cpus-per-task"],
    }
    job = subprocess.Popen(
        ["bash", "job"],
        cwd=checkout,
        env=environment(PATH=on_path(checkout), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ((out, err),) = end([job])
    assert job.returncode == 0, err
    for number in range(nodes * per_node):
        line = f"[process {number} of {nodes * per_node}, {socket.gethostname()}] 1 of {nodes * per_node} devices"
        assert line in out, err
    reference(checkout, nodes * per_node, "--config", "configs/resnet18.py")
    assert_same_run(checkout, "one", "runs/resnet18")


@pytest.mark.slow
def test_kubernetes(checkout):
    service, job = yaml.safe_load_all(block("Kubernetes", "yaml"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}  # Kubernetes adds this label to the Job's pods
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (spec["completionMode"], spec["parallelism"]) == ("Indexed", spec["completions"])
    (mount,) = container["volumeMounts"]
    assert mount["name"] == pod["volumes"][0]["name"]
    shutil.rmtree(checkout / "runs", ignore_errors=True)

    def localize(text, index):
        """Replace the coordinator's address, the path of the volume and the pod's index in `text`."""
        text = text.replace(f"{name}-0.{pod['subdomain']}:8476", f"127.0.0.1:{port}")
        text = text.replace(f"{mount['mountPath']}/", f"{checkout}{mount['mountPath']}/")
        return text.replace("$(JOB_COMPLETION_INDEX)", str(index))

    port, processes = free_port(), []
    for index in range(spec["completions"]):
        variables = {entry["name"]: localize(entry["value"], index) for entry in container["env"]}
        processes.append(
            subprocess.Popen(
                [localize(argument, index) for argument in container["command"]],
                cwd=checkout,
                env=environment(PATH=on_path(checkout), JOB_COMPLETION_INDEX=str(index), **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    printed = end(processes)
    assert [process.returncode for process in processes] == [0] * spec["completions"], printed
    assert "on 2 x cpu (shard_map)" in printed[0][0]
    assert json.loads((checkout / "runs" / "resnet18" / "eval.json").read_text())["num_examples"] == 355
