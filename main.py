"""Trains, evaluates and uses image classifiers: `python main.py --help`."""

import signal

from cifar_flax import allocator

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of imports; lifecycle.py takes over
    allocator.keep_freed_memory()  # starts this file again, so before the imports that take their time

import contextlib
import io
import sys
from pathlib import Path

try:
    from cifar_flax import cli, compilation, distributed, lifecycle, parallel
    from cifar_flax.cli import Command
    from cifar_flax.doctor import doctor
    from cifar_flax.errors import UserError
    from cifar_flax.evaluate import evaluate
    from cifar_flax.export import export
    from cifar_flax.predict import predict
    from cifar_flax.report.comparison import compare
    from cifar_flax.train import train
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed (pip install -r requirements.txt)")


def run(command: Command) -> None:
    config, workdir = command.config, command.workdir
    match command.mode:
        case "train":
            train(config, workdir, summary=command.summary)
        case "eval":
            evaluate(config, workdir)
        case "predict":
            predict(config, workdir, command.paths, command.output)
        case "compare":
            compare(command.paths, command.output or Path("comparison.html"))
        case "export":
            assert command.output is not None
            export(config, workdir, command.output)
        case "doctor":
            doctor(config, workdir)


def main() -> int:
    compilation.keep_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line at once, and keeps it if the run is killed
    try:
        command = cli.parse(sys.argv[1:])
        if command.mode in ("train", "eval"):  # the others are of one process
            distributed.start(command.config.parallel)
        if command.mode not in ("compare", "doctor"):
            parallel.all_devices()  # the first use of JAX says what is wrong with it
        with lifecycle.signals_end_the_process():
            run(command)
    except UserError as error:
        return _fail(f"error: {error}", error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written to
        return _fail(f"error: {error}", 1)
    except lifecycle.Stopped as stopped:
        return _fail(str(stopped), stopped.exit_code)
    except Exception as error:
        lost = distributed.lost_peer(error)
        if lost is None:
            raise
        return _fail(f"error: {lost}", lost.exit_code)
    return 0


def _fail(line: str, code: int) -> int:
    with contextlib.suppress(OSError):  # of nobody who reads it
        print(f"{distributed.label()}{line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    distributed.run(main)
