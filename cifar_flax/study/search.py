"""Search the settings of a study with Optuna, which is optional. Only this module imports it."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_flax import files, packages
from cifar_flax.errors import ConfigError, one_line
from cifar_flax.runtime import processes
from cifar_flax.study.space import Range, Search, Setting, Space
from cifar_flax.telemetry.metrics_log import Metrics

_DATABASE = "optuna.db"
_TIMEOUT = 60  # seconds to wait for another process that writes to the database
_DIGITS = 4  # of the numbers that are tried


class Candidate:
    """A setting that Optuna has chosen; this process holds its lock."""

    def __init__(self, optuna: Any, trial: Any, setting: Setting):
        self._optuna, self.trial, self.setting = optuna, trial, setting

    def has_to_stop(self, metrics: Metrics) -> bool:
        """Report an evaluation, a line of metrics.jsonl; return whether the median of the others is better."""
        self.trial.report(metrics["accuracy"], step=max(round(metrics["epoch"]), 1))
        return bool(self.trial.should_prune())

    def end(self, accuracy: float | None) -> None:
        """Report the mean accuracy of the seeds to Optuna, or None if the setting was pruned."""
        if accuracy is None:
            self.trial.study.tell(self.trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            self.trial.study.tell(self.trial, accuracy)


class Searcher:
    """Settings of a space that random search or TPE chooses; median pruning ends those that learn slowly.

    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (TPE); Golovin et al. 2017, "Google
    Vizier" (median stopping rule).
    """

    def __init__(self, space: Space, search: Search, folder: Path):
        """Open or create the database in `folder`.

        Raise `UserError` if Optuna is missing, `ConfigError` if the database is of a search of other values.
        """
        self._optuna = packages.load("optuna")
        self._space, self._search, self._folder = space, search, folder
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        self._storage: Any = None
        try:
            with self._turn():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        where = f"--workdir={str(self._folder)!r}"
        try:
            self._storage = self._optuna.storages.RDBStorage(
                f"sqlite:///{(self._folder / _DATABASE).absolute()}",
                engine_kwargs={"connect_args": {"timeout": _TIMEOUT}},
            )
            self._study = self._optuna.create_study(
                storage=self._storage,
                study_name="cifar_flax",
                direction="maximize",
                pruner=self._optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
            before = self._study.user_attrs.get("space")
        except Exception as error:  # any error of the database
            cause = getattr(error, "orig", None) or error  # SQLAlchemy's errors have the original one
            is_damaged = type(cause) is sqlite3.DatabaseError  # not a subclass, which may mean a lock or a full disk
            remedy = "; remove it to restart the search: finished trials are kept" if is_damaged else ""
            raise ConfigError(f"{where}: its {_DATABASE} cannot be used ({one_line(cause)}){remedy}") from error
        now = self._space.description()
        if before not in (None, now):
            raise ConfigError(f"{where}: holds a search of other values ({before}); choose another folder")
        self._study.set_user_attr("space", now)

    def close(self) -> None:
        """Close the database."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one process at a time ask for a setting."""
        with files.locked(self._folder / ".search.lock", wait=True):
            yield

    @property
    def progress(self) -> str:
        """Return how many settings have been chosen, such as "3 of 20"."""
        return f"{len(self._study.get_trials(deepcopy=False))} of {self._search.settings}"

    @property
    def ended(self) -> str:
        """Return how many settings have ended, such as "2 of 20"."""
        return f"{self._count_ended()} of {self._search.settings}"

    def _count_ended(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def is_over(self) -> bool:
        """Return whether all settings have ended."""
        return self._count_ended() >= self._search.settings

    @contextlib.contextmanager
    def next(self) -> Iterator[Candidate | None]:
        """Yield a setting whose process has died or, if there is none, a new one; None if all have been chosen."""
        with contextlib.ExitStack() as stack:
            with self._turn():
                candidate = self._claim(stack)
            yield candidate

    def _claim(self, stack: contextlib.ExitStack) -> Candidate | None:
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if not trial.state.is_finished():
                with contextlib.suppress(BlockingIOError):  # another process runs it
                    stack.enter_context(files.locked(self._lock(trial.number), wait=False))
                    if not self._study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                        return self._candidate(self._optuna.trial.Trial(self._study, trial._trial_id))
        if len(trials) >= self._search.settings:
            return None
        # The sampler is a function of the seed and of the number of the trial, so that a restart does not repeat it.
        seed = (self._space.seeds[0] * 1_000_003 + len(trials)) % 2**32
        samplers = self._optuna.samplers
        random = self._search.method == "random"
        self._study.sampler = samplers.RandomSampler(seed=seed) if random else samplers.TPESampler(seed=seed)
        trial = self._study.ask()
        stack.enter_context(files.locked(self._lock(trial.number), wait=False))
        return self._candidate(trial)

    def _lock(self, number: int) -> Path:
        folder = self._folder / ".processes"
        folder.mkdir(exist_ok=True)
        return folder / f"setting{number}"

    def _candidate(self, trial: Any) -> Candidate | None:
        space = self._space
        name = space.configs[0]
        if len(space.configs) > 1:
            name = trial.suggest_categorical("config", list(space.configs))
        values = {path: trial.suggest_categorical(path, list(texts)) for path, texts in space.choices.items()}
        values |= {path: _suggested(trial, path, found) for path, found in space.ranges.items()}
        try:
            return Candidate(self._optuna, trial, space.setting(name, values))
        except ConfigError as error:
            self.skip(trial, error)
            return None

    def skip(self, trial: Any, error: ConfigError) -> None:
        """Report to Optuna that the setting of `trial` is not allowed."""
        processes.log(f"[{self.progress}] skipped, its values do not fit together: {error}")
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _suggested(trial: Any, path: str, values: Range) -> str:
    """Return a number in the range as text; a float is rounded, for short names of folders."""
    if values.is_integer:
        return str(trial.suggest_int(path, int(values.low), int(values.high), log=values.is_logarithmic))
    number = trial.suggest_float(path, values.low, values.high, log=values.is_logarithmic)
    rounded = float(f"{number:.{_DIGITS}g}")
    return repr(rounded if values.low <= rounded <= values.high else number)
