"""Run test_accelerator.py on the CPU: with two virtual devices, and without the permission to use a CPU."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from processes import environment, virtual_devices


def run(*arguments, **variables):
    command = [sys.executable, "-m", "pytest", "-m", "accelerator", "-rs", "-p", "no:cacheprovider"]
    command += ["tests/test_accelerator.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.slow
def test_accelerator_tests_pass_in_a_rehearsal(request):
    some = ["-k", "layout or bits or evaluation"] if request.config.getoption("--reduced") else []
    done = run(*some, REHEARSE="1", **virtual_devices(2))
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout
    assert "accelerator tests ran on 2 x cpu" in done.stdout


@pytest.mark.slow
def test_accelerator_tests_are_skipped_on_a_cpu():
    done = run(REHEARSE="")
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^=+ \d+ skipped in", done.stdout, re.MULTILINE)
    assert "JAX finds no GPU or TPU" in done.stdout
