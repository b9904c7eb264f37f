"""Train, resume, evaluate, compare and export in the current folder, which holds a copy of the project.

    python extended_run.py CONFIG [--config.FIELD=VALUE ...]

The run in the folder `straight` is not interrupted. The one in `resumed` stops at step 3, in the middle of an epoch.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())

import jax
import numpy as np

from cifar_flax import cli
from cifar_flax.restore import restore, saved_config
from cifar_flax.training.loop import TrainingLoop

STOP = 4  # step, the last one of a call


def run(*arguments, code=0):
    """Run the command line; assert its exit code."""
    sys.argv = ["main.py", *arguments]
    found = cli.main()
    assert found == code, (arguments, found)


def main():
    config, *settings = sys.argv[1:]
    train = ("--config", config, *settings)
    run(*train, "--workdir=straight", "--summary")
    read = TrainingLoop._read

    def interrupted(loop, step, values):
        read(loop, step, values)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainingLoop._read = interrupted
    run(*train, "--workdir=resumed", code=128 + signal.SIGTERM)
    TrainingLoop._read = read
    run(*train, "--workdir=resumed")
    runs = [restore(saved_config(Path(name)), Path(name)) for name in ("straight", "resumed")]
    assert runs[0].step > STOP
    jax.tree.map(np.testing.assert_array_equal, *(restored.state for restored in runs))
    before = json.loads(Path("straight/eval.json").read_text())
    run("--mode=eval", "--workdir=resumed")
    assert json.loads(Path("resumed/eval.json").read_text()) == before
    run("--mode=compare", "straight", "resumed", "--output=comparison.html")
    run("--mode=export", "--workdir=resumed", "--output=exported")


if __name__ == "__main__":
    main()
