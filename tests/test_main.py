"""The program as its user starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

import main

DIGITS = str(REPOSITORY / "configs" / "quickstart.py")
CIFAR = str(REPOSITORY / "configs" / "default.py")
GOOD = "from cifar_flax.config import Config\ndef get_config():\n    return Config()\n"

# arguments (with {tmp} for a folder), exit code, what the message says
BAD_INPUT = [
    ("--config {tmp}/nowhere.py", 2, "--config='{tmp}/nowhere.py': no such file"),
    ("--config {tmp}/syntax.py", 2, "syntax.py': line 2: SyntaxError"),
    ("--config {tmp}/raises.py", 2, "raises.py': line 2: ZeroDivisionError"),
    ("--config {tmp}/typo.py", 2, "typo.py': line 3: TypeError"),
    ("--config {tmp}/empty.py", 2, "it defines no get_config()"),
    ("--config {tmp}/number.py", 2, "get_config() returns a int, not a Config"),
    ("", 2, "--config=None: train needs a config file"),
    ("--mode=fly", 2, "invalid choice: 'fly'"),
    (f"--config {DIGITS} --colour=red", 2, "flag 'colour'"),
    (f"--config {DIGITS} stray", 2, "'stray'"),
    (f"--config {DIGITS} --config.optim.lr=1", 2, "optim.lr: no such field; choose one of optim.name"),
    (f"--config {DIGITS} --config.optim.learningrate=1", 2, "did you mean optim.learning_rate?"),
    (f"--config {DIGITS} --config.train=1", 2, "train: no such field; choose one of train.batch_size"),
    (f"--config {DIGITS} --config.nothing.at.all=1", 2, "choose one of seed, data, augment, model"),
    (f"--config {DIGITS} --config.model.name=vgg", 2, "model.name='vgg': must be one of cnn"),
    (f"--config {DIGITS} --config.optim.name=lion", 2, "optim.name='lion': must be one of adam"),
    (f"--config {DIGITS} --config.data.name=no_such_set", 2, "data.name='no_such_set': must be digits or a TFDS"),
    (f"--config {DIGITS} --config.data.eval_split=dev", 2, "data.eval_split='dev': must be test"),
    (f"--config {DIGITS} --config.train.batch_size=many", 2, "train.batch_size='many': must be a whole number"),
    (f"--config {DIGITS} --config.train.epochs=nan", 2, "train.epochs=nan: must be a finite number"),
    (f"--config {DIGITS} --config.augment.flip=maybe", 2, "augment.flip='maybe': must be true or false"),
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
    (f"--config {DIGITS} --config.data.validation_fraction=1e-9", 2, "holds out no example"),
    (f"--config {CIFAR} --config.data.archive={{tmp}}/no.tar.gz", 2, "data.archive='{tmp}/no.tar.gz'"),
    ("--mode=eval", 2, "--workdir=None: eval needs the folder of a run"),
    (f"--mode=eval --config {DIGITS}", 2, "--config='{DIGITS}': not used here"),
    ("--mode=eval --workdir={tmp}/nowhere", 2, "--workdir='{tmp}/nowhere': holds no checkpoint"),
    ("--mode=eval --workdir={tmp}/run", 2, "--workdir='{tmp}/run': holds no checkpoint"),
    (f"--config {DIGITS} --workdir={{tmp}}/number.py", 1, "--workdir='{tmp}/number.py': cannot be used as a folder"),
]


@pytest.fixture
def folder(tmp_path):
    files = {
        "syntax.py": "x = 1\ndef get_config(:\n",
        "raises.py": "x = 1\ny = x / 0\n",
        "typo.py": "from cifar_flax.config import Config\ndef get_config():\n    return Config(sed=1)\n",
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
def test_bad_input_is_one_line_and_touches_nothing(folder, monkeypatch, capsys, arguments, code, message):
    argv = arguments.format(tmp=folder).split()
    if "--workdir" not in arguments and "--mode=eval" not in arguments:
        argv.append(f"--workdir={folder / 'run'}")
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    before = snapshot(folder)
    assert main.main() == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message.format(tmp=folder, DIGITS=DIGITS) in lines[0]
    assert snapshot(folder) == before


def start(*arguments, folder):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_train_kill_resume_and_evaluate(tmp_path):
    """The quickstart, shortened, in processes of its own; the first one is killed between two checkpoints."""
    command = ("--config", DIGITS, "--config.train.epochs=4", "--config.model.width=8", "--config.model.hidden=32")
    workdir = tmp_path / "runs" / "quickstart"
    with start(*command, folder=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    with start(*command, folder=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming at step" in out
    assert "accuracy" in out
    trained = (workdir / "eval.json").read_bytes()
    assert json.loads(trained)["num_examples"] == 355
    (workdir / "eval.json").unlink()

    with start("--mode=eval", "--workdir=runs/quickstart", "--config.eval.batch_size=64", folder=tmp_path) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    with start("--mode=eval", "--workdir=runs/quickstart", folder=tmp_path) as process:
        printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (workdir / "eval.json").read_bytes() == trained
    assert out.endswith(printed)
    assert err == ""

    for field in ("seed=1", "optim.learning_rate=1", "data.name=cifar10"):
        with start("--mode=eval", "--workdir=runs/quickstart", f"--config.{field}", folder=tmp_path) as process:
            _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert len(err.splitlines()) == 1
        assert f"{field.split('=')[0]}=" in err
        assert "cannot be changed in eval" in err


def test_quickstart_path_needs_no_tensorflow():
    code = (
        "import sys\nsys.argv = ['main.py', '--mode=eval', '--workdir=nowhere']\n"
        "import main\nassert main.main() == 2\n"
        "from cifar_flax.data import resident\n"
        "print([name for name in sys.modules if name.startswith('tensorflow')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
