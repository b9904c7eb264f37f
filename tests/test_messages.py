"""The error messages for mistakes in command lines.

These tables and those of `test_config_messages.py` and `test_folder_messages.py` are the only ones of messages. Other
tests match field names, values, file names and keywords, so that a message can be reworded in one place.
"""

import sys

import fake_tfds  # noqa: F401  registers the datasets
import jax
import pytest
from conftest import REPOSITORY

from cifar_flax import arguments, cli, workdir
from cifar_flax.data import datasets
from cifar_flax.diagnosis import devices as examined_devices
from cifar_flax.runtime import devices

DIGITS = str(REPOSITORY / "configs" / "quickstart.py")
CIFAR = str(REPOSITORY / "configs" / "default.py")

# Command-line arguments ({tmp} is a temporary folder), exit code, part of the error message.
BAD_INPUT = [
    ("--config {tmp}/nowhere.py", 2, "--config='{tmp}/nowhere.py': no such file"),
    ("--config {tmp}/syntax.py", 2, "syntax.py': line 2: SyntaxError"),
    ("--config {tmp}/raises.py", 2, "raises.py': line 2: ZeroDivisionError"),
    ("--config {tmp}/typo.py", 2, "typo.py': line 3: TypeError"),
    ("--config {tmp}/empty.py", 2, "must define get_config()"),
    ("--config {tmp}/number.py", 2, "get_config() must return a Config, not int"),
    ("", 2, "train needs a config file: --config FILE"),
    ("--mode=fly", 2, "invalid choice: 'fly'"),
    (f"--config {DIGITS} --colour=red", 2, "unknown argument '--colour=red'"),
    (f"--config {DIGITS} stray", 2, "unknown argument 'stray'"),
    (f"stray --config {DIGITS} --config.seed 1", 2, "unknown argument 'stray'"),
    (f"--config {DIGITS} --output=x", 2, "--output='x': not used in train"),
    (f"--config {DIGITS} --config.train.init_from={{tmp}}", 2, "train.init_from='{tmp}': holds no checkpoint"),
    (f"--config {DIGITS} --config.optim.lr=1", 2, "optim.lr='1': no such field; choose one of optim.name"),
    (f"--config {DIGITS} --config.optim.learningrate=1", 2, "did you mean optim.learning_rate?"),
    (f"--config {DIGITS} --config.train=1", 2, "train='1': no such field; choose one of train.batch_size"),
    (f"--config {DIGITS} --config.nothing.at.all=1", 2, "choose one of seed, deterministic, on_nonfinite"),
    (f"--config {DIGITS} --config.model.name=vgg", 2, "model.name='vgg': must be one of cnn"),
    (f"--config {DIGITS} --config.optim.name=nadam", 2, "optim.name='nadam': must be one of adam"),
    (f"--config {DIGITS} --config.data.name=no_such_set", 2, "data.name='no_such_set': must be digits"),
    (
        f"--config {DIGITS} --config.data.eval_split=dev",
        2,
        "data.eval_split='dev': must be a split of digits: train, test",
    ),
    (f"--config {DIGITS} --config.train.batch_size=many", 2, "train.batch_size='many': must be an integer"),
    (f"--config {DIGITS} --config.train.epochs=nan", 2, "train.epochs=nan: must be a finite number"),
    (f"--config {DIGITS} --config.augment.flip=maybe", 2, "augment.flip='maybe': must be one of none, random"),
    (f"--config {DIGITS} --config.train.batch_size=0", 2, "train.batch_size=0: must be at least 1"),
    (
        f"--config {DIGITS} --config.train.batch_size=1443",
        2,
        "train.batch_size=1443: must be at most the 1442 examples",
    ),
    (f"--config {DIGITS} --config.optim.learning_rate=-1", 2, "optim.learning_rate=-1.0: must be at least 0"),
    (f"--config {DIGITS} --config.optim.learning_rate -1", 2, "optim.learning_rate=-1.0: must be at least 0"),
    (f"--config {DIGITS} --config.optim.warmup_epochs=1e3", 2, "optim.warmup_epochs=1000.0: must be shorter than"),
    (f"--config {DIGITS} --config.augment.crop_padding=32", 2, "augment.crop_padding=32: must be at most 31"),
    (f"--config {DIGITS} --config.data.validation_fraction=1", 2, "data.validation_fraction=1.0: must be in [0, 1)"),
    (f"--config {DIGITS} --config.data.validation_fraction=0.9999", 2, "must leave at least one training"),
    (f"--config {DIGITS} --config.train.epochs=1e308", 2, "train.epochs=1e+308: must be at most"),
    (f"--config {DIGITS} --config.optim.warmup_epochs=1e308", 2, "optim.warmup_epochs=1e+308: must be shorter than"),
    (
        f"--config {CIFAR} --config.data.eval_split={{tmp}}/run",
        2,
        "data.eval_split='{tmp}/run': must be a name such as test",
    ),
    (f"--config {CIFAR} --config.data.eval_split=", 2, "data.eval_split='': must be a name such as test"),
    (f"--config {CIFAR} --config.data.name=a/../run", 2, "data.name='a/../run': must look like"),
    (f"--config {CIFAR} --config.data.name=run:..", 2, "data.name='run:..': must look like"),
    ("--config {tmp}/class.py", 2, "OptimConfig'>: must be OptimConfig(...)"),
    (
        f"--config {DIGITS} --config.optim.accumulate_steps=9999",
        2,
        "optim.accumulate_steps=9999: must be at most the",
    ),
    (f"--config {DIGITS} --config.model.hidden_dropout=0.999", 2, "model.hidden_dropout=0.999: must be in [0, 0.99]"),
    (f"--config {DIGITS} --config.data.name=huggingface:mnist", 2, "data.name='huggingface:mnist': must look like"),
    (f"--config {DIGITS} --config.optim.b1=None", 2, "optim.b1='None': must be a finite number"),
    (f"--config {DIGITS} --config.data.validation_fraction=1e-9", 2, "must leave at least one training"),
    (
        f"--config {DIGITS} --config.data.image_size=90 --config.model.hidden=2000",
        2,
        "model.name='cnn': images of 90x90 need 123,904,000 parameters in one layer, above 100,000,000. Set a smaller",
    ),
    ("--config {tmp}/long.py", 2, "ValueError: one two"),
    (f"--config {DIGITS} --config.train.steps_per_call=0", 2, "train.steps_per_call=0: must be at least 1"),
    (f"--config {CIFAR} --config.data.pipeline=best", 2, "data.pipeline='best': must be one of auto, streaming, resid"),
    (f"--config {DIGITS} --config.eval.tta=rotate", 2, "eval.tta='rotate': must be one of none, mirror"),
    (
        f"--config {DIGITS} --config.eval.tta_below=0.6",
        2,
        "eval.tta_below='0.6': no such field; choose one of eval.batch_",
    ),
    (
        f"--config {DIGITS} --config.eval.tta=mirror --config.eval.tta_fraction=0",
        2,
        "eval.tta_fraction=0.0: must be in (0",
    ),
    (f"--config {DIGITS} --config.augment.cutout=33", 2, "augment.cutout=33: must be at most 32"),
    (f"--config {DIGITS} --config.augment.random_resized_crop=0", 2, "augment.random_resized_crop=0.0: must be above"),
    (
        f"--config {CIFAR} --config.augment.random_resized_crop=0.3",
        2,
        "augment.crop_padding=2: must be 0 with augment.random_resized_crop",
    ),
    (f"--config {DIGITS} --config.augment.color_jitter=1.5", 2, "augment.color_jitter=1.5: must be in [0, 1]"),
    (f"--config {DIGITS} --config.augment.mixup=-1", 2, "augment.mixup=-1.0: must be 0 (off) or in [0.01, 100]"),
    (f"--config {DIGITS} --config.augment.cutmix=1e-3", 2, "augment.cutmix=0.001: must be 0 (off) or in [0.01, 100]"),
    (f"--config {DIGITS} --config.augment.trivial_augment=2", 2, "augment.trivial_augment='2': must be true or false"),
    (f"--config {DIGITS} --config.averaging.name=swa", 2, "averaging.name='swa': must be one of none, ema"),
    (f"--config {DIGITS} --config.optim.name=muon", 2, "optim.weight_decay=0.02: does not apply to muon"),
    (f"--config {DIGITS} --config.optim.biases.learning_rate=x", 2, "optim.biases.learning_rate='x': must be a finite"),
    (f"--config {DIGITS} --config.optim.biases.momentum=0.5", 2, "optim.biases.momentum=0.5: does not apply to adamw"),
    (f"--config {DIGITS} --config.model.dtype=float64", 2, "model.dtype='float64': must be one of float32"),
    (
        f"--config {CIFAR} --config.data.archive={{tmp}}/no.tar.gz",
        2,
        "'{tmp}/no.tar.gz': no such file or folder",
    ),
    (f"--config {CIFAR} --config.data.archive={{tmp}}", 1, "data.archive='{tmp}': must be CIFAR's binary or Python"),
    (f"--config {CIFAR} --config.data.archive={{tmp}}/long.py", 1, "long.py': cannot be read (ReadError"),
    (f"--config {DIGITS} --config.profile.steps=(0,5)", 2, "profile.steps=(0, 5): must be (first, last) with 1"),
    (f"--config {DIGITS} --config.profile.steps=(9,5)", 2, "profile.steps=(9, 5): must be (first, last) with 1"),
    (f"--config {DIGITS} --config.profile.steps=5", 2, "profile.steps=(5,): must be (an integer, an integer)"),
    (f"--config {DIGITS} --config.profile.steps=(1,9999)", 2, "profile.steps=(1, 9999): must end within the"),
    (f"--config {DIGITS} --workdir=gs://bucket/run", 2, "--workdir='gs://bucket/run': must be a local path; mount"),
    (f"--config {DIGITS} --workdir=~no_one/run", 2, "--workdir='~no_one/run': the home folder is unknown"),
    ("--config=s3://bucket/a.py", 2, "--config='s3://bucket/a.py': must be a local path"),
    (f"--config {DIGITS} --config.train.init_from=gs://b/run", 2, "train.init_from='gs://b/run': must be a local path"),
    (f"--config {CIFAR} --config.data.source=disk", 2, "data.source='disk': must be one of auto, tfds, hub"),
    (f"--config {DIGITS} --config.data.source=hub", 2, "data.source='hub': needs data.name to be cifar10 or cifar100"),
    (f"--config {CIFAR} --config.data.source=hub --config.data.archive=a", 2, "must be auto if data.archive is set"),
    (f"--config {CIFAR} --config.data.source=hub --config.data.data_dir=a", 2, "must be auto or tfds if data.data_dir"),
    (f"--config {CIFAR} --config.data.source=hub", 1, "cannot be downloaded from http://127.0.0.1:9 (ConnectError: "),
    (f"--config {CIFAR} --online", 2, "--online: not used in train"),
    (f"--config {CIFAR} --config.data.archive=https://b/a", 2, "data.archive='https://b/a': must be a local path"),
    (f"--config {CIFAR} --config.data.cache_dir=~no_one/x", 2, "data.cache_dir='~no_one/x': the home folder is unkno"),
    (
        f"--mode=doctor --config {CIFAR} --config.data.data_dir=gs://b",
        2,
        "data.data_dir='gs://b': must be a local path",
    ),
    ("--mode=doctor --workdir=gs://bucket/run", 2, "--workdir='gs://bucket/run': must be a local path"),
    ("--mode=export --workdir={tmp}/run --output=s3://bucket/x", 2, "--output='s3://bucket/x': must be a local path"),
    ("--mode=compare {tmp}/run gs://bucket/run", 2, "PATH='gs://bucket/run': must be a local path"),
    (f"--confg {DIGITS}", 2, "unknown argument '--confg'"),
    ("--mode=doctor --workdir={tmp}/run", 2, "--workdir='{tmp}/run': holds no checkpoint"),
    ("--mode=compare {tmp}/run {tmp} --output=LICENSE", 2, "--output='LICENSE': must end with .html"),
    ("--mode=eval", 2, "eval needs the folder of a run: --workdir=DIR"),
    (f"--mode=study --config {DIGITS}", 2, "study needs the folder of a study: --workdir=DIR"),
    (f"--mode=eval --config {DIGITS}", 2, "--config='{DIGITS}': not used in eval, which uses the config saved"),
    ("--mode=eval --summary --workdir={tmp}/run", 2, "--summary: not used in eval"),
    ("--mode=eval --workdir={tmp}/run photo.png", 2, "--workdir='{tmp}/run': holds no checkpoint"),
    ("--mode=predict photo.png", 2, "predict needs the folder of a run"),
    ("--mode=predict --workdir={tmp}/nowhere photo.png", 2, "--workdir='{tmp}/nowhere': no such folder"),
    ("--mode=export --workdir={tmp}/run", 2, "export needs a folder to write to"),
    ("--mode=compare {tmp}/run", 2, "must be a study, or at least two folders of runs"),
    ("--mode=compare {tmp}/run {tmp} --config.seed=1", 2, "seed=1: not used in compare"),
    ("--mode=compare {tmp}/run {tmp} --workdir=x", 2, "--workdir='x': not used in compare"),
    ("--mode=compare {tmp}/run {tmp}", 2, "{tmp}/run"),
    (f"--mode=doctor --config {DIGITS} --config.train.epochs=-1", 2, "train.epochs=-1.0: must be above 0"),
    ("--mode=doctor stray", 2, "unknown argument 'stray'"),
    ("--mode=eval --workdir={tmp}/nowhere", 2, "--workdir='{tmp}/nowhere': no such folder"),
    ("--mode=eval --workdir={tmp}/run", 2, "--workdir='{tmp}/run': holds no checkpoint"),
    (
        f"--config {DIGITS} --workdir={{tmp}}/number.py",
        1,
        "--workdir='{tmp}/number.py': cannot be used as the folder of a run",
    ),
]


