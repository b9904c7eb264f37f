"""Search settings with Optuna: what it tries, how it prunes, resumes, and what happens without it."""

import collections
import contextlib
import gc
import json
import warnings
from types import SimpleNamespace

import pytest
from test_study import RATES, command, run

from cifar_flax import arguments, packages
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.modes import study as mode
from cifar_flax.runtime.signals import Stopped
from cifar_flax.study.record import Plan, Record, read_plan, update_plan
from cifar_flax.study.search import Searcher

optuna = pytest.importorskip("optuna")

OPTIONS = ("--config.optim.learning_rate=log:1e-3..1e-1", "--config.model.hidden=16,32", "--seeds=2")


@pytest.fixture
def accuracy():
    """Return the function that replaces training, and the curve of each trial; tests may replace both."""
    return {"of": lambda config: config.optim.learning_rate * 5 + config.model.hidden / 100, "curve": []}


@pytest.fixture
def without_training(monkeypatch, accuracy):
    """Replace training and the page: a trial ends at once with the accuracy that `accuracy` returns."""
    ran = []

    def train(self, trial, folder, has_to_stop):
        ran.append(folder.name)
        for epoch, value in enumerate(accuracy["curve"], 1):
            if has_to_stop({"epoch": float(epoch), "accuracy": value * accuracy["of"](trial.config)}):
                return Record(status="pruned")
        result = {"accuracy": accuracy["of"](trial.config), "split": "validation"}
        return Record(status="finished", operations=1, validation=result)

    monkeypatch.setattr(mode.Runner, "_train", train)
    monkeypatch.setattr(mode.Runner, "prepare", lambda self, setting: None)
    monkeypatch.setattr(mode, "compare", lambda *args, **settings: None)
    return ran


