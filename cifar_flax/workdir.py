"""Lock the folder of a run, and check that its config has not changed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cifar_flax import config as configs
from cifar_flax import files
from cifar_flax.checkpoints.metadata import CHECKPOINTS, DamagedError, read_metadata, saved_steps
from cifar_flax.config import Config
from cifar_flax.errors import ConfigError, UserError, first_of
from cifar_flax.runtime import processes

_CONFIG = "config.json"
_LOCK = ".lock"


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """Create and lock `workdir`, write `config` to its config.json, and keep the lock until the end of the block.

    Raise `UserError` if another run uses `workdir` or if it cannot be written, `ConfigError` if it holds a run whose
    config differs in a setting that affects the trained weights.
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
                raise UserError(f"{field}: must be one folder shared by all processes; process 0 created another one")
        except OSError as error:
            raise UserError(f"{field}: cannot be used as the folder of a run: {error.strerror}") from error
        yield


def require_usable(workdir: Path, config: Config) -> None:
    """Raise the errors that `opened` would raise for the run in `workdir`, without writing anything."""
    field = f"--workdir={str(workdir)!r}"
    if holder := files.lock_holder(workdir / _LOCK):
        raise _taken(field, holder)
    _require_same(workdir, config, field)


def _taken(field: str, holder: str) -> UserError:
    return UserError(f"{field}: is in use by {holder}; wait until it ends, or choose another --workdir")


def _lock(stack: contextlib.ExitStack, workdir: Path, field: str) -> None:
    path = workdir / _LOCK
    try:
        stack.enter_context(files.locked(path, wait=False))
    except BlockingIOError as error:
        raise _taken(field, path.read_text("utf-8", errors="replace") or "another process") from error
    for left in workdir.glob(f".*{files.PARTIAL}"):  # remains of killed runs
        left.unlink(missing_ok=True)


def _require_same(workdir: Path, config: Config, field: str) -> None:
    """Raise `ConfigError` if `workdir` holds a run that cannot resume with `config`."""
    saved, where = _saved(workdir, field)
    changed = [] if saved is None else configs.differences(saved, config, where)
    if changed:
        raise ConfigError(f"{field}: holds a run with another config ({first_of(changed)}); choose another --workdir")


def _saved(workdir: Path, field: str) -> tuple[Config | None, str]:
    """Return the config of the run in `workdir` and its source, or (None, "") if there is none.

    The config comes from the newest readable checkpoint, or from config.json if the run has no checkpoint yet. Raise
    `UserError` if the checkpoints of the run are gone: a restart from step 0 would overwrite its log.
    """
    checkpoints = workdir / CHECKPOINTS
    steps = saved_steps(checkpoints)
    for step in reversed(steps):
        with contextlib.suppress(DamagedError):  # reported when it is restored
            return configs.from_dict(read_metadata(checkpoints, step)["config"]), "the checkpoint"
    log, path = workdir / "metrics.jsonl", workdir / _CONFIG
    if not log.exists() or not log.stat().st_size:
        return None, ""
    has_started = checkpoints.is_dir() and path.exists() and not (workdir / "eval.json").exists()
    if not steps and not has_started:
        raise UserError(f"{field}: has a {log.name} but no {CHECKPOINTS}; restore them or choose another --workdir")
    if not path.exists():
        return None, ""  # all checkpoints are damaged: reported when they are restored
    try:
        return configs.from_dict(files.read_json(path)), path.name
    except ConfigError as error:
        raise UserError(
            f"{field}: its {_CONFIG} does not fit this version ({error}); choose another --workdir"
        ) from error
    except ValueError as error:
        raise UserError(f"{field}: its {_CONFIG} is damaged ({error}); choose another --workdir") from error