@pytest.fixture
def folder(tmp_path):
    files = {
        "syntax.py": "x = 1\ndef get_config(:\n",
        "raises.py": "x = 1\ny = x / 0\n",
        "typo.py": "from cifar_flax.config import Config\ndef get_config():\n    return Config(sed=1)\n",
        "class.py": (
            "from cifar_flax.config import Config\ndef get_config():\n"
            "    config = Config()\n    config.optim = type(config.optim)\n    return config\n"
        ),
        "long.py": "raise ValueError('one\\ntwo')\n",
        "empty.py": "",
        "number.py": "def get_config():\n    return 3\n",
        "run/notes.txt": "mine",
    }
    for name, content in files.items():
        path = tmp_path / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "input"


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "code", "message"), BAD_INPUT, ids=[row[0].replace("/", "_") for row in BAD_INPUT]
)
def test_bad_input_prints_one_line_and_changes_no_file(folder, monkeypatch, capsys, arguments, code, message):
    argv = arguments.format(tmp=folder).split()
    if "--workdir" not in arguments and "--mode" not in arguments:
        argv.append(f"--workdir={folder / 'run'}")
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    before = snapshot(folder)
    assert cli.main() == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message.format(tmp=folder, DIGITS=DIGITS) in lines[0]
    assert snapshot(folder) == before


