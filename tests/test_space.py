"""Test which settings and seeds a study has, and the errors in its arguments."""

import re

import pytest
from conftest import make_tiny_config

from cifar_flax import arguments
from cifar_flax.errors import ConfigError
from cifar_flax.study.space import Range, values_of

FILE = "from conftest import make_tiny_config as get_config\n"


@pytest.fixture
def parse(tmp_path):
    """Return a function that parses the arguments of a study of the tiny config."""
    (tmp_path / "tiny.py").write_text(FILE)

    def parsed(*arguments_):
        given = ["--mode=study", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'study'}"]
        return arguments.parse([*given, *arguments_])

    return parsed


def test_the_grid_is_the_product_of_configs_and_values(parse, tmp_path):
    (tmp_path / "other.py").write_text(FILE)
    command = parse(f"--config={tmp_path / 'other.py'}", "--config.optim.learning_rate=1e-3,2e-3",
                    "--config.model.width=2,4", "--config.train.epochs=1", "--seeds=3")  # fmt: skip
    settings = command.space.grid()
    assert len({setting.name for setting in settings}) == len(settings) == 8
    assert settings[1].name == "tiny_learning_rate=0.001_width=4"
    assert settings[1].values == {"config": "tiny", "optim.learning_rate": 0.001, "model.width": 4}
    assert {setting.config.train.epochs for setting in settings} == {1.0}
    assert {(setting.config.optim.learning_rate, setting.config.model.width) for setting in settings} == {
        (0.001, 2), (0.001, 4), (0.002, 2), (0.002, 4)
    }  # fmt: skip
    trial = settings[1].trial(2)
    assert (trial.name, trial.config.seed) == ("tiny_learning_rate=0.001_width=4_seed2", 2)
    assert list(command.space.seeds) == [0, 1, 2]


def test_values_of_tuples_are_separated_by_semicolons(parse):
    settings = parse("--config.train.resolutions=((0,16),);((0,16),(1,32))").space.grid()
    assert [setting.config.train.resolutions for setting in settings] == [((0, 16),), ((0, 16), (1, 32))]
    assert settings[1].name == "tiny_resolutions=0-16-1-32"
    assert all(re.fullmatch(r"[\w.=+-]+", setting.name) for setting in settings)


def test_names_tell_fields_of_equal_names_apart_and_stay_short(parse):
    (setting, *_) = parse(
        "--config.optim.learning_rate=1e-3,2e-3", "--config.optim.dense.learning_rate=1,2"
    ).space.grid()
    assert setting.name == "tiny_optim.learning_rate=0.001_dense.learning_rate=1"
    long = parse(f"--config.data.data_dir={'a' * 300},{'a' * 300}b").space
    names = [long.setting("tiny", {"data.data_dir": "a" * 300 + end}).name for end in ("", "b")]
    assert len(set(names)) == 2
    assert max(map(len, names)) <= 100


def test_seeds(parse):
    assert list(parse("--config.seed=7", "--seeds=2").space.seeds) == [7, 8]
    assert list(parse("--config.seed=5,3").space.seeds) == [5, 3]
    assert len(parse().space.seeds) == 5


def test_a_validation_split_is_added_unless_the_test_split_is_compared(parse):
    for options, fraction in (([], 0.1), (["--on-test"], 0.0), (["--config.data.validation_fraction=0.2"], 0.2)):
        (setting,) = parse(*options).space.grid()
        assert setting.config.data.validation_fraction == fraction
    (setting,) = parse("--config.train.patience=2").space.grid()  # which needs a validation split
    assert setting.config.train.patience == 2


