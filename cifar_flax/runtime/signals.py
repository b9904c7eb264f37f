"""Graceful shutdown on the signals of schedulers before they end a job, of Ctrl-C and of a closed terminal."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

from cifar_flax.runtime import streams

_URGENT = (signal.SIGTERM, signal.SIGINT)  # end the process at once if they are not the first signal
# The others may come more than once for one reason: SIGHUP from the shell and from the kernel, SIGXCPU every second.
# Windows lacks them.
_OTHERS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = (*_URGENT, *(getattr(signal, name) for name in _OTHERS if hasattr(signal, name)))
_GRACE = 3.0  # seconds for the main thread to raise `Stopped` outside of training; then the process is ended

_deferring = False  # whether the main thread is in a block of `deferred`, which checks for signals itself
_asked = 0  # number of the first signal; 0: none yet


class Stopped(KeyboardInterrupt):
    """Raised when a signal stops the process. Not an `Exception`, so that `except Exception` does not swallow it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # the convention of shells


@contextlib.contextmanager
def signals_raise_stopped() -> Iterator[None]:
    """Make `SIGNALS` raise `Stopped` in the main thread inside the block, except in a block of `deferred`.

    After the first signal, a second SIGTERM or SIGINT ends the process immediately; the others are ignored. A separate
    thread watches for them, because Python runs no handler while the main thread compiles or waits for the device.
    """
    global _asked
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Signals that the parent ignores stay ignored, such as SIGHUP after `nohup`. None: a handler not set by Python.
    ours = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, _handle) for number in ours}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
        if _asked:  # the exception was swallowed, as in callbacks from C
            raise Stopped(_asked)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)
        _asked = 0


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the first signal, or 0 if there was none.

    Inside the block, the first signal raises nothing. Raise `Stopped` at the end of the block if there was a signal, or
    at its start if an earlier `Stopped` was swallowed.
    """
    global _deferring
    if _asked:  # an earlier exception was swallowed
        raise Stopped(_asked)
    _deferring = True
    try:
        yield lambda: _asked
    finally:
        _deferring = False
    if _asked:
        raise Stopped(_asked)


def _handle(number: int, frame: object) -> None:
    global _asked
    if not _asked:
        _asked = number
        if not _deferring:
            raise Stopped(number)


def _watch(reader: int) -> None:
    """React to each signal as soon as its number is in the pipe. Return when the pipe is closed."""
    counted, is_urgent = SIGNALS, False
    while byte := os.read(reader, 1):
        number = byte[0]
        if number not in counted:
            continue
        name = signal.Signals(number).name
        if _deferring and not is_urgent:
            streams.show(f"{name}: saving after this step; a second SIGTERM or SIGINT stops at once", error=True)
            counted, is_urgent = _URGENT, number in _URGENT  # SIGTERM often follows SIGHUP before the state is saved
            continue
        if not is_urgent:
            readable, _, _ = select.select([reader], [], [], _GRACE)
            if readable and not os.read(reader, 1):
                return
        streams.show(f"stopped by {name}", error=True)
        os._exit(128 + number)
