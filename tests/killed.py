"""Kill a training run at one moment after another; each process resumes from the files that the last one left.

    python killed.py ARGUMENTS_OF_MAIN

The processes are forks of one process that has imported everything, so that a dozen of them take little longer than
one. Each kills itself with SIGKILL, which leaves no time for cleanup.
"""

import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sklearn.datasets  # noqa: F401  # imported before the forks

from cifar_flax import cli, files
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.data import sources
from cifar_flax.modes import evaluate, train
from cifar_flax.telemetry.metrics_log import MetricsWriter
from cifar_flax.training import loop, metrics, trainer


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, when=lambda *arguments: True):
    """Patch `owner.name`: kill the process before a call whose arguments satisfy `when`."""
    original = getattr(owner, name)

    def killing(*arguments, **settings):
        if when(*arguments):
            kill()
        return original(*arguments, **settings)

    setattr(owner, name, killing)


def after(owner, name, when=lambda *arguments: True):
    """Patch `owner.name`: kill the process after a call whose arguments satisfy `when`."""
    original = getattr(owner, name)

    def killing(*arguments, **settings):
        result = original(*arguments, **settings)
        if when(*arguments):
            kill()
        return result

    setattr(owner, name, killing)


def in_a_line():
    """Kill the process when a part of a line of metrics.jsonl has been written."""

    def write(writer, record):
        writer._file.write(b'{"step": ')
        writer._file.flush()
        kill()

    MetricsWriter.write = write


def in_removal():
    """Kill the process when a part of an old checkpoint has been removed."""

    def remove(folder, aside):
        folder.rename(aside)
        next(path for path in aside.rglob("*") if path.is_file()).unlink()
        kill()

    files.remove_folder = remove


MOMENTS = {
    "start": lambda: before(sources, "load_both"),
    "config.json": lambda: before(os, "replace"),
    "compilation": lambda: before(trainer.Trainer, "compile"),
    "step": lambda: before(loop.TrainingLoop, "_read", lambda run, step, values: step == 5),
    "line": in_a_line,
    "evaluation": lambda: before(metrics, "add", lambda total, sums: total is not None),
    "writing": lambda: before(Checkpoints, "_finish"),  # while Orbax writes in the background
    "written": lambda: before(files, "write_sealed"),
    "sealed": lambda: after(files, "write_sealed"),
    "saved": lambda: before(Checkpoints, "_remove_old"),
    "later step": lambda: before(loop.TrainingLoop, "_read", lambda run, step, values: step == 18),
    "removal": in_removal,
    "last step": lambda: after(loop.TrainingLoop, "_read", lambda run, step, values: step == 34),
    "end": lambda: before(train, "evaluate"),
    "result": lambda: before(evaluate, "write_json"),
    "report": lambda: before(evaluate, "write_report"),
}

if __name__ == "__main__":
    sys.argv = ["main.py", *sys.argv[1:]]
    for moment, arrange in MOMENTS.items():
        child = os.fork()
        if not child:
            arrange()
            os._exit(cli.main())
        _, status = os.waitpid(child, 0)
        print(f"{moment}: {os.waitstatus_to_exitcode(status)}", flush=True)
    sys.exit(cli.main())