def trials(folder):
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'optuna.db'}")
    found = optuna.load_study(study_name="cifar_flax", storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    return found


def search(folder, *options):
    parsed = arguments.parse(command(folder, *OPTIONS, *options))
    mode.study(parsed.space, parsed.search, parsed.workdir)


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_search_maximizes_the_mean_accuracy_within_the_ranges(tmp_path, without_training, method):
    search(tmp_path / "study", "--settings=15", f"--search={method}")
    found = trials(tmp_path / "study")
    assert len(found) == 15
    rates = [trial.params["optim.learning_rate"] for trial in found]
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert {trial.params["model.hidden"] for trial in found} == {"16", "32"}
    for trial in found:
        rate = float(f"{trial.params['optim.learning_rate']:.4g}")
        assert trial.value == pytest.approx(rate * 5 + int(trial.params["model.hidden"]) / 100)
    assert len(without_training) == 30  # two seeds each
    if method == "tpe":
        assert sum(rates[10:]) / 5 > sum(rates[:5]) / 5


def test_a_search_is_a_function_of_its_seed(tmp_path, without_training):
    for name, options in (("one", []), ("two", []), ("three", ["--config.seed=9"])):
        search(tmp_path / name, "--settings=4", *options)
    first, second, third = ([t.params for t in trials(tmp_path / name)] for name in ("one", "two", "three"))
    assert first == second != third


def test_a_search_resumes_the_setting_that_was_stopped(tmp_path, without_training, monkeypatch, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "study"
    search(whole, "--settings=5")
    train, count = mode.Runner._train, [0]

    def stopped(*args):
        count[0] += 1
        if count[0] == 6:  # the second seed of the third setting
            raise Stopped(15)
        return train(*args)

    monkeypatch.setattr(mode.Runner, "_train", stopped)
    with pytest.raises(Stopped):
        search(folder, "--settings=5")
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert "2 of 5 settings have ended; run the same command to resume" in capsys.readouterr().out
    without_training.clear()
    search(folder, "--settings=5")
    assert len(without_training) == 5  # one seed of the third setting, two of each of the other two
    assert [(t.params, t.value) for t in trials(folder)] == [(t.params, t.value) for t in trials(whole)]
    search(folder, "--settings=7")  # more settings
    assert len(trials(folder)) == 7


def test_the_first_trial_does_not_count_in_the_time_left(tmp_path, without_training, monkeypatch, capsys):
    """It includes the compilation."""
    clock = iter([0.0, 100.0, 100.0, 102.0, 102.0, 104.0, 104.0, 106.0])
    monkeypatch.setattr(mode, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    parsed = arguments.parse(command(tmp_path / "study", "--seeds=4"))
    mode.study(parsed.space, None, parsed.workdir)
    shown = [line.partition(" split")[2] for line in capsys.readouterr().out.splitlines() if " of 4] " in line]
    assert shown == ["", ", about 4 s left", ", about 2 s left", ""]


def test_settings_below_the_median_are_pruned(tmp_path, without_training, accuracy, capsys):
    order = iter([0.9] * 5 + [0.1] * 5)
    values = collections.defaultdict(lambda: next(order))
    accuracy["of"] = lambda config: values[config.optim.learning_rate]
    accuracy["curve"] = [1.0, 1.0]  # factors of the accuracy after each epoch
    search(tmp_path / "study", "--settings=8", "--search=random")
    states = [trial.state.name for trial in trials(tmp_path / "study")]
    assert states == ["COMPLETE"] * 5 + ["PRUNED"] * 3
    assert len(without_training) == 2 * 5 + 3  # a pruned setting has one seed
    assert capsys.readouterr().out.count("pruned") == 3


def test_a_setting_that_diverges_has_accuracy_0(tmp_path, without_training, monkeypatch):
    monkeypatch.setattr(mode.Runner, "_train", lambda *args: Record(status="diverged", reason="the loss is nan"))
    search(tmp_path / "study", "--settings=2")
    assert [trial.value for trial in trials(tmp_path / "study")] == [0.0, 0.0]


def test_settings_that_do_not_fit_are_skipped(tmp_path, without_training, capsys):
    options = ["--config.train.epochs=1,4", "--config.optim.warmup_epochs=0.5,2", "--seeds=1", "--settings=12"]
    parsed = arguments.parse(command(tmp_path / "study", *options, "--search=random"))
    mode.study(parsed.space, parsed.search, parsed.workdir)
    states = {
        (t.params["train.epochs"], t.params["optim.warmup_epochs"]): t.state.name for t in trials(tmp_path / "study")
    }
    assert states == {("1", "0.5"): "COMPLETE", ("1", "2"): "FAIL", ("4", "0.5"): "COMPLETE", ("4", "2"): "COMPLETE"}
    assert "skipped, its values do not fit together: optim.warmup_epochs=2.0" in capsys.readouterr().out


def test_a_setting_that_another_process_has_just_ended_is_not_taken(tmp_path, monkeypatch):
    """Between the look at the list of settings and the lock of one, its process may end it."""
    parsed = arguments.parse(command(tmp_path / "study", *OPTIONS, "--settings=1"))
    with contextlib.ExitStack() as stack:
        searchers = [Searcher(parsed.space, parsed.search, tmp_path / "study") for _ in range(2)]
        one, other = (stack.enter_context(contextlib.closing(searcher)) for searcher in searchers)
        candidate = stack.enter_context(one.next())
        lock = other._lock

        def end_first(number):
            candidate.end(0.5)
            return lock(number + 1)  # which is free

        monkeypatch.setattr(other, "_lock", end_first)
        with other.next() as none:
            assert none is None


def test_processes_that_search_list_all_seeds(tmp_path, without_training):
    """study.json keeps a setting whose trials have not begun when another process adds its own."""
    parsed = arguments.parse(command(tmp_path / "study", *OPTIONS, "--settings=2"))
    for width in ("16", "32"):
        setting = parsed.space.setting("tiny", {"model.hidden": width, "optim.learning_rate": "0.01"})
        (tmp_path / "study").mkdir(exist_ok=True)
        update_plan(tmp_path / "study", Plan.of([setting], [0, 1], on_test=False))
    found = read_plan(tmp_path / "study").settings
    assert [len(names) for names in found.values()] == [2, 2]


def test_processes_take_different_settings(tmp_path):
    parsed = arguments.parse(command(tmp_path / "study", *OPTIONS, "--settings=2"))
    with contextlib.ExitStack() as stack:
        searchers = [Searcher(parsed.space, parsed.search, tmp_path / "study") for _ in range(2)]
        one, other = (stack.enter_context(contextlib.closing(searcher)) for searcher in searchers)
        with one.next() as first:
            with other.next() as second, one.next() as third:
                assert first.setting.name != second.setting.name
                assert third is None
                second.end(0.5)
            assert not one.is_over()
        with other.next() as again:  # the first process has left it
            assert again.setting.name == first.setting.name
            again.end(None)
        assert one.is_over()


def test_another_search_needs_another_folder(tmp_path, without_training):
    search(tmp_path / "study", "--settings=1")
    with pytest.raises(ConfigError, match=r"--workdir=.*: holds a search of other values \(tiny model\.hidden=16,32 "):
        search(tmp_path / "study", "--settings=1", "--config.optim.weight_decay=0..1")
    for changed in ("--config.train.epochs=9", "--config.seed=1"):  # a setting that all share, and the seeds
        with pytest.raises(ConfigError, match=r"--workdir=.*: holds a search of other values"):
            search(tmp_path / "study", "--settings=2", changed)
    (tmp_path / "study" / "optuna.db").write_bytes(b"no database" * 100)
    with pytest.raises(
        ConfigError, match=r"--workdir=.*: its optuna\.db cannot be used \(.*not a database\); remove it to"
    ):
        search(tmp_path / "study", "--settings=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Optuna does not close a database that it cannot read
        gc.collect()


def test_real_training_is_pruned_and_reported(tmp_path, monkeypatch):
    """Prune each setting after its first epoch, as Optuna's pruner may."""
    monkeypatch.setattr("cifar_flax.study.search.Candidate.has_to_stop", lambda self, metrics: True)
    found = run(tmp_path / "study", "--config.optim.learning_rate=1e-3..1e-2", "--settings=1", "--seeds=2")
    (setting,) = found["settings"]
    assert [trial["status"] for trial in setting["trials"]] == ["pruned", "not started"]
    folder = tmp_path / "study" / "runs" / setting["trials"][0]["name"]
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps == [11]  # of 31
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 11
    assert "Runs that were pruned: 1 of A." in (tmp_path / "study" / "study.html").read_text()


def test_without_optuna_the_grid_works_and_a_range_is_refused(tmp_path, without_training, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda name: name != "optuna")
    line = r"^ranges and --settings of --mode=study: optuna is not installed; .*\(pip install -U \"optuna>=4\.0\"\)$"
    with pytest.raises(UserError, match=line):
        search(tmp_path / "study", "--settings=2")
    assert not (tmp_path / "study").exists()
    parsed = arguments.parse(command(tmp_path / "study", RATES, "--seeds=1"))
    mode.study(parsed.space, parsed.search, parsed.workdir)
    assert len(without_training) == 2
