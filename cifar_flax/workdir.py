"""The folder of a run: whose it is, and of which config."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cifar_flax import config as configs
from cifar_flax import files
from cifar_flax.checkpoints.metadata import CHECKPOINTS, DamagedError, read_metadata, saved_steps
from cifar_flax.config import Config
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.runtime import processes

_CONFIG = "config.json"
_LOCK = ".lock"


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """Here, no other run writes to `workdir`, which is made if it is not there, and it is one of `config`.

    Raises `UserError` where another run is at work in it or it cannot be used, `ConfigError` where it holds a run of a
    config that differs in more than what no weight tells.
    """
    field = f"--workdir={str(workdir)!r}"
    with contextlib.ExitStack() as stack:
        try:
            if processes.is_main():
                workdir.mkdir(parents=True, exist_ok=True)
                _lock(stack, workdir, field)
            _require_same(workdir, config, field)
            if processes.is_main():
                files.write_json(workdir / _CONFIG, configs.to_dict(config))
            processes.wait_for_all()
            if not (workdir / _CONFIG).exists():
                raise UserError(f"{field}: must be one folder for all processes; process 0 has made another")
        except OSError as error:
            raise UserError(f"{field}: cannot be used as the folder of a run: {error.strerror}") from error
        yield


def require_usable(workdir: Path, config: Config) -> None:
    """Raises what `opened` would of a run that is in `workdir`; nothing is written."""
    field = f"--workdir={str(workdir)!r}"
    if holder := files.lock_holder(workdir / _LOCK):
        raise _taken(field, holder)
    _require_same(workdir, config, field)


def _taken(field: str, holder: str) -> UserError:
    return UserError(f"{field}: {holder} trains there; wait for its end or choose another --workdir")


def _lock(stack: contextlib.ExitStack, workdir: Path, field: str) -> None:
    path = workdir / _LOCK
    try:
        stack.enter_context(files.locked(path, wait=False))
    except BlockingIOError as error:
        raise _taken(field, path.read_text(errors="replace") or "another process") from error
    for left in workdir.glob(f".*{files.PARTIAL}"):  # what killed runs were writing
        left.unlink(missing_ok=True)


def _require_same(workdir: Path, config: Config, field: str) -> None:
    """Raises `ConfigError` unless the run in `workdir`, if there is one, goes on with `config`."""
    saved, where = _saved(workdir, field)
    changed = [] if saved is None else configs.differences(saved, config, where)
    if changed:
        raise ConfigError(
            f"{field}: holds a run of another config ({'; '.join(changed)}); choose another --workdir, or set them back"
        )


def _saved(workdir: Path, field: str) -> tuple[Config | None, str]:
    """The config of the newest checkpoint that tells it, else that in config.json of a run that has begun; and which.

    Raises `UserError` where a run that has come further has lost its checkpoints: it would begin anew, and that be the
    end of its log.
    """
    checkpoints = workdir / CHECKPOINTS
    steps = saved_steps(checkpoints)
    for step in reversed(steps):
        with contextlib.suppress(DamagedError):  # restoring will say so
            return configs.from_dict(read_metadata(checkpoints, step)["config"]), "the checkpoint"
    log, path = workdir / "metrics.jsonl", workdir / _CONFIG
    if not log.exists() or not log.stat().st_size:
        return None, ""
    has_begun = checkpoints.is_dir() and path.exists() and not (workdir / "eval.json").exists()
    if not steps and not has_begun:
        raise UserError(f"{field}: has a {log.name}, but its {CHECKPOINTS} are gone; put them back, or choose another")
    if not path.exists():
        return None, ""  # all checkpoints are damaged: restoring will refuse
    try:
        return configs.from_dict(files.read_json(path)), path.name
    except ConfigError as error:
        raise UserError(
            f"{field}: its {_CONFIG} is none of this version ({error}); choose another --workdir"
        ) from error
    except ValueError as error:
        raise UserError(f"{field}: its {_CONFIG} is damaged ({error}); choose another --workdir") from error
