"""Entry point of `python main.py`, `python -m cifar_flax` and `cifar-flax`.

Nothing heavy is imported before the installed packages are checked.
"""

import contextlib
import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from cifar_flax import packages
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator, streams

if TYPE_CHECKING:
    from cifar_flax.arguments import Command


def entry_point() -> NoReturn:
    """Run the command in `sys.argv` and exit with its exit code."""
    streams.prepare()
    os.environ["MPLBACKEND"] = "agg"  # the value of a notebook may name a module that this process does not have
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no warnings about its cache
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C interrupts the imports
    allocator.keep_freed_memory()  # re-executes the process, so it precedes the slow imports
    try:
        check_installation()
    except UserError as error:
        if re.search(r"--?mode[= ]doctor\b", " ".join(sys.argv)):
            from cifar_flax.modes.doctor import examine_installation

            examine_installation(error)
        streams.show(f"error: {error}", error=True)
        sys.exit(error.exit_code)
    from cifar_flax.runtime import processes

    processes.run(main)


def check_installation() -> None:
    """Import the packages that every mode needs; raise `UserError` if one is missing, too old or broken."""
    packages.require(packages.REQUIRED)
    with contextlib.suppress(UserError):  # JAX imports it, and can do without it if it is missing, but not broken
        packages.load("flatbuffers")
    for required in packages.REQUIRED:
        packages.load(required)
    try:
        from cifar_flax import arguments  # noqa: F401
    except Exception as error:  # importing incompatible packages can raise anything
        if (name := packages.culprit(error)) is None:
            raise
        raise packages.broken(name, error) from error


def main() -> int:
    """Run the mode in `sys.argv` and return the exit code. Errors that the user can fix are printed as one line."""
    from cifar_flax import arguments
    from cifar_flax.runtime import compilation, devices, processes, settings, signals

    def fail(line: str, code: int) -> int:
        streams.show(f"{processes.label()}{line}", error=True)
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
        # Packages import some modules only when they need them.
        name = packages.culprit(error) if isinstance(error, ImportError) else None
        known = packages.broken(name, error) if name else processes.lost_peer(error)
        if known is None:
            raise
        return fail(f"error: {known}", known.exit_code)
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
        case "study":
            from cifar_flax.modes.study import study

            assert command.space is not None
            study(command.space, command.search, workdir, on_test=command.on_test, is_large=command.is_large)
        case "compare":
            from cifar_flax.modes.compare import compare

            compare(command.paths, command.output, on_test=command.on_test)
        case "export":
            from cifar_flax.modes.export import export

            assert command.output is not None
            export(config, workdir, command.output)
        case "doctor":
            from cifar_flax.modes.doctor import doctor

            doctor(config, workdir, online=command.online)
