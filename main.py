"""Trains and evaluates: `python main.py --config configs/default.py`, `python main.py --mode=eval --workdir=...`."""

from cifar_flax import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # starts this file again, so before the imports that take their time

import io
import sys

from cifar_flax import cli, compilation
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
        MODES[command.mode](command.config, command.workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
