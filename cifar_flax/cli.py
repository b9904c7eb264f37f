"""Entry point of `python main.py`, `python -m cifar_flax` and `cifar-flax`.

Nothing heavy is imported before the installed packages are checked.
"""

import contextlib
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cifar_flax import packages
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator, streams

if TYPE_CHECKING:
    from cifar_flax.arguments import Command


def entry_point() -> NoReturn:
    """Run the command in `sys.argv` and exit with its exit code."""
    streams.prepare()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C interrupts the imports
    allocator.keep_freed_memory()  # re-executes the process, so it precedes the slow imports
    error = check_installation()
    if error is not None:
        sys.exit(_report_installation(error))
    from cifar_flax.runtime import processes

    processes.run(main)


def check_installation() -> UserError | None:
    """Import the packages that every mode needs; return an error if one is missing, too old or broken.

    The error names the package and the required version.
    """
    try:
        packages.require(packages.REQUIRED)
        from cifar_flax import arguments  # noqa: F401  # imports JAX, Flax, Optax and Orbax too
    except UserError as error:
        return error
    except Exception as error:  # importing incompatible packages can raise anything
        name = packages.culprit(error)
        if name is None:
            raise
        return packages.broken(name, error)
    return None


def _report_installation(error: UserError) -> int:
    if re.search(r"--?mode[= ]doctor\b", " ".join(sys.argv)):
        from cifar_flax.modes.doctor import examine_installation

        examine_installation(error)
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def main() -> int:
    """Run the mode in `sys.argv` and return the exit code. Errors that the user can fix are printed as one line."""
    from cifar_flax import arguments
    from cifar_flax.runtime import compilation, devices, processes, settings, signals

    def fail(line: str, code: int) -> int:
        with contextlib.suppress(OSError):  # stderr may be closed
            print(f"{processes.label()}{line}", file=sys.stderr)
        return code

    for line in settings.pin():
        fail(line, 0)
    compilation.enable_cache()
    try:
        command = arguments.parse(sys.argv[1:])
        if command.mode in ("train", "eval"):  # the other modes run in one process
            processes.start(command.config.parallel)
        if command.mode not in ("compare", "doctor"):
            devices.all_devices()  # report a missing device before anything else
        with signals.signals_raise_stopped():
            _run(command)
    except UserError as error:
        return fail(f"error: {error}", error.exit_code)
    except OSError as error:  # such as a full disk or a read-only folder
        return fail(f"error: {error}", 1)
    except signals.Stopped as stopped:
        return fail(str(stopped), stopped.exit_code)
    except Exception as error:
        lost = processes.lost_peer(error)
        if lost is None:
            raise
        return fail(f"error: {lost}", lost.exit_code)
    return 0


def _run(command: "Command") -> None:
    """Run the mode. Its module is imported only now: `predict` starts faster without importing the training loop."""
    config, workdir = command.config, command.workdir
    match command.mode:
        case "train":
            from cifar_flax.modes.train import train

            train(config, workdir, summary=command.summary)
        case "eval":
            from cifar_flax.modes.evaluate import evaluate

            evaluate(config, workdir)
        case "predict":
            from cifar_flax.modes.predict import predict

            predict(config, workdir, command.paths, command.output)
        case "compare":
            from cifar_flax.modes.compare import compare

            compare(command.paths, command.output or Path("comparison.html"))
        case "export":
            from cifar_flax.modes.export import export

            assert command.output is not None
            export(config, workdir, command.output)
        case "doctor":
            from cifar_flax.modes.doctor import doctor

            doctor(config, workdir)
