"""Apply the examples of docs/extending.md to a copy of the project, and use them."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pages
import pytest
from conftest import REPOSITORY, read_metrics
from processes import environment, virtual_devices

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^(?:New file|In) `([^`]+)`:\n\n```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Another network, of the most common layers of nnx.
CONVNET = """
from dataclasses import dataclass

from flax import nnx

from cifar_flax.models.layers import dropout
from cifar_flax.models.network import ModelConfig, Network


@dataclass(slots=True, kw_only=True)
class ConvNetConfig(ModelConfig):
    name: str = "convnet"


class ConvNet(Network):
    def __init__(self, config, image_shape, num_classes, *, platform, rngs):
        self.conv = nnx.Conv(image_shape[2], 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.group_norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x, dropout_keys=None):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=dropout_keys is None))
        x = self.group_norm(nnx.max_pool(x, (2, 2), strides=(2, 2))).mean(axis=(1, 2))
        return self.head(x if dropout_keys is None else dropout(x, dropout_keys, 0.25))
"""
CONVNET_ROW = """
 from cifar_flax.models.airbench import Airbench, AirbenchConfig
+from cifar_flax.models.convnet import ConvNet, ConvNetConfig
@@
     "cnn": (CNNConfig, CNN),
+    "convnet": (ConvNetConfig, ConvNet),
""".lstrip("\n")
CONVNET_CONFIG = """
from cifar_flax.config import Config
from cifar_flax.models.convnet import ConvNetConfig


def get_config():
    return Config(model=ConvNetConfig())
"""

SMALL = ("--config.data.name=digits", "--config.data.pipeline=resident", "--config.train.epochs=2",
         "--config.train.batch_size=200", "--config.train.log_every=2")  # fmt: skip
TINY_VIT = ("--config.model.width=8", "--config.model.depth=1", "--config.data.image_size=16")

# Heading on the page -> config and settings of the run that uses its example.
SECTIONS = {
    "A network": ("configs/vit.py", *SMALL, *TINY_VIT),
    "A dataset": ("configs/shapes.py", "--config.train.epochs=2"),
    "An augmentation": ("configs/default.py", *SMALL, "--config.model.width=4", "--config.model.hidden=16",
                        "--config.augment.noise=0.1", "--config.augment.vertical_concat=0.3",
                        "--config.augment.cutout=4"),
    "An optimizer or a schedule": ("configs/quickstart.py", *SMALL, "--config.optim.name=lion",
                                   "--config.optim.schedule=inverse_sqrt"),
    "A metric": ("configs/quickstart.py", *SMALL),
}  # fmt: skip


def examples(heading):
    """Return (path, kind, text) of each block in the section `heading` of the page."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(section[1])


def apply(blocks, project):
    """Write new files, and apply each hunk of the diffs at the only place where it fits."""
    for name, kind, text in blocks:
        path = project / name
        if kind == "python":
            assert not path.exists(), path
            path.write_text(text)
            continue
        content = path.read_text()
        for hunk in text.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
            assert content.count(before) == 1, (name, before)
            content = content.replace(before, after)
        path.write_text(content)


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project."""
    for name in ("cifar_flax", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def succeed(project, *command, devices=1):
    """Run a Python command in the folder `project`; assert that it succeeds."""
    variables = environment(**virtual_devices(devices))
    done = subprocess.run([sys.executable, *command], cwd=project, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(project, *arguments, devices=1):
    succeed(project, str(REPOSITORY / "tests" / "extended_run.py"), *arguments, devices=devices)


def losses(project, *settings):
    """Return the training losses of a short run in the folder `project`."""
    workdir = f"losses{len(list(project.glob('losses*')))}"
    command = ("-m", "cifar_flax", "--config", *SECTIONS["An augmentation"][:-3], *settings, f"--workdir={workdir}")
    succeed(project, *command)
    return [line["loss"] for line in read_metrics(project / workdir) if line["split"] == "train"]


def test_all_examples_together(project):
    """The examples of all kinds work together, on two devices, and pass the lint checks."""
    for heading in SECTIONS:
        apply(examples(heading), project)
    for command in (["check"], ["format", "--check"]):
        succeed(project, "-m", "ruff", *command, "--config", str(REPOSITORY / "pyproject.toml"), ".")
    run(
        project, "configs/vit.py", "--config.model.width=8", "--config.model.depth=1", "--config.data.name=shapes",
        "--config.data.train_split=training", "--config.data.eval_split=validation", "--config.train.epochs=2",
        "--config.train.log_every=4", "--config.augment.noise=0.1", "--config.augment.vertical_concat=0.3",
        "--config.optim.name=lion", devices=2,
    )  # fmt: skip
    lines = read_metrics(project / "resumed")
    assert all(line["grad_norm"] > 0 for line in lines if line["split"] == "train")
    brier_scores = [line["brier_score"] for line in lines if line["split"] == "validation"]
    assert len(brier_scores) == 2
    assert 0 < brier_scores[-1] < 2
    assert json.loads((project / "resumed" / "eval.json").read_text())["brier_score"] == brier_scores[-1]
    report, comparison = (pages.read(project / name) for name in ("resumed/report.html", "comparison.html"))
    assert "brier score" in [term.text for term in report.all("dt")]
    assert "brier score" in pages.table(comparison, "Metrics of the runs")[0]
    for page, title in itertools.product((report, comparison), ("Grad norm", "Brier score")):
        assert any(caption.text.startswith(title) for caption in page.all("figcaption"))


@pytest.mark.slow
@pytest.mark.parametrize("heading", SECTIONS)
def test_each_example(project, heading):
    blocks = examples(heading)
    assert {kind for _, kind, _ in blocks} <= {"python", "diff"}
    assert blocks
    apply(blocks, project)
    run(project, *SECTIONS[heading])


@pytest.mark.slow
def test_network_of_common_nnx_layers(project):
    blocks = [
        ("cifar_flax/models/convnet.py", "python", CONVNET),
        ("cifar_flax/models/__init__.py", "diff", CONVNET_ROW),
        ("configs/convnet.py", "python", CONVNET_CONFIG),
    ]
    apply(blocks, project)
    run(project, "configs/convnet.py", *SMALL)


@pytest.mark.slow
def test_augmentations_do_not_change_each_others_random_numbers(project, tmp_path_factory):
    original = tmp_path_factory.mktemp("original")
    for name in ("cifar_flax", "configs"):
        shutil.copytree(project / name, original / name)
    apply(examples("An augmentation"), project)
    expected = losses(original, "--config.augment.cutout=4")
    assert losses(project, "--config.augment.cutout=4") == expected
    for setting in ("--config.augment.noise=0.1", "--config.augment.vertical_concat=0.3"):
        assert losses(project, "--config.augment.cutout=4", setting)[0] != expected[0]


@pytest.mark.slow
def test_types_and_tests_pass_with_all_examples(project, pytestconfig):
    for name in ("tests", "docs", "benchmarks"):
        shutil.copytree(REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(REPOSITORY / name, project / name)
    for heading in SECTIONS:
        apply(examples(heading), project)
    succeed(project, "-m", "docs.settings")
    succeed(project, "-m", "mypy")
    names = ["config", "imports", "messages", "network", "summary"]
    if not pytestconfig.getoption("--reduced"):
        names += ["augment", "comparison", "optim"]
    succeed(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in names))
