"""Configs: the shipped ones, their JSON form, and what may change between restarts."""

import json
import re
import runpy

import pytest
from conftest import REPOSITORY

from cifar_flax import config as configs
from cifar_flax.config import Config

CONFIG_FILES = sorted((REPOSITORY / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_and_round_trips_through_json(path):
    config = runpy.run_path(str(path))["get_config"]()
    config.validate()
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    header = path.read_text().split('"""')[1]
    for part in ("Command", "Hardware", "Accuracy", "Time"):
        assert re.search(rf"^{part}: +\w", header, re.MULTILINE)


@pytest.mark.parametrize("value", [None, 0.6])
def test_fields_of_earlier_releases_are_dropped(value):
    saved = configs.to_dict(Config())
    saved["eval"]["tta_below"] = value
    assert configs.from_dict(saved) == Config()


# Settings of the originals, except for the learning rates, which tests/test_optim.py compares.
ORIGINALS = {
    "": ("airbench94_muon", "airbench96"),
    "train.batch_size": (2000, 1024),
    "train.epochs": (8, 37),
    "train.label_smoothing": (0.2, 0.2),
    "data.drop_last": (True, True),
    "augment.flip": ("alternating", "alternating"),
    "augment.crop_padding": (2, 4),
    "augment.cutout": (0, 12),
    "model.widths": ((64, 256, 256), (128, 384, 512)),
    "model.depth": (2, 3),
    "model.residual": (False, True),
    "model.norm_decay": (0.6, 0.9),
    "model.init": ("muon", "sgd"),
    "averaging.name": ("none", "lookahead"),
    "averaging.decay": (0.999, 0.95),
    "averaging.every": (1, 5),
    "optim.whitening.frozen_from": (3, 3),
    "optim.whitening.own_decay": (True, False),
    "eval.tta": ("mirror_translate", "mirror_translate"),
    "eval.tta_fraction": (1.0, 1.0),
}


@pytest.mark.parametrize("column", range(2), ids=ORIGINALS[""])
def test_airbench_configs_have_the_settings_of_the_originals(column):
    recipe = {path: values[column] for path, values in ORIGINALS.items()}
    config = runpy.run_path(str(REPOSITORY / "configs" / f"{recipe.pop('')}.py"))["get_config"]()
    found = {path: value for path, value, _ in configs._fields(config)}
    assert {path: found[path] for path in recipe} == recipe


def test_airbench95_differs_from_airbench94_as_its_header_states():
    found = []
    for name in ("airbench94", "airbench95"):
        config = runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()
        found.append({path: value for path, value, _ in configs._fields(config)})
    changed = {path for path in found[0] if found[0][path] != found[1][path]}
    assert changed == {"model.widths", "train.epochs", "train.resolutions", "averaging.decay"}
    assert [fields["train.resolutions"][1][0] for fields in found] == [14, 18]


def changed(config, **values):
    """Set fields of `config`, named by paths with two underscores in place of each dot, and return it."""
    for path, value in values.items():
        *parts, field = path.split("__")
        part = config
        for name in parts:
            part = getattr(part, name)
        setattr(part, field, value)
    return config


def test_differences_lists_settings_that_change_the_run():
    new = changed(Config(seed=3), model__width=64, data__data_dir="/elsewhere")
    assert configs.differences(Config(), new) == [
        "seed: 0 in the checkpoint, 3 in the config",
        "model.width: 32 in the checkpoint, 64 in the config",
    ]


HARMLESS = {
    "data__data_dir": "/elsewhere",
    "data__cache_dir": "/elsewhere",
    "data__pipeline": "resident",
    "train__log_every": 7,
    "train__steps_per_call": 7,
    "eval__batch_size": 7,
    "eval__every_epochs": 7,
    "checkpoint__every_epochs": 7,
    "checkpoint__keep": 7,
    "parallel__backend": "pmap",
    "on_nonfinite": "skip",
    "max_skipped": 3,
    "profile__steps": (10, 20),
}


@pytest.mark.parametrize("path", HARMLESS)
def test_settings_that_do_not_affect_the_weights_are_no_differences(path):
    assert configs.differences(Config(), changed(Config(), **{path: HARMLESS[path]})) == []


@pytest.mark.parametrize(
    ("settings", "epochs", "passes"),
    [
        ({"optim__schedule": "constant"}, 20.0, True),
        ({"optim__schedule": "constant", "averaging__name": "ema"}, 20.0, True),
        ({"optim__schedule": "constant", "averaging__name": "lookahead"}, 20.0, False),
        ({"optim__schedule": "cosine"}, 20.0, False),
        ({"optim__schedule": "linear"}, 20.0, False),
        ({"optim__schedule": "constant"}, 5.0, False),
    ],
)
def test_epochs_may_grow_if_nothing_depends_on_the_length_of_the_run(settings, epochs, passes):
    found = configs.differences(changed(Config(), **settings), changed(Config(), **settings, train__epochs=epochs))
    message = f"train.epochs: 10.0 in the checkpoint, {epochs} in the config (it may grow with optim.schedule=constant"
    assert [line[: len(message)] for line in found] == ([] if passes else [message])


def test_evaluation_accepts_other_locations_and_evaluation_settings_only():
    allowed = {path for path, _, _ in configs._fields(Config()) if configs.may_override(path)}
    places = {"data.data_dir", "data.folder", "data.archive", "data.source", "data.cache", "data.cache_dir"}
    parallel = {
        f"parallel.{name}"
        for name in (
            "backend",
            "distributed",
            "coordinator",
            "num_processes",
            "process_id",
            "heartbeat_timeout_seconds",
            "one_cuda_graph",
        )
    }
    evaluation = {f"eval.{name}" for name in ("batch_size", "every_epochs", "checkpoint", "tta", "tta_fraction")}
    assert allowed == places | evaluation | parallel
