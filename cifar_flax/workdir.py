"""Lock the folder of a run, and check that its config has not changed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cifar_flax import config as configs
from cifar_flax import files, restore
from cifar_flax.checkpoints.metadata import CHECKPOINTS, DamagedError, read_metadata, saved_steps
from cifar_flax.config import Config
from cifar_flax.errors import ConfigError, UserError, first_of
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes
from cifar_flax.study.record import STUDY

CONFIG = "config.json"
_LOCK = ".lock"


class InUseError(UserError):
    """Raised if another process uses the folder of a run."""


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """Create and lock `workdir`, write `config` to its config.json, and keep the lock until the end of the block.

    Raise `InUseError` if another run uses `workdir`, `UserError` if it cannot be written, `ConfigError` if it holds a
    run whose config differs in a setting that affects the trained weights.
    """
    field = f"--workdir={str(workdir)!r}"
    with contextlib.ExitStack() as stack:
        try:
            if processes.is_main():
                workdir.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(files.locked(workdir / _LOCK, wait=False))
                except BlockingIOError:
                    _require_free(workdir, field)
                    raise InUseError(f"{field}: is in use by another process") from None
                for left in workdir.glob(f".*{files.PARTIAL}"):  # remains of killed runs
                    left.unlink(missing_ok=True)
            _require_same(workdir, config, field)
            if processes.is_main():
                files.write_json(workdir / CONFIG, configs.to_dict(config))
            processes.wait_for_all()
            if not (workdir / CONFIG).exists():
                raise UserError(f"{field}: must be one folder shared by all processes; process 0 created another one")
        except OSError as error:
            raise UserError(f"{field}: cannot be used as the folder of a run: {error.strerror}") from error
        yield


def require_usable(workdir: Path, config: Config, *, may_be_in_use: bool = False) -> None:
    """Raise `UserError` if a run of `config` cannot start or resume in `workdir`; write nothing and need no data."""
    field = f"--workdir={str(workdir)!r}"
    if config.data.folder and workdir.resolve() == local_path("data.folder", config.data.folder).resolve():
        raise ConfigError(f"{field}: must not be data.folder, whose folders are classes; choose another folder")
    if (workdir / STUDY).exists():
        raise ConfigError(f"{field}: holds a study; choose another folder for the run")
    if not may_be_in_use:
        _require_free(workdir, field)
    _require_same(workdir, config, field)
    if config.train.init_from and not saved_steps(workdir / CHECKPOINTS):
        restore.saved_config(local_path("train.init_from", config.train.init_from), "train.init_from")


def _require_free(workdir: Path, field: str) -> None:
    if holder := files.lock_holder(workdir / _LOCK):
        raise InUseError(f"{field}: is in use by {holder}; wait until it ends, or choose another --workdir")


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
    log, path = workdir / "metrics.jsonl", workdir / CONFIG
    if not log.exists() or not log.stat().st_size:
        return None, ""
    has_started = checkpoints.is_dir() and path.exists() and not (workdir / "eval.json").exists()
    if not steps and not has_started:
        raise UserError(f"{field}: has a {log.name} but no {CHECKPOINTS}; restore them or choose another --workdir")
    if not path.exists():
        return None, ""  # all checkpoints are damaged: reported when they are restored
    try:
        return configs.from_dict(files.read_json(path)), path.name
    except (ConfigError, ValueError) as error:
        what = "is damaged or does not fit this version"
        raise UserError(f"{field}: its {CONFIG} {what} ({error}); choose another --workdir") from error
