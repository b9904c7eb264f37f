"""Trains and evaluates: `python main.py --config configs/default.py`, `python main.py --mode=eval --workdir=...`."""

import signal

from cifar_flax import allocator

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of imports; lifecycle.py takes over
    allocator.keep_freed_memory()  # starts this file again, so before the imports that take their time

import contextlib
import io
import sys

from cifar_flax import cli, compilation, distributed, lifecycle
from cifar_flax.errors import UserError
from cifar_flax.evaluate import evaluate
from cifar_flax.train import train

MODES = {"train": train, "eval": evaluate}


def main() -> int:
    compilation.keep_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line at once, and keeps it if the run is killed
    try:
        command = cli.parse(sys.argv[1:], tuple(MODES))
        distributed.start(command.config.parallel)
        with lifecycle.signals_end_the_process():
            MODES[command.mode](command.config, command.workdir)
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
