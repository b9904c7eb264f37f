"""The error messages for mistakes in settings, as `config.from_dict` reports them."""

import pytest

from cifar_flax import config as configs
from cifar_flax.errors import ConfigError

# A saved config as JSON, and the start of the error message.
SAVED = [
    ({"sed": 1}, "sed=1: must be a field"),
    ({"optim": {"lr": 1}}, "optim.lr=1: must be a field"),
    ({"optim": 3}, "optim=3: must be a JSON object"),
    ({"model": {"name": "vgg"}}, "model.name='vgg': must be one of cnn"),
    ({"model": {}}, "model.name=None: must be one of cnn"),
    ({"model": {"name": ["cnn"]}}, "model.name=['cnn']: must be one of cnn"),
    ({"train": {"batch_size": "128"}}, "train.batch_size='128': must be an integer"),
    ({"train": {"batch_size": True}}, "train.batch_size=True: must be an integer"),
    ({"train": {"batch_size": 12.0}}, "train.batch_size=12.0: must be an integer"),
    ({"train": {"epochs": float("inf")}}, "train.epochs=inf: must be a finite number"),
    ({"optim": {"whitening": {"frozen_from": 3.0}}}, "optim.whitening=GroupConfig("),
    ({"data": {"drop_last": 1}}, "data.drop_last=1: must be true or false"),
    ({"optim": {"b1": "x"}}, "optim.b1='x': must be a finite number"),
    ({"seed": -1}, "seed=-1: must be in [0, 2**32)"),
    ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best=1: needs data.validation_fraction"),
    (
        {
            "data": {"validation_fraction": 0.1},
            "checkpoint": {"keep_best": 1, "every_epochs": 3},
            "eval": {"every_epochs": 2},
        },
        "checkpoint.every_epochs=3: must be a multiple of eval.every_epochs=2",
    ),
    ({"data": {"eval_split": "train"}}, "data.eval_split='train': must not be the split to train on"),
    ({"train": {"patience": -1}}, "train.patience=-1: must be at least 0"),
    ({"train": {"patience": 1}}, "train.patience=1: needs data.validation_fraction"),
    ({"train": {"freeze": "head"}}, "train.freeze='head': must be none or backbone"),
    ({"train": {"freeze": "backbone"}}, "train.freeze='backbone': needs train.init_from"),
    ({"data": {"sampling": "random"}}, "data.sampling='random': must be one of shuffled, balanced"),
    ({"train": {"class_weights": "inverse"}}, "train.class_weights='inverse': must be none or balanced"),
    (
        {"data": {"sampling": "balanced"}, "train": {"class_weights": "balanced"}},
        "train.class_weights='balanced': must be none if data.sampling is balanced",
    ),
    ({"eval": {"checkpoint": "best"}}, "eval.checkpoint='best': needs checkpoint.keep_best"),
    ({"eval": {"tta": "mirror", "tta_fraction": 1.5}}, "eval.tta_fraction=1.5: must be in (0, 1]"),
    ({"train": {"tta_below": None}}, "train.tta_below=None: must be a field"),
    ([], "config=[]: must be a JSON object"),
    # Settings of the optimizer.
    ({"optim": {"warmup_start": 1.5}}, "optim.warmup_start=1.5: must be in [0, 1]"),
    ({"optim": {"final_share": 0.1}}, "optim.final_share=0.1: does not apply to the schedule constant"),
    ({"optim": {"final_epochs": 1.0}}, "optim.final_epochs=1.0: does not apply to the schedule constant"),
    ({"optim": {"final_epochs": -1.0}}, "optim.final_epochs=-1.0: must be at least 0"),
    ({"train": {"resolutions": [0, 24]}}, "train.resolutions=(0, 24): must be ((a finite number, an integer), ...)"),
    (
        {"train": {"resolutions": [[0, 2.5]]}},
        "train.resolutions=((0, 2.5),): must be ((a finite number, an integer), ...)",
    ),
    ({"train": {"resolutions": [[1, 24]]}}, "train.resolutions=((1, 24),): must be pairs (epoch, side) in the order"),
    ({"train": {"resolutions": [[0, 24], [0, 32]]}}, "train.resolutions=((0, 24), (0, 32)): must be pairs"),
    (
        {"train": {"resolutions": [[0, 24], [10, 32]]}},
        "train.resolutions=((0, 24), (10, 32)): must start within the run of 10 epochs",
    ),
    ({"train": {"resolutions": [[0, 0]]}}, "train.resolutions=((0, 0),): sides must be at least 1 pixel"),
    ({"optim": {"name": "muon"}}, "optim.dense.learning_rate=None: must be set if optim.name is muon"),
    ({"optim": {"name": "muon", "weight_decay": 0.1}}, "optim.weight_decay=0.1: does not apply to muon"),
    ({"optim": {"biases": {"learning_rate": -1.0}}}, "optim.biases.learning_rate=-1.0: must be at least 0"),
    ({"optim": {"name": "sgd", "dense": {"momentum": 1.0}}}, "optim.dense.momentum=1.0: must be in [0, 1)"),
    ({"optim": {"dense": {"own_decay": True}}}, "optim.dense.own_decay=True: needs optim.dense.frozen_from above 0"),
    ({"optim": {"schedule": "step"}}, "optim.schedule='step': must be one of constant, cosine, linear"),
    ({"optim": {"name": "adam", "weight_decay": 0.1}}, "optim.weight_decay=0.1: does not apply to adam"),
    ({"optim": {"name": "sgd", "b1": 0.9}}, "optim.b1=0.9: does not apply to sgd"),
    ({"optim": {"name": "adamw", "momentum": 0.9}}, "optim.momentum=0.9: does not apply to adamw"),
    ({"optim": {"name": "sgd", "eps": 1e-8}}, "optim.eps=1e-08: does not apply to sgd"),
    ({"optim": {"eps": 0.0}}, "optim.eps=0.0: must be above 0"),
    ({"optim": {"b2": 1.0}}, "optim.b2=1.0: must be in [0, 1)"),
    ({"optim": {"accumulate_steps": 0}}, "optim.accumulate_steps=0: must be at least 1"),
]


@pytest.mark.parametrize(("values", "message"), SAVED, ids=[message for _, message in SAVED])
def test_mistakes_in_saved_settings_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values)
    assert str(caught.value).startswith(message)
