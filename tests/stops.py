"""Stop a run with a real signal at a chosen moment."""

import os
import signal
import time

import pytest

from cifar_flax.modes import train
from cifar_flax.runtime.signals import Stopped, signals_raise_stopped


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


def saved(workdir):
    """Return the sorted steps of the checkpoints in `workdir`."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