def test_ranges():
    config = make_tiny_config()
    path = "optim.learning_rate"
    assert values_of(config, path, "log:1e-4..1e-2") == Range(1e-4, 1e-2, True, False)
    assert values_of(config, path, "0..0.5") == Range(0, 0.5, False, False)
    assert values_of(config, "model.width", "log:8..64") == Range(8, 64, True, True)
    assert values_of(config, "optim.momentum", "0.8..0.95") == Range(0.8, 0.95, False, False)  # float | None
    assert values_of(config, "data.archive", "../a..b") == ["../a..b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds=0", "--seeds=0: must be at least 1"),
        ("--config.seed=1,2 --seeds=2", "--seeds=2: must not be used with seed=1,2"),
        ("--config.seed=1,x", "seed='x': must be an integer"),
        ("--config.seed=4294967295 --seeds=2", "seed=4294967296: must be in"),
        ("--config.seed=1..5 --settings=2", "seed='1..5': must not be a range; use --seeds"),
        ("--config.optim.learning_rate=", "optim.learning_rate='': must be a finite number"),
        ("--config.optim.learning_rate=1e-3,,1e-2", "optim.learning_rate='1e-3,,1e-2': one of its values is empty"),
        ("--config.optim.learning_rate=1e-3,-1", "optim.learning_rate=-1.0: must be at least 0"),
        ("--config.optim.learning_rate=1e-3,x", "optim.learning_rate='x': must be a finite number"),
        ("--config.optim.learning_rate=1,1", "optim.learning_rate='1,1': lists a value twice"),
        ("--config.optim.learning_rate=1,1.0", "two settings are named tiny_learning_rate=1"),
        ("--config.optim.lr=1,2", "optim.lr='1,2': no such field"),
        ("--config.optim.learning_rate=1,2 --config.optim.learning_rate=3,4", "='3,4': is given twice"),
        ("--config.data.name=digits,cifar10", "data.name='cifar10': must be equal in all settings"),
        ("--config.data.validation_fraction=0.1,0.2", "data.validation_fraction=0.2: must be equal in all settings"),
        ("--config.model.name=cnn,airbench", "model.name='airbench': must match"),
        ("--config.optim.learning_rate=1e-3..1e-2", "a range such as log:1e-4..1e-2 needs --settings=N"),
        ("--config.optim.learning_rate=1..x --settings=2", "'1..x': must be a range of numbers such as"),
        ("--config.optim.learning_rate=2..1 --settings=2", "'2..1': the range must end above its start"),
        ("--config.optim.learning_rate=log:0..1 --settings=2", "a logarithmic range must start above 0"),
        ("--config.optim.learning_rate=-1..1 --settings=2", "optim.learning_rate=-1.0: must be at least 0"),
        ("--config.model.width=2..4.5 --settings=2", "must be a range of integers such as log:8..64"),
        ("--config.model.width=2..4 --settings=0", "--settings=0: must be at least 1"),
        ("--config.model.width=2..4 --settings=2 --search=grid", "--search='grid': must be tpe or random"),
        ("--config.optim.learning_rate=1e-4...1e-2 --settings=2", "'1e-4...1e-2': must be a range of numbers such as"),
        ("--config.model.width=4 --config.model.width=8", "model.width='8': is given twice"),
        ("--config.model.width=2..4 --settings=2 --on-test", "--on-test: not used in a search"),
        ("--settings=2", "--settings=2: nothing varies"),
        ("--search=tpe", "--search='tpe': needs --settings=N"),
        ("--seeds=1001", "1,001 trials are more than 1,000; add --yes"),
        ("--seeds=400 --config.model.width=1..4 --settings=3", "1,200 trials are more than 1,000; add --yes"),
        ("--seeds=1000000000", "1,000,000,000 trials are more than 1,000; add --yes"),
        ("--seeds=5000000000", "seed=4999999999: must be in"),
        ("--config.seed=01,1", "seed='01,1': lists a seed twice"),
        ("--config.optim.warmup_epochs=1,9 --settings=2", "optim.warmup_epochs=9.0: must be shorter than the run"),
        ("--output=x", "--output='x': not used in study"),
        ("photo.jpg", "unknown argument 'photo.jpg'"),
    ],
)
def test_bad_input_is_refused_in_one_line(parse, options, message):
    def run():
        command = parse(*options.split())
        return command.space.check(command.search) if command.search else command.space.grid()

    with pytest.raises(ConfigError) as error:
        run()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_configs_of_one_name_or_of_other_data_are_refused(parse, tmp_path):
    with pytest.raises(ConfigError, match=r"another config is also named tiny; rename one"):
        parse(f"--config={tmp_path / 'tiny.py'}")
    with pytest.raises(ConfigError, match=r"data\.name='cifar10': must be equal in all settings"):
        parse("--config=default").space.grid()


def test_values_of_a_search_may_need_others(parse):
    """A search is refused only if a value is not allowed with any other one."""
    command = parse("--config.train.epochs=1,4", "--config.optim.warmup_epochs=0.5,2", "--settings=3", "--seeds=1")
    found = {(one.config.train.epochs, one.config.optim.warmup_epochs) for one in command.space.check(command.search)}
    assert found == {(1, 0.5), (4, 0.5), (4, 2)}
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=2\.0: must be shorter than the run of 1 epochs"):
        command.space.grid()


def test_more_than_1000_trials_need_a_flag(parse):
    command = parse("--seeds=1001", "--yes")
    assert len(command.space.grid(is_large=command.is_large)) == 1


@pytest.mark.parametrize("mode", ["train", "eval", "doctor"])
def test_options_of_studies_are_refused_in_other_modes(mode, tmp_path):
    for option in ("--seeds=0", "--settings=3", "--on-test", "--yes"):
        with pytest.raises(ConfigError, match=rf"^{option.split('=')[0]}(='\d'|=\d)?: not used in {mode}"):
            arguments.parse([f"--mode={mode}", f"--workdir={tmp_path}", option])
    if mode == "train":
        with pytest.raises(ConfigError, match=r"only one is used in train"):
            arguments.parse(["--config=quickstart", "--config=default"])
