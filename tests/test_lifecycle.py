"""Test signal handling: when signals end the process, the exit codes, and the handlers afterwards."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY

from cifar_flax.runtime import signals
from cifar_flax.runtime.signals import Stopped, deferred, signals_raise_stopped

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
OTHER_CODES = [(signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGXCPU, 152)]


def send(number):
    """Send a signal to this process and wait until its handler has run."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), CODES + OTHER_CODES)
def test_a_signal_outside_training_raises_stopped(number, code):
    """`except Exception` does not catch `Stopped`, but cleanup code runs."""

    def run():
        with signals_raise_stopped():
            try:
                send(number)
            except Exception:
                pytest.fail("Stopped was caught as an Exception")

    with pytest.raises(Stopped, match=number.name) as caught:
        run()
    assert caught.value.exit_code == code


def stop_training(capfd, *numbers, announced):
    """Send signals in a block of `deferred`, wait until the `announced` ones are printed, and return the exit code."""

    def run():
        with signals_raise_stopped():
            with deferred() as signal_number:
                assert signal_number() == 0
                for number in numbers:
                    send(number)
                assert signal_number() == numbers[0]
                printed = ""
                while (names := re.findall("(SIG.*): saving", printed)) != announced:  # by another thread
                    assert len(names) < len(announced), printed
                    time.sleep(0.01)
                    printed += capfd.readouterr().err
            pytest.fail("leaving deferred() did not raise Stopped")

    with pytest.raises(Stopped) as caught:
        run()
    return caught.value.exit_code


@pytest.mark.parametrize(("number", "code"), CODES)
def test_deferred_leaves_signals_to_the_training_loop(number, code, capfd):
    assert stop_training(capfd, number, announced=[number.name]) == code


@pytest.mark.parametrize(("number", "code"), OTHER_CODES)
def test_signals_that_come_more_than_once_do_not_prevent_the_save(number, code, capfd):
    """The shell and the kernel send SIGHUP when a terminal closes, then systemd SIGTERM; SIGXCPU comes every second."""
    numbers = (number, number, signal.SIGHUP, signal.SIGTERM)
    assert stop_training(capfd, *numbers, announced=[number.name, "SIGTERM"]) == code


def test_a_signal_at_the_end_of_training_is_not_lost():
    def run():
        with signals_raise_stopped(), deferred():
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(20):
        with pytest.raises(Stopped):
            run()


def test_a_signal_is_not_lost_if_its_exception_is_swallowed(monkeypatch):
    """Exceptions in callbacks of the garbage collector, such as JAX's, are only printed."""
    sent = []

    def collecting(phase, info):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    def run(block):
        sent.clear()
        with signals_raise_stopped():
            gc.collect()
            with block:
                pass

    monkeypatch.setattr(sys, "unraisablehook", lambda error: None)
    gc.callbacks.append(collecting)
    try:
        for block in (contextlib.nullcontext(), deferred()):
            with pytest.raises(Stopped):
                run(block)
            assert sent
    finally:
        gc.callbacks.remove(collecting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_the_parent_ignores_stay_ignored(number):
    """A shell script starts background jobs with SIGINT ignored, `nohup` a command with SIGHUP ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_raise_stopped(), deferred() as signal_number:
            send(number)
            assert signal_number() == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_previous_handlers_are_restored():
    def mine(number, frame):
        seen.append(number)

    seen = []
    before = {number: signal.signal(number, mine) for number in signals.SIGNALS}
    try:
        with signals_raise_stopped():
            assert all(signal.getsignal(number) is not mine for number in signals.SIGNALS)
        assert all(signal.getsignal(number) is mine for number in signals.SIGNALS)
        assert signal.set_wakeup_fd(-1) == -1
        send(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_other_signals_keep_their_handlers():
    seen = []
    before = signal.signal(signal.SIGWINCH, lambda number, frame: seen.append(number))
    try:
        with signals_raise_stopped(), deferred() as signal_number:
            send(signal.SIGWINCH)
            assert signal_number() == 0
    finally:
        signal.signal(signal.SIGWINCH, before)
    assert seen == [signal.SIGWINCH]


def test_a_second_run_in_a_process_starts_without_a_pending_signal():
    with pytest.raises(Stopped), signals_raise_stopped(), deferred():
        send(signal.SIGTERM)
    for context in (contextlib.nullcontext(), signals_raise_stopped()):
        with context, deferred() as signal_number:
            assert signal_number() == 0


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize(("block", "count"), [("deferred()", 2), ("contextlib.nullcontext()", 1)])
def test_signals_end_a_process_whose_main_thread_is_busy(number, code, block, count):
    """With `deferred()`, a second signal ends the process at once; without it, the first one does so soon."""
    program = (
        "import contextlib, hashlib\n"
        "from cifar_flax.runtime import signals\n"
        "from cifar_flax.runtime.signals import deferred, signals_raise_stopped\n"
        "signals._GRACE = 0.5\n"
        f"with signals_raise_stopped(), {block}:\n"
        "    print('busy', flush=True)\n"
        # Takes minutes, in which no Python handler runs, like an XLA compilation.
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    run = [sys.executable, "-c", program]
    with (
        open("/dev/full", "w") as nobody,  # failed writes to stderr must not change the exit code
        subprocess.Popen(run, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=nobody, text=True) as process,
    ):
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.2)
        for _ in range(count):
            process.send_signal(number)
            time.sleep(0.3)
        try:
            assert process.wait(timeout=30) == code
        finally:
            process.kill()
