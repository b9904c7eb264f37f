"""--mode=study: train with several seeds and settings, and compare them."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from cifar_flax import config as configs
from cifar_flax import packages, restore, workdir
from cifar_flax.checkpoints.metadata import CHECKPOINTS, saved_steps
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.cache import Arrays
from cifar_flax.data.config import DataConfig
from cifar_flax.errors import ConfigError, DivergedError, UserError, one_line, require
from cifar_flax.modes import evaluate
from cifar_flax.modes.compare import compare
from cifar_flax.report import results
from cifar_flax.report.log import read_log
from cifar_flax.runtime import processes, signals
from cifar_flax.study import locks, record
from cifar_flax.study.record import RUNS, Plan, Record
from cifar_flax.study.space import VALIDATION_FRACTION, Search, Setting, Space, Trial
from cifar_flax.telemetry.metrics_log import Metrics
from cifar_flax.training import loop
from cifar_flax.training.evaluator import Evaluator, final_evaluator
from cifar_flax.training.operations import Part, parts
from cifar_flax.training.state import TrainState
from cifar_flax.training.trainer import Trainer

if TYPE_CHECKING:
    from cifar_flax.study.search import Candidate, Searcher

VALIDATION = "validation"  # the name of the split in the log of a run, and in the evaluations on it
_PROCESSES = ".processes"  # folder of the locks of cores and accelerators
_POLL = 2.0  # seconds between two looks for trials that other processes have ended or given up


def study(space: Space, search: Search | None, folder: Path, *, on_test: bool = False, is_large: bool = False) -> None:
    """Train settings of `space` with all seeds, each run in a folder of `folder/runs`, then compare them.

    Train all settings or, with `search`, those that it chooses. Trials that have ended are kept, and interrupted ones
    resume. Other processes may run the same study: each trial is trained by one of them. Everything is checked before
    the first trial.

    Raise `ConfigError` if the settings cannot be trained or compared, `UserError` if another process of this study
    uses the same cores or accelerators, and `signals.Stopped` if a signal stops the study; its progress is saved.
    """
    if search is not None:
        packages.require(["optuna"], packages.PACKAGES["optuna"].used_for)
    settings = space.check(search, is_large=is_large) if search else space.grid(is_large=is_large)
    record.require_usable(folder, settings[0].config)
    for setting in settings:
        parallel, allowed = setting.config.parallel, "not used in study, whose processes are independent of each other"
        require(parallel.distributed != "on", "parallel.distributed", parallel.distributed, allowed)
        require(not parallel.coordinator, "parallel.coordinator", parallel.coordinator, allowed)
    ordered = _by_program(settings)
    trials = [setting.trial(seed) for setting in ordered for seed in space.seeds] if search is None else []
    for trial in trials:
        workdir.require_usable(folder / RUNS / trial.name, trial.config, may_be_in_use=True)
        record.require_same_config(folder / RUNS / trial.name, trial.config)
    locks.require_free(folder / _PROCESSES)
    record.make_folder(folder)
    runner = Runner(folder, on_test=on_test)
    for setting in ordered:
        runner.prepare(setting)
    if not on_test and space.adds_validation:
        fraction = f"data.validation_fraction is 0: {VALIDATION_FRACTION:g} is set"
        processes.log(f"{fraction}, since settings are compared on the validation split (--on-test: on the test split)")
    with locks.claimed(folder / _PROCESSES):
        number = search.settings if search else len(settings)
        count = f"{number:,} settings" if number > 1 else "1 setting"
        split = settings[0].config.data.eval_split if on_test else VALIDATION
        seeds = f"{len(space.seeds):,} seeds" if len(space.seeds) > 1 else "1 seed"
        processes.log(f"{folder}: {count} x {seeds}, compared on the {split} split")
        if search is None:
            record.update_plan(folder, Plan.of(settings, space.seeds, on_test=on_test))
            runner.run(trials)
        else:
            from cifar_flax.study.search import Searcher

            with contextlib.closing(Searcher(space, search, folder)) as searcher:
                runner.search(searcher, space.seeds)
    compare([folder], None)


def _by_program(settings: Sequence[Setting]) -> list[Setting]:
    """Return `settings` ordered such that those that share programs follow each other."""
    programs: dict[object, int] = {}
    for setting in settings:
        programs.setdefault(configs.program_settings(setting.config), len(programs))
    return sorted(settings, key=lambda setting: programs[configs.program_settings(setting.config)])


def _never(metrics: Metrics) -> bool:
    return False


class Runner:
    """Train trials one after the other. The data is loaded once, and successive trials share programs if they can."""

    def __init__(self, folder: Path, *, on_test: bool):
        self._folder, self._on_test = folder, on_test
        self._loaded: list[tuple[DataConfig, Sequence[Arrays]]] = []
        self._shared: _SharedPrograms | None = None
        self._seconds: list[float] = []  # that the trials of this process took
        self._has_run = False  # whether a trial has printed what all of them would print
        self._ended: dict[str, Record] = {}  # trial -> record, which does not change any more

    def prepare(self, setting: Setting | Trial) -> "_SharedPrograms":
        """Load the data and build the network of a setting. Raise `UserError` if it cannot be trained."""
        config = setting.config
        programs = configs.program_settings(config)
        try:
            if self._shared is None or self._shared.programs != programs:
                self._shared = None  # first, since its arrays and programs take memory
                self._shared = _SharedPrograms(config, self._load(config.data))
            self._shared.trainer.for_config(config)
        except ConfigError as error:
            raise ConfigError(f"{setting.name}: {error}") from error
        return self._shared

    def _load(self, data: DataConfig) -> Sequence[Arrays]:
        """Return both splits; load them once for all settings that read them in the same way."""
        read = dataclasses.replace(data, pipeline="auto", sampling="shuffled", drop_last=False, validation_fraction=0.0)
        for known, splits in self._loaded:
            if known == read:
                return splits
        self._loaded.append((read, sources.load_both(data)))
        return self._loaded[-1][1]

    def run(self, trials: Sequence[Trial]) -> None:
        """Run the trials that have not ended; wait for those that other processes run, or take them over."""
        count = len(trials)
        while left := self._left(trials):
            ran = False
            for trial in left:
                try:
                    found = self.run_one(trial)
                except signals.Stopped:
                    ended = count - len(self._left(trials))
                    processes.log(f"{ended} of {count} trials have ended; run the same command to resume")
                    raise
                if found is not None:
                    ran, waiting = True, len(self._left(trials))
                    self._show(f"[{count - waiting} of {count}]", trial, found, waiting)
            if not ran:
                time.sleep(_POLL)

    def _left(self, trials: Sequence[Trial]) -> list[Trial]:
        return [trial for trial in trials if self.record(trial) is None]

    def search(self, searcher: "Searcher", seeds: Sequence[int]) -> None:
        """Run the settings that `searcher` chooses, until it is over; wait for those that other processes run."""
        while not searcher.is_over():
            with searcher.next() as candidate:
                if candidate is None:
                    time.sleep(_POLL)
                    continue
                try:
                    self.prepare(candidate.setting)
                except ConfigError as error:  # the values do not fit the data
                    searcher.skip(candidate.trial, error)
                    continue
                record.update_plan(self._folder, Plan.of([candidate.setting], seeds, on_test=self._on_test))
                try:
                    candidate.end(self._accuracy(candidate, searcher, seeds))
                except signals.Stopped:
                    processes.log(f"{searcher.ended} settings have ended; run the same command to resume")
                    raise

    def _accuracy(self, candidate: "Candidate", searcher: "Searcher", seeds: Sequence[int]) -> float | None:
        """Return the mean accuracy of a setting, 0 for seeds that diverge, or None if its first seed is pruned."""
        accuracies = []
        for seed in seeds:
            trial = candidate.setting.trial(seed)
            watch = candidate.has_to_stop if seed == seeds[0] else _never
            while (found := self.record(trial) or self.run_one(trial, watch)) is None:
                time.sleep(_POLL)  # another process has chosen the same setting
            self._show(f"[{searcher.progress}]", trial, found, 0)
            if found.status in (record.PRUNED, record.FAILED):
                return None
            result = self._result(trial, found)
            accuracies.append(float(result["accuracy"]) if result else 0.0)
        return statistics.fmean(accuracies)

    def _result(self, trial: Trial, found: Record) -> results.Result | None:
        """Return the evaluation of a trial on the compared split, or None if it has not finished."""
        if found.status != record.FINISHED:
            return None
        return results.read_result(self._folder / RUNS / trial.name) if self._on_test else found.validation

    def _show(self, number: str, trial: Trial, found: Record, left: int) -> None:
        outcome = " ".join((found.status, found.reason)).strip()
        if result := self._result(trial, found):
            outcome = f"{result['accuracy']:.2%} on the {result['split']} split"
        typical = self._seconds[1:]  # the first trial includes the compilation
        time_left = f", about {_duration(left * statistics.median(typical))} left" if left and typical else ""
        processes.log(f"{number} {trial.name}: {outcome}{time_left}")

    def record(self, trial: Trial) -> Record | None:
        """Return the record of a trial, or None if it has not ended."""
        if trial.name not in self._ended and (found := record.read_record(self._folder / RUNS / trial.name)):
            self._ended[trial.name] = found
        return self._ended.get(trial.name)

    def run_one(self, trial: Trial, has_to_stop: Callable[[Metrics], bool] = _never) -> Record | None:
        """Train and evaluate a trial, and return its record; None if another process runs it or has just ended it.

        `has_to_stop` prunes it, see `loop.run`.
        """
        folder, begin = self._folder / RUNS / trial.name, time.perf_counter()
        try:
            with workdir.opened(folder, trial.config):
                if self.record(trial) is not None:
                    return None
                with processes.quiet(self._has_run):
                    found = self._train(trial, folder, has_to_stop)
                self._has_run = True
                record.write_record(folder, found)
                self._seconds.append(time.perf_counter() - begin)
                return found
        except workdir.InUseError:
            return None

    def _train(self, trial: Trial, folder: Path, has_to_stop: Callable[[Metrics], bool]) -> Record:
        status, reason, validation = record.FINISHED, "", None
        shared = self.prepare(trial)
        try:
            if loop.run(self._trainer(shared, trial.config, folder), folder, has_to_stop):
                validation = shared.evaluate(trial.config, folder)
            else:
                status = record.PRUNED
        except DivergedError as error:
            status, reason = record.DIVERGED, str(error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            status, reason = record.FAILED, f"out of memory ({one_line(error)})"
            self._shared = None  # frees memory
        log = read_log(folder / "metrics.jsonl")
        steps = 0 if log.train is None else int(log.train.step[-1])
        operations = shared.operations(steps, is_evaluated=status == record.FINISHED)
        return Record(status=status, reason=reason, operations=operations, validation=validation)

    def _trainer(self, shared: "_SharedPrograms", config: Config, folder: Path) -> Trainer:
        trainer = shared.trainer.for_config(config)
        if config.train.init_from and not saved_steps(folder / CHECKPOINTS):
            trainer.initial_state = restore.init_from(
                config, trainer.info, trainer.initialize_optimizer, trainer.initial_state
            )
        return trainer


class _SharedPrograms:
    """The data, programs and evaluators of trials with equal `config.program_settings`."""

    def __init__(self, config: Config, splits: Sequence[Arrays]):
        self.programs, self._splits = configs.program_settings(config), splits
        self.trainer = Trainer(config, splits=splits)

    @functools.cached_property
    def _template(self) -> TrainState:
        shapes = jax.eval_shape(lambda: self.trainer.init(0))
        return jax.tree.map(lambda x: x.update(sharding=self.trainer.layout.replicated), shapes)

    @functools.cached_property
    def _final_evaluator(self) -> Evaluator:
        return final_evaluator(self.trainer.config, self.trainer.task, self.trainer.eval_arrays)

    @functools.cached_property
    def _validation_evaluator(self) -> Evaluator:
        """Return the evaluator of the validation split with TTA."""
        trainer = self.trainer
        if trainer.config.eval.tta == "none":
            return trainer.evaluator
        return final_evaluator(trainer.config, trainer.task, trainer.arrays, trainer.held_out)

    @functools.cached_property
    def _parts(self) -> list[Part]:
        return parts(self.trainer.config, self.trainer.info, len(self._splits[1].labels))

    def evaluate(self, config: Config, folder: Path) -> dict[str, Any] | None:
        """Write the files of --mode=eval, and return the evaluation on the validation split, if there is one."""
        run = restore.restore(config, folder, known=(self.trainer.task, self._template))
        arrays, split = self._splits[1], config.data.eval_split
        result, evaluation = evaluate.evaluated(run, self._final_evaluator, dataset=arrays.dataset, split=split)
        _, failed = evaluate.write(folder, result, run.metadata, arrays, evaluation.probabilities)
        if failed:
            raise UserError("; ".join(failed))
        if not self.trainer.has_validation:
            return None
        return evaluate.evaluated(run, self._validation_evaluator, dataset=arrays.dataset, split=VALIDATION)[0]

    def operations(self, steps: int, *, is_evaluated: bool) -> int:
        """Return the operations of a run of `steps` steps."""
        total = 0
        for part in self._parts:
            if part.unit == "steps":
                total += part.flops // part.number * min(part.number, max(steps, 0))
                steps -= part.number
            elif part.number and (is_evaluated or part.name == "initialization"):
                total += part.flops
        return total


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
