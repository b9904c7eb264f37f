"""Stops a run from inside, by real signals, at a moment of its life."""

import os
import signal
import time

import pytest

from cifar_flax.modes import train
from cifar_flax.runtime.signals import Stopped, signals_end_the_process


def stop_at(monkeypatch, owner, name, when):
    """Sends SIGTERM to this very process when `owner.name` is called with such arguments, the first time."""
    original, sent = getattr(owner, name), []

    def stopping(*arguments, **settings):
        if not sent and when(*arguments):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, stopping)


def stopped(config, workdir):
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught, signals_end_the_process():
        train.train(config, workdir)
    assert caught.value.exit_code == 143


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
