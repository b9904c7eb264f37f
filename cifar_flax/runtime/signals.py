"""How a run ends that is asked to: by SIGTERM, which schedulers send before they take the machine, or by SIGINT."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 3.0  # seconds for the main thread to come out of what it does, if that is nothing that a run would lose

_deferring = False  # whether the training loop is at work, which looks itself
_asked = 0  # the number of the first signal


class Stopped(KeyboardInterrupt):
    """The process has been asked to end. Not an `Exception`: nobody takes it for a failure of what it was doing."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as shells have it


@contextlib.contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Here, SIGTERM and SIGINT raise `Stopped` in the main thread; in a block of `deferred`, that is left to the loop.

    A second signal ends the process at once, whatever the main thread is busy with. That takes a thread of its own:
    Python runs no handler while the main thread compiles, or waits for the device.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # What the parent has had ignored stays so, as for the background jobs of a script; None is a handler not Python's.
    ours = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, _handle) for number in ours}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
        if _asked:  # and whoever was at work has swallowed the exception, as callbacks from C do
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
    """Here, the first signal does nothing but show in what is yielded: the number of the signal, 0 before there is one.

    Raises `Stopped` where there has been one before, and at the end of a block that has not heeded it.
    """
    global _deferring
    if _asked:  # and somebody has swallowed the exception
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
    _asked = _asked or number
    if not _deferring:
        raise Stopped(number)


def _watch(reader: int) -> None:
    """Reads the number of each signal as soon as it has come; ends when the pipe is closed."""
    first = True
    while byte := os.read(reader, 1):
        number = byte[0]
        if number not in SIGNALS:
            continue
        name = signal.Signals(number).name
        if first and _deferring:
            _say(f"{name}: saving after this step; a second signal stops at once")
            first = False
            continue
        if first:
            readable, _, _ = select.select([reader], [], [], _GRACE)
            if readable and not os.read(reader, 1):
                return
        _say(f"stopped by {name}")
        os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        print(line, file=sys.stderr, flush=True)
