"""Signals: who sees them, when the process ends, and what is as before afterwards."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY

from cifar_flax.runtime import signals
from cifar_flax.runtime.signals import Stopped, deferred, signals_end_the_process

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send(number):
    """The handler runs before this returns, or soon after."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_ends_what_is_no_training(number, code):
    """As an exception that nobody takes for a failure, so that what is half done is cleaned up."""

    def run():
        with signals_end_the_process():
            try:
                send(number)
            except Exception:
                pytest.fail("taken for a failure")

    with pytest.raises(Stopped, match=f"^stopped by {number.name}$") as caught:
        run()
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_left_to_the_training_loop(number, code, capfd):

    def run():
        with signals_end_the_process():
            with deferred() as signal_number:
                assert signal_number() == 0
                send(number)
                assert signal_number() == number
            pytest.fail("an unheeded signal is forgotten")

    with pytest.raises(Stopped) as caught:
        run()
    assert caught.value.exit_code == code
    assert f"{number.name}: saving after this step; a second signal stops at once" in capfd.readouterr().err


def test_the_last_moment_of_training_counts_too():
    def run():
        with signals_end_the_process(), deferred():
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(20):
        with pytest.raises(Stopped):
            run()


def test_a_signal_that_somebody_swallows_is_not_forgotten(monkeypatch):
    """As JAX's callback of the garbage collector does with whatever is raised in it."""
    sent = []

    def collecting(phase, info):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    def run(block):
        sent.clear()
        with signals_end_the_process():
            gc.collect()
            with block:
                pass

    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)
    gc.callbacks.append(collecting)
    try:
        for block in (contextlib.nullcontext(), deferred()):
            with pytest.raises(Stopped):
                run(block)
            assert sent
    finally:
        gc.callbacks.remove(collecting)


def test_what_the_parent_has_ignored_stays_so():
    """As a script's background jobs have SIGINT: its Ctrl-C is not for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_end_the_process(), deferred() as signal_number:
            send(signal.SIGINT)
            assert signal_number() == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_previous_handlers_are_restored():
    def mine(number, frame):
        seen.append(number)

    seen = []
    before = {number: signal.signal(number, mine) for number in signals.SIGNALS}
    try:
        with signals_end_the_process():
            assert all(signal.getsignal(number) is not mine for number in signals.SIGNALS)
        assert all(signal.getsignal(number) is mine for number in signals.SIGNALS)
        assert signal.set_wakeup_fd(-1) == -1
        send(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_other_signals_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with signals_end_the_process(), deferred() as signal_number:
            send(signal.SIGUSR1)
            assert signal_number() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_second_run_of_the_process_begins_unasked():
    with pytest.raises(Stopped), signals_end_the_process(), deferred():
        send(signal.SIGTERM)
    for context in (contextlib.nullcontext(), signals_end_the_process()):
        with context, deferred() as signal_number:
            assert signal_number() == 0


def test_in_another_thread_there_is_nothing_to_handle():
    entered = []

    def run():
        with signals_end_the_process():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize(("block", "signals"), [("deferred()", 2), ("contextlib.nullcontext()", 1)])
def test_a_busy_main_thread_holds_nothing_up(number, code, block, signals):
    """The second signal ends the process at once; the first, where there is nothing to save, soon."""
    program = (
        "import contextlib, hashlib\n"
        "from cifar_flax.runtime import signals\n"
        "from cifar_flax.runtime.signals import deferred, signals_end_the_process\n"
        "signals._GRACE = 0.5\n"
        f"with signals_end_the_process(), {block}:\n"
        "    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"  # minutes, and no handler runs: as when XLA compiles
    )
    run = [sys.executable, "-c", program]
    with (
        open("/dev/full", "w") as nobody,  # whatever is said must not be what the process ends of
        subprocess.Popen(run, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=nobody, text=True) as process,
    ):
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.2)
        for _ in range(signals):
            process.send_signal(number)
            time.sleep(0.3)
        try:
            assert process.wait(timeout=30) == code
        finally:
            process.kill()
