"""Stop a run with a real signal at a chosen moment."""

import os
import signal
import time

import pytest
from conftest import assert_same_run

from cifar_flax.modes import train
from cifar_flax.runtime.signals import Stopped, signals_raise_stopped
from cifar_flax.training import loop


def stop_at(monkeypatch, owner, name, when):
    """Send SIGTERM to this process at the first call of `owner.name` whose arguments satisfy `when`."""
    original, sent = getattr(owner, name), []

    def stopping(*arguments, **settings):
        if not sent and when(*arguments):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, stopping)


def stopped(config, workdir):
    """Train, and assert that SIGTERM ends the run with its exit code."""
    with pytest.raises(Stopped, match="SIGTERM") as caught, signals_raise_stopped():
        train.train(config, workdir)
    assert caught.value.exit_code == 143


def assert_stops_change_no_bit(config, folder, monkeypatch, steps):
    """Train without a stop, and with a stop after each of `steps`; assert that both runs are bitwise equal."""
    train.train(config, folder / "straight")
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(patch, loop.TrainingLoop, "_read", lambda run, now, values, step=step: now >= step)
            stopped(config, folder / "run")
    train.train(config, folder / "run")
    assert_same_run(config, folder / "straight", folder / "run")


def saved(workdir):
    """Return the sorted steps of the checkpoints in `workdir`."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