# Settings that are refused without reading the data, on two devices.
NEEDS_NO_DATA = [
    ("optim.warmup_epochs=6 train.epochs=5", "optim.warmup_epochs=6.0: must be shorter than the run of 5 epochs"),
    (
        "optim.schedule=linear optim.final_epochs=5 train.epochs=5",
        "optim.final_epochs=5.0: must be shorter than the run of 5",
    ),
    ("train.batch_size=33", "train.batch_size=33: must be a multiple of the number of devices, 2"),
    ("parallel.backend=jit train.sync_batchnorm=False", "train.sync_batchnorm=False: must be True"),
    ("data.eval_split=dev", "data.eval_split='dev': must be a split of digits"),
    ("train.init_from={tmp}", "train.init_from='{tmp}': holds no checkpoint"),
    ("seed=1", "run': holds a run with another config (seed: 0 in config.json, 1 in the config)"),
]


@pytest.mark.parametrize("mode", ["train", "doctor"])
@pytest.mark.parametrize(("settings", "message"), NEEDS_NO_DATA, ids=[row[0] for row in NEEDS_NO_DATA])
def test_settings_that_no_data_fits_are_refused_before_the_data_is_read(
    tmp_path, monkeypatch, capsys, settings, message, mode
):
    config = arguments.parse(["--config", DIGITS]).config
    with workdir.opened(tmp_path / "run", config):
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")

    def read(split, data_dir):
        raise OSError("the data was read")

    monkeypatch.setitem(datasets.DATASETS, "digits", datasets.Dataset(read=read))
    for module in (devices, examined_devices):
        monkeypatch.setattr(module, "all_devices", lambda *warn: jax.devices()[:1] * 2)
    flags = [f"--config.{setting}" for setting in settings.format(tmp=tmp_path).split()]
    folder = "run" if settings == "seed=1" else "new"
    monkeypatch.setattr(sys, "argv", ["main.py", f"--mode={mode}", "--config", DIGITS, f"--workdir={folder}", *flags])
    assert cli.main() != 0
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
