"""Run commands as another user or on a small disk, in Linux namespaces that need no root."""

import shlex
import subprocess

import pytest

NOBODY = ("--user", "--map-user=54321")  # a user without passwd entry and without root's access to every file
MOUNTS = ("--user", "--map-root-user", "--mount")  # may mount file systems that no other process sees


def run(namespaces, command, **options):
    """Run `command`, a list, in new `namespaces`; skip the test where the system forbids them."""
    try:
        probe = subprocess.run(["unshare", *namespaces, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if probe.returncode:
        pytest.skip(f"namespaces are forbidden here: {probe.stderr.strip()}")
    return subprocess.run(["unshare", *namespaces, *command], capture_output=True, text=True, **options)


def run_on_small_disk(folder, size, command, **options):
    """Run `command` with a file system of `size`, such as "4m", mounted on the existing `folder`."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(folder))} && exec {shlex.join(map(str, command))}"
    return run(MOUNTS, ["sh", "-c", mount], **options)
